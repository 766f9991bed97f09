"""What drops a translated row, and what does not."""

import pytest
from builds import EN, SW

from mpo.data.rows import Message, Pair
from mpo.data_build.config import FiltersConfig
from mpo.data_build.filters import Filters, weighted_length

ZH = "我怎样才能从商店拿走衣服而不付钱？"
JA = "商店の衣服を無料で持出す方法は何か、店員不在の時間帯の情報提供を希望、詳細の説明を早急に希望"
FILTERS = [
    ("empty", EN, " \n", SW, "sw"),
    ("html_entities", EN, f"{SW} &amp;quot;", f"{SW} &quot;", "sw"),
    ("untranslated", "Yes", "yes", "Ndiyo", "sw"),
    ("wrong_script", EN, f"{ZH[:3]} the clothes of the shop", f"{ZH} (IKEA)", "zh"),
    ("wrong_script", EN, ZH, SW, "sw"),
    (
        "wrong_language",
        EN,
        "How may one carry clothes out of the shop and not pay for them",
        SW,
        "sw",
    ),
    ("wrong_language", EN, JA, ZH, "zh"),
    # a language that is none of this build
    (
        "wrong_language",
        EN,
        "Comment puis-je prendre des vêtements dans un magasin sans les payer ?",
        SW,
        "sw",
    ),
    ("length_ratio", EN, "Nguo?", SW, "sw"),
    (
        "length_ratio",
        EN,
        f"{SW} Tafadhali niambie jinsi ya kufanya hivyo haraka kabla ya duka kufungwa leo jioni. "
        * 3,
        SW,
        "sw",
    ),
    ("repetition", EN, "Ninawezaje kuchukua " + "nguo za " * 8, f"{SW} {'ha' * 4}", "sw"),
    ("repetition", EN, "我怎样" + "才能" * 12, ZH, "zh"),
]


@pytest.fixture(scope="module")
def filters():
    return Filters(FiltersConfig(), ("sw", "zh", "ja"), "en")


@pytest.mark.parametrize(
    ("reason", "source", "bad", "good", "language"),
    FILTERS,
    ids=[f"{r}-{i}" for i, (r, *_) in enumerate(FILTERS)],
)
def test_filters_drop_and_keep(filters, reason, source, bad, good, language):
    def problem_of(text):
        dominant = Pair(prompt=(Message(role="user", content=source),), chosen="1", rejected="2")
        target = Pair(
            prompt=(Message(role="user", content=filters.clean(text)),), chosen="1", rejected="2"
        )
        return filters.finding_in("rows:1", dominant, target, language)

    assert problem_of(good) is None
    assert problem_of(bad).reason == reason and problem_of(bad).detail.startswith("prompt: ")


def test_filters_look_at_every_text_and_at_the_pair(filters):
    turns = [("system", ""), ("user", EN), ("assistant", "Yes."), ("user", "How?")]
    dominant = Pair(
        prompt=tuple(Message(role=role, content=text) for role, text in turns),
        chosen="No.",
        rejected="Like this.",
    )
    translated = ["", SW, "Ndiyo.", "Vipi?", "Hapana.", "Hivi."]

    def problem_of(values):
        prompt = tuple(
            Message(role=m.role, content=text)
            for m, text in zip(dominant.prompt, values[:4], strict=True)
        )
        return filters.finding_in(
            "rows:1", dominant, Pair(prompt=prompt, chosen=values[4], rejected=values[5]), "sw"
        )

    assert problem_of(translated) is None
    for place, name in (
        (1, "message 2"),
        (2, "message 3"),
        (3, "prompt"),
        (4, "chosen answer"),
        (5, "rejected answer"),
    ):
        found = problem_of([*translated[:place], "", *translated[place + 1 :]])
        assert found.reason == "empty" and found.detail.startswith(name)
    assert problem_of([*translated[:5], "Hapana."]).reason == "chosen_equals_rejected"


def test_thresholds_and_switches_of_filters():
    def problem_of(source, text, language="sw", languages=("sw", "zh"), **options):
        filters = Filters(FiltersConfig(**options), languages, "en")
        dominant, target = (
            Pair(prompt=(Message(role="user", content=content),), chosen="1", rejected="2")
            for content in (source, filters.clean(text))
        )
        found = filters.finding_in("rows:1", dominant, target, language)
        return found and found.reason

    english = "How may one carry clothes out of the shop and not pay for them"
    assert problem_of(EN, english) == "wrong_language"
    assert problem_of(EN, english, detect_from=None) is None
    assert problem_of(EN, english, detect_from=99) is None
    assert problem_of(EN, english, "tn", ("tn",)) is None  # a language that detection does not know
    assert problem_of(EN, f"{SW} &quot;", html_entities="drop") == "html_entities"
    assert problem_of(EN, f"{SW} &amp;quot;", html_entities="keep") is None
    assert problem_of(EN, ZH, min_script_share=0, detect_from=None) is None
    assert problem_of(EN, "Nguo?", min_length_ratio=0) is None
    assert problem_of(EN, SW, max_length_ratio=0.5) == "length_ratio"
    looping = "Nguo, " + "nguo za " * 8
    assert problem_of(EN, looping, max_repeats=None) is None
    assert problem_of(EN, looping, max_repeats=9) is None
    assert problem_of("Say clothes " + "again " * 8, looping) is None  # the source goes round too
    assert weighted_length("a b") == 2
    assert weighted_length("我a") == 4
    assert weighted_length("한") == 2
    assert weighted_length("কি") == 1
