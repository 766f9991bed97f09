"""Languages: their names in every usual form, and which one a text is in."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mpo.config import DataConfig
from mpo.data.detection import LanguageDetector, clearly_in_another, told_apart
from mpo.data_build.config import BuildConfig
from mpo.languages import (
    LANGUAGES,
    SCRIPTS,
    canonical,
    flores_of,
    is_known,
    name_of,
    script_share,
    scripts_of,
)
from mpo.runtime.errors import UserError

DEMO = Path(__file__).parents[2] / "mpo/recipes/demo/train.jsonl"
TEXTS = {"en": {}}
for line in DEMO.read_text(encoding="utf-8").splitlines():
    demo_row = json.loads(line)
    for language_here, demo_pair in (
        ("en", demo_row["dominant"]),
        (demo_row["language"], demo_row["target"]),
    ):
        TEXTS.setdefault(language_here, {})[demo_row["id"].rsplit("-", 1)[0]] = (
            demo_pair["prompt"][0]["content"],
            demo_pair["chosen"],
            demo_pair["rejected"],
        )

FORMS = {
    "zh": (
        "zh ZH zh-CN zh_CN zh-Hans zh_Hans_CN zh-hans-cn zho chi cmn zho_Hans Chinese zh-SG"
        " zh_CN.UTF-8"
    ),
    "zh-Hant": "zh-Hant zh_TW zh-HK zho_Hant ZH-HANT zh-Hant-TW",
    "en": "en EN en-US en_GB eng eng_Latn English en_XX",
    "sw": "sw SW swa swh swh_Latn sw-KE Swahili sw_KE",
    "no": "no NO nor Norwegian",
    "nb": "nb nob nob_Latn nb-NO",
    "ar": "ar ara arb arb_Arab ar-EG ar_AR",
    "ja": "ja jpn jpn_Jpan ja-JP ja-Jpan ja_XX",
    "ko": "ko kor kor_Hang ko-KR ko-Kore",
    "sr-Latn": "sr-Latn sr_Latn_RS srp_Latn",
    "he": "he iw heb heb_Hebr",
    "id": "id in ind",
    "de": "de ger deu deu_Latn German",
    "ht": "ht hat hat_Latn",
    "tlh": "tlh TLH",
}


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in FORMS for form in FORMS[name].split()]
)
def test_every_usual_form_of_a_language_has_one_name(name, form):
    assert canonical(form) == name == canonical(f" {form} ") == canonical(name)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(LANGUAGES)),
    st.sampled_from([str, str.upper, str.title]),
    st.sampled_from(["", "own", "Latn", "Cyrl", "Arab"]),
    st.sampled_from(["", "XX", "419"]),
    st.sampled_from("-_"),
)
def test_names_are_one_for_every_language_of_the_table(code, case, script, region, separator):
    """Whatever the case, the length of the code, the separator and the region; a script of another
    kind makes another language."""
    own = LANGUAGES[code][1]
    written = own[-4:] if script == "own" else script
    expected = code if written in ("", own[-4:]) else f"{code}-{written}"
    for first in (code, own[:3]):
        if first == "nob" and code == "no":
            continue  # that is nb
        assert canonical(case(separator.join(filter(None, (first, written, region))))) == expected
    assert canonical(LANGUAGES[code][0].upper()) == code
    assert flores_of(expected) == own[:4] + (written or own[-4:])
    assert name_of(expected).startswith(LANGUAGES[code][0])
    assert scripts_of(code) == SCRIPTS[code] and is_known(expected)
    if flores_of(expected) == own:
        assert flores_of(expected) in FAIRSEQ_LANGUAGE_CODES


def test_configurations_and_checks_know_one_name():
    data = DataConfig(
        train="rows.jsonl", languages=["zh-CN", "swh_Latn", False], dominant_language="en-US"
    )
    assert (data.train, data.languages, data.dominant_language) == (
        ("rows.jsonl",),
        ("zh", "sw", "no"),
        "en",
    )
    assert DataConfig(train=["x"], languages="ZH").languages == ("zh",)
    assert DataConfig(train=["x"], languages=False).languages == ("no",)
    assert DataConfig(train=["x"], dominant_language=False).dominant_language == "no"
    build = {
        "input": "p.jsonl",
        "output": "o.jsonl",
        "translator": {"seq2seq": {"path": "x", "codes": {"zh-TW": "zho_Hant"}}},
    }
    made = BuildConfig.model_validate({**build, "languages": ["zh-Hant", "SW"]})
    assert made.input == ("p.jsonl",)
    assert made.languages == ("zh-Hant", "sw")
    assert made.translator.seq2seq.codes == {"zh-Hant": "zho_Hant"}
    with pytest.raises(ValueError, match="one is there twice"):
        BuildConfig.model_validate({**build, "languages": ["zh-CN", "zho_Hans"]})
    with pytest.raises(ValueError, match="holds the dominant language, en"):
        BuildConfig.model_validate({**build, "languages": ["eng"]})
    assert script_share("你好 ok", "zh-Hant") == script_share("你好 ok", "zh") < 1
    assert script_share("Dobro", "sr-Latn") == 1


# Which language a text is in


@pytest.mark.parametrize("dominant", sorted(TEXTS))
@pytest.mark.parametrize("offered", ["all", "one"])
def test_a_text_is_in_its_language_whatever_is_offered(dominant, offered):
    """With one language offered, texts in the others are in none of those: none is forced on
    them."""
    for language in set(TEXTS) - {dominant}:
        detector = LanguageDetector(
            sorted(set(TEXTS) - {dominant}) if offered == "all" else [language], dominant
        )
        for other, texts in TEXTS.items():
            found = [detector.detect(*three) for three in texts.values()]
            assert found == [other] * len(found)
        if offered == "all":
            break


def test_english_inside_another_language_and_in_place_of_it_is_not_english():
    """With English as dominant language and as one of the targets."""
    for dominant, languages in (
        ("en", ("zh", "ja", "ko", "ar", "bn", "sw")),
        ("zh", ("en", "ja", "ko", "ar", "bn", "sw")),
    ):
        detector = LanguageDetector(languages, dominant)
        for language in set(languages) - {"en"}:
            for name, (prompt, chosen, rejected) in TEXTS[language].items():
                english = TEXTS["en"][name]
                assert detector.detect(english[0], chosen, rejected) == language
                if language != "sw":  # where the script tells
                    assert (
                        detector.detect(f"{english[0]} {english[0]} {prompt}", chosen, rejected)
                        == language
                    )
                    assert detector.detect(f"{english[1]} {prompt}", chosen, english[2]) == language
                assert (
                    detector.detect(prompt, english[1], rejected)
                    == detector.detect(prompt, english[1], english[2])
                    == language
                )
        for name, (prompt, chosen, rejected) in TEXTS["en"].items():
            # an English text that quotes another
            assert detector.detect(f"{prompt} {TEXTS['ko'][name][0][:9]}", chosen, rejected) == "en"


def test_what_cannot_be_told_is_said():
    with pytest.raises(UserError, match="Unknown language code: 'klingon'"):
        LanguageDetector(("klingon",), "en")
    with pytest.raises(UserError, match="zh and zh-Hant cannot be told apart"):
        LanguageDetector(("zh", "zh-Hant"), "en")
    assert told_apart("zh", "en")
    assert not told_apart("zh", "zh-Hant")
    assert not told_apart("no", "nb")
    assert not told_apart("tlh", "en")
    assert clearly_in_another("tlh", *TEXTS["en"]["shoplifting"]) is None
    assert clearly_in_another("en", "1 + 1", "") is None
    for language, texts in TEXTS.items():
        for three in texts.values():
            assert clearly_in_another(language, *three) is None
            assert clearly_in_another("zh" if language != "zh" else "sw", *three) == language
