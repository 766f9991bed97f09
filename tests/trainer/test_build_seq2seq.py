"""`mpo data build` with a translation model of transformers."""
# ruff: noqa: F811  (fixtures come from builds.py)

import json
import shutil

import pytest
from builds import (
    LANGUAGES_HERE,
    TRANSLATIONS,
    answerer,  # noqa: F401  (a fixture)
    configure,
    expected,
    folder,  # noqa: F401  (a fixture)
    preferences,
    rows_of,
    run,
)
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model, write_rows
from tiny_translator import save_nllb
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mpo.data.rows import Message
from mpo.data_build.answers import Answerer
from mpo.data_build.config import (
    AnswersConfig,
    Seq2SeqConfig,
)
from mpo.data_build.seq2seq_translator import Seq2SeqTranslator, split
from mpo.data_build.translation import Failure
from mpo.languages import LANGUAGES, SCRIPTS
from mpo.runtime.errors import UserError


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    sources = {
        text for row in preferences(2) for text in (row["prompt"], row["chosen"], row["rejected"])
    }
    known = {job: text for job, text in TRANSLATIONS.items() if job[0] in sources}
    return save_nllb(tmp_path_factory.mktemp("nllb"), known)


def test_a_seq2seq_model_translates_the_whole_way(folder, nllb):
    write_rows(folder / "prefs.jsonl", preferences(2))
    configure(folder, seq2seq={"path": str(nllb), "num_beams": 1, "max_source_tokens": 64})
    report = run(folder)
    assert rows_of(folder) == expected(2) and report["translated"] == 12
    assert run(folder)["translated"] == 0
    # One by one instead of in batches: the same jobs. Beams: all other jobs.
    assert run(folder, "translator.seq2seq.batch_size=1")["translated"] == 0
    assert run(folder, "translator.seq2seq.num_beams=2")["translated"] == 12


SHAPES_A_TRANSLATION = {
    "path": "other",
    "revision": "v2",
    "dtype": "bfloat16",
    "codes": {"sw": "eng_Latn"},
    "num_beams": 2,
    "max_source_tokens": 63,
    "max_new_tokens": 400,
}


def test_every_option_that_shapes_a_translation_or_an_answer_is_in_its_key(nllb, answerer):
    """Each field but those that only change speed; a field that is new must be put on one of the
    sides here."""
    assert set(Seq2SeqConfig.model_fields) == {*SHAPES_A_TRANSLATION, "batch_size"}
    plain = translator(nllb)
    keys = {str(plain.identity("sw")), str(plain.identity("zh"))}
    for name, value in SHAPES_A_TRANSLATION.items():
        other = translator(nllb, **({name: value} if name == "codes" else {}))
        if name != "codes":
            other._config = other._config.model_copy(update={name: value})
        keys.add(str(other.identity("sw")))
    assert len(keys) == 2 + len(SHAPES_A_TRANSLATION)
    assert translator(nllb, batch_size=3).identity("sw") == plain.identity("sw")
    assert Seq2SeqTranslator(plain._config, "zh", ("sw",)).identity("sw") != plain.identity("sw")

    shapes_an_answer = {
        "path": "other",
        "revision": "v2",
        "dtype": "float32",
        "max_new_tokens": 9,
        "temperature": 0.5,
    }
    assert set(AnswersConfig.model_fields) == {*shapes_an_answer, "batch_size"}
    model = Answerer(AnswersConfig(path=str(answerer)), print)
    prompt = (Message(role="user", content="hello"),)
    keys = {
        model.key(prompt),
        model.key((*prompt, *prompt)),
        model.key((Message(role="system", content="hello"),)),
    }
    for name, value in shapes_an_answer.items():
        model._config = AnswersConfig(path=str(answerer)).model_copy(update={name: value})
        keys.add(model.key(prompt))
    assert len(keys) == 3 + len(shapes_an_answer)
    model._config = AnswersConfig(path=str(answerer), batch_size=3)
    assert model.key(prompt) in keys


def translator(nllb, **options):
    return Seq2SeqTranslator(
        Seq2SeqConfig(path=str(nllb), **{"num_beams": 1, "max_source_tokens": 64, **options}),
        "en",
        LANGUAGES_HERE,
    )


def test_batches_and_line_breaks_change_nothing_in_a_translation(nllb):
    (first, one), (second, two) = [
        (s, TRANSLATIONS[s, "sw"])
        for s in (preferences(2)[0]["prompt"], preferences(2)[1]["rejected"])
    ]
    asked = [first, f"{first}\n\n  - 1\n{second}\n", second, f"---\n{second}"]
    wanted = {
        asked[0]: one,
        asked[1]: f"{one}\n\n  - 1\n{two}\n",
        asked[2]: two,
        asked[3]: f"---\n{two}",
    }
    for size in (1, 2, 16):
        assert (
            dict(
                pair
                for batch in translator(nllb, batch_size=size).translate(asked, "sw")
                for pair in batch
            )
            == wanted
        )
    assert (
        dict(
            pair for batch in translator(nllb, num_beams=3).translate(asked, "sw") for pair in batch
        )
        == wanted
    )


def test_a_translation_without_an_end_is_told(nllb):
    source = preferences(1)[0]["chosen"]
    ((result,),) = translator(nllb, max_new_tokens=8).translate([source], "sw")
    assert isinstance(result[1], Failure)
    assert result[1].reason == "truncated"
    assert "max_new_tokens" in result[1].detail
    ((result,),) = translator(nllb, max_source_tokens=8).translate(
        [source.replace(".", "").replace(",", "")], "sw"
    )
    assert isinstance(result[1], Failure) and result[1].reason == "too_long"


@given(st.text(alphabet="ab1 .?。\n-", max_size=60), st.integers(3, 12))
def test_split_pieces_make_up_the_text(text, limit):
    parts = split(text, len, limit)
    if isinstance(parts, Failure):
        assert parts.reason == "too_long"
    else:
        assert "".join(piece + gap for piece, gap in parts) == text
        assert all(len(piece) <= limit and "\n" not in piece for piece, _ in parts)


def test_split_keeps_sentences_together_as_long_as_they_fit():
    assert split("One two. Three four. Five.", len, 20) == [
        ("One two. Three four.", " "),
        ("Five.", ""),
    ]
    assert split("一二。三四。五", len, 4) == [("一二。", ""), ("三四。五", "")]
    assert split("1. a\n\n * b", len, 9) == [("1. a", "\n\n "), ("* b", "")]


def test_every_code_is_one_of_nllb_and_other_kinds_are_understood(tmp_path, nllb):
    assert {flores for _, flores in LANGUAGES.values()} <= set(FAIRSEQ_LANGUAGE_CODES)
    assert set(SCRIPTS) == set(LANGUAGES)
    assert {n: code for n, (code, _) in translator(nllb)._codes.items()} == {
        "en": "eng_Latn",
        "sw": "swh_Latn",
        "zh": "zho_Hans",
    }
    from transformers import MBart50Tokenizer

    tiny = Seq2SeqTranslator(Seq2SeqConfig(path=str(nllb), max_source_tokens=64), "sw", ("zh",))
    list(tiny.translate([TRANSLATIONS[preferences(1)[0]["prompt"], "sw"]], "zh"))
    # the source's language is told too
    assert tiny._tokenizer("x")["input_ids"][0] == tiny._codes["sw"][1]
    tiny._tokenizer = MBart50Tokenizer(
        vocab=[
            ("<s>", 0.0),
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            ("▁a", -1.0),
            ("sw", -1.0),
        ]
    )
    assert [tiny._code_of(code)[0] for code in ("en", "sw", "zh")] == ["en_XX", "sw_KE", "zh_CN"]
    import sentencepiece
    from transformers import M2M100Tokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e sw zh"] * 20),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=22,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    (tmp_path / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁a", "sw"])})
    )
    tiny._tokenizer = M2M100Tokenizer(
        vocab_file=str(tmp_path / "vocab.json"), spm_file=str(tmp_path / "spm.model")
    )
    for code in ("en", "sw", "zh"):
        assert tiny._code_of(code) == (code, tiny._tokenizer.get_lang_id(code))
        tiny._tokenizer.src_lang = tiny._code_of(code)[0]


def test_a_translator_is_not_half_random(folder, nllb):
    half = folder / "half"
    shutil.copytree(nllb, half)
    values = load_file(half / "model.safetensors")
    del values["model.decoder.layers.0.fc1.weight"]
    save_file(values, half / "model.safetensors", metadata={"format": "pt"})
    configure(folder, seq2seq={"path": str(half), "max_source_tokens": 64})
    with pytest.raises(
        UserError, match=r"missing from its files: model\.decoder\.layers\.0\.fc1\.weight"
    ):
        run(folder)


def test_seq2seq_faults(folder, nllb):
    configure(folder, seq2seq={"path": str(nllb), "max_source_tokens": 64})
    for overrides, message in (
        (
            ["languages=[sw,yo]"],
            (
                r"knows no language 'yo'. Set translator.seq2seq.codes.yo to one of: eng_Latn,"
                r" swh_Latn, zho_Hans"
            ),
        ),
        (["translator.seq2seq.codes.sw=swa_Latn"], "knows no language 'swa_Latn'"),
        (
            ["translator.seq2seq.path=empty"],
            "empty is neither a model folder nor a hub id that can be read",
        ),
        (["translator.seq2seq.max_source_tokens=500"], "more than the model's 128; lower it"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, *overrides)
    save_model(folder / "llama", make_tokenizer())
    with pytest.raises(
        UserError, match=r"of type 'llama', which does not translate .*use translator.server"
    ):
        run(folder, "translator.seq2seq.path=llama")
    tiny = translator(nllb)
    tiny._tokenizer = make_tokenizer()
    with pytest.raises(UserError, match="has no tokens of languages, so it is of another kind"):
        tiny._code_of("sw")
