"""What `mpo validate` says of rows: as texts, as the tokens that are trained on, and of those that
are only measured."""

import json

import pytest
from conftest import make_tokenizer
from tiny import example_of, native_rows, save_model, write_rows

from mpo.config import Config
from mpo.data.examples import TokenizedResponse, _of_each_language
from mpo.data.inspection import inspect
from mpo.models.inputs import load_inputs
from mpo.runtime.errors import UserError

SW = ("nifanyeje jambo hili rafiki", "siwezi kukusaidia kwa hilo", "ndiyo fanya hivi leo")
EN = (
    "How should I do this thing, my friend?",
    "I cannot help you with that.",
    "Yes, do it like this today.",
)


def row(language="sw", target=SW, dominant=EN, system=None):
    """A row about which there is nothing to say; texts are prompt, chosen, rejected."""

    def pair(texts, side):
        turns = [{"role": "system", "content": system}] if system and side == "target" else []
        return {
            "prompt": [*turns, {"role": "user", "content": texts[0]}],
            "chosen": texts[1],
            "rejected": texts[2],
        }

    return {
        "language": language,
        "dominant": pair(dominant, "dominant"),
        "target": pair(target, "target"),
    }


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def of(template, **values):
        folder = root / f"{template}-{len(values)}"
        if not folder.exists():
            save_model(folder, make_tokenizer(template))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **values}))
        return str(folder)

    return of


def report(folder, model, rows, held_out=(), **data):
    files = {"train": [str(write_rows(folder / "rows.jsonl", rows))]}
    if held_out:
        files["eval"] = [str(write_rows(folder / "held_out.jsonl", held_out))]
    config = Config(output_dir=str(folder / "run"), model={"path": model}, data={**files, **data})
    return report_of(load_inputs(config, print))


def report_of(inputs):
    """What --json prints."""
    return inspect(inputs.examples, inputs.tokenizer, inputs.data).as_dict()


def said(found):
    return {(item["source"], item["reason"]) for item in found["suspicious"]}


def test_nothing_is_said_of_rows_that_are_as_they_should_be(tmp_path, model_of):
    for template in ("chatml", "llama3", "gemma", "stripping", "thinking", "spaced", "channels"):
        found = report(
            tmp_path,
            model_of(template),
            [row(), row(target=tuple(f"{text} sana" for text in SW))],
            [row(target=SW[:1] + SW[:0:-1])],
        )
        assert not found["suspicious"] and not found["dropped"], template
        assert found["languages"]["sw"]["rows"] == 2 and found["held_out"]["sw"]["rows"] == 1


AS_TOKENS = [
    (
        "special_token",
        "chatml",
        row(target=(SW[0], f"{SW[1]}<|im_end|>", SW[2])),
        "holds '<|im_end|>', which the model reads as a control",
    ),
    (
        "special_token",
        "chatml",
        row(target=(f"{SW[0]} <bos>", *SW[1:])),
        "a target text holds '<bos>'",
    ),
    (
        "special_token",
        "llama3",
        row(dominant=(*EN[:2], f"<|eot|>{EN[2]}")),
        "a dominant text holds '<|eot|>'",
    ),
    ("special_token", "chatml", row(system="<|begin|> uwe mwema"), "holds '<|begin|>'"),
    (
        "left_out_by_template",
        "no_system",
        row(system="uwe mwema kwa watu"),
        "the target system message is not in what the model sees",
    ),
]


@pytest.mark.parametrize(
    ("reason", "template", "odd", "detail"),
    AS_TOKENS,
    ids=[f"{r}-{i}" for i, (r, *_) in enumerate(AS_TOKENS)],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_what_becomes_of_texts_as_tokens_is_said(
    tmp_path, model_of, reason, template, odd, detail, held_out
):
    plain = row(target=tuple(f"{text} sana" for text in SW))
    found = (
        report(tmp_path, model_of(template), [plain], [odd])
        if held_out
        else report(tmp_path, model_of(template), [plain, odd])
    )
    (item,) = found["suspicious"]
    assert item["source"] == ("held_out.jsonl:1" if held_out else "rows.jsonl:2")
    assert item["reason"] == reason
    assert detail in item["detail"]


@pytest.mark.parametrize("held_out", [False, True])
def test_what_becomes_of_texts_as_tokens_is_said_before_training_too(tmp_path, model_of, held_out):
    odd = [row(target=(SW[0], f"{SW[1]} <|im_end|> {i}", f"<bos>{SW[2]}")) for i in range(60)]
    files = {
        name: [str(write_rows(tmp_path / f"{name}.jsonl", rows))]
        for name, rows in (("train", odd[held_out:2]), ("eval", odd))
    }
    lines = []
    config = Config(
        output_dir=str(tmp_path / "run"),
        model={"path": model_of("chatml")},
        data=files if held_out else {"train": files["eval"]},
    )
    load_inputs(config, lines.append)
    assert lines == [
        "What is trained on is not all as it was written: 50 special_token in 50 rows that were"
        " looked at; see mpo validate"
    ]
    write_rows(tmp_path / "eval.jsonl", [row()])
    load_inputs(
        config.model_copy(
            update={
                "data": config.data.model_copy(update={"train": tuple(files["eval"]), "eval": ()})
            }
        ),
        lines.append,
    )
    assert len(lines) == 1


def test_every_message_that_a_template_leaves_out_or_rewrites_is_said(tmp_path, model_of):
    """Whichever it is: each message in turn is the one that the template does not write."""
    turns = [
        ("system", "uwe mwema"),
        ("user", "habari gani"),
        ("assistant", "nzuri sana"),
        ("user", SW[0]),
    ]
    whole = row()
    whole["target"]["prompt"] = [{"role": role, "content": text} for role, text in turns]
    folder = save_model(tmp_path / "model", make_tokenizer("chatml"))
    template = (folder / "chat_template.jinja").read_text()
    for place, (role, _) in enumerate(turns):
        for change in (
            f"{{{{ '' if loop.index0 == {place} and messages[2:] else m['content'] }}}}",
            f"{{{{ m['content'][(1 if loop.index0 == {place} and messages[2:] else 0):] }}}}",
        ):
            (folder / "chat_template.jinja").write_text(
                template.replace("{{ m['content'] }}", change)
            )
            found = [
                item
                for item in report(tmp_path, str(folder), [whole])["suspicious"]
                if "target" in item["detail"]
            ]
            assert [item["reason"] for item in found] == ["left_out_by_template"]
            assert f"target {role} message" in found[0]["detail"]


def test_letters_that_the_tokenizer_cannot_write_are_said(tmp_path):
    tokenizer = make_tokenizer("chatml")
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["normalizer"] = {"type": "Lowercase"}
    tokenizer.backend_tokenizer.normalizer = (
        type(tokenizer.backend_tokenizer).from_str(json.dumps(values)).normalizer
    )
    found = report(
        tmp_path,
        str(save_model(tmp_path / "model", tokenizer)),
        [row(target=(SW[0], "Siwezi kukusaidia", SW[2]))],
    )
    assert ("rows.jsonl:1", "scored_differs") in said(found)
    assert any(
        "target chosen answer is 'siwezikukusaidia" in item["detail"]
        for item in found["suspicious"]
    )


@pytest.mark.parametrize("short", range(-1, 25))
def test_a_cut_answer_is_counted_and_no_difference(tmp_path, model_of, short):
    """Also where the cut goes through a letter, and where nothing is cut."""
    target = ("如何做", "不可以", "可以这么做")
    prompt = (
        len("<|im_start|>user\n")
        + len(target[0].encode())
        + len("<|im_end|>\n<|im_start|>assistant\n")
    )
    tokens = prompt - (len("<|im_start|>") + len("<|im_end|>") + len("<|im_start|>") - 3)
    lengths = [tokens + len(text.encode()) + 1 for text in target[1:]]
    limit = max(lengths) - short
    if limit <= tokens + len("可".encode()):
        return  # nothing that differs is left
    dominant = ("a", "b", "c")
    found = report(tmp_path, model_of("chatml"), [row("zh", target, dominant)], max_length=limit)
    assert found["languages"]["zh"]["cut"] == sum(length >= limit for length in lengths)
    assert found["languages"]["zh"]["target"]["max"] == min(max(lengths), limit)
    assert not {reason for _, reason in said(found)} - {"length_ratio", "wrong_language"}


LANGUAGES = [
    (
        "wrong_language",
        row(
            target=(
                "Comment puis-je faire cela, mon ami ?",
                "Je ne peux pas vous aider avec cela.",
                "Oui, faites comme ceci.",
            )
        ),
    ),
    (
        "wrong_language",
        row(
            dominant=(
                "Wie soll ich das machen, mein Freund?",
                "Dabei kann ich dir nicht helfen.",
                "Ja, mach es heute so.",
            )
        ),
    ),
    ("untranslated", row(target=(SW[0], EN[1] + " Sorry.", SW[2]))),
    ("untranslated", row(target=(EN[0], *SW[1:]))),
    ("wrong_script", row(target=("你好", SW[1] * 2, SW[2] * 2))),
    ("unknown_language", row("tlh")),
]


@pytest.mark.parametrize(
    ("reason", "odd"), LANGUAGES, ids=[f"{r}-{i}" for i, (r, _) in enumerate(LANGUAGES)]
)
@pytest.mark.parametrize("languages", [["zh"], ["sw", "fr"]])
def test_both_sides_are_in_their_language_whatever_is_offered_for_detection(
    tmp_path, model_of, reason, odd, languages
):
    found = report(
        tmp_path,
        model_of("chatml"),
        [row(target=tuple(f"{text} sana" for text in SW)), row(target=SW[:1] + SW[:0:-1]), odd],
        languages=languages,
    )
    assert said(found) - {("rows.jsonl:3", "length_ratio")} == {("rows.jsonl:3", reason)}


def test_rows_of_both_kinds_of_files_are_compared(tmp_path, model_of):
    other = row(target=tuple(f"{text} sana" for text in SW))
    found = report(
        tmp_path, model_of("chatml"), [row(), other, row()], [row(), row(target=SW[:1] + SW[:0:-1])]
    )
    assert said(found) == {
        ("rows.jsonl:3", "repeated"),
        ("held_out.jsonl:1", "repeated"),
        ("held_out.jsonl:1", "held_out_row_is_trained_on"),
    }
    assert said(report(tmp_path, model_of("chatml"), [row(), other], weights=[2])) == set()


def test_files_of_one_name_are_examined_row_by_row(tmp_path, model_of):
    """A row of the first is dropped as tokens, the row at the same place of the second is not, and
    one is in both."""
    for name in "ab":
        (tmp_path / name).mkdir()
    first = [row(target=(SW[0] * 20, *SW[1:])), row()]
    a, b = (
        str(write_rows(tmp_path / name / "rows.jsonl", rows))
        for name, rows in (("a", first), ("b", [row(), row(target=SW[:1] + SW[:0:-1])]))
    )
    config = Config(
        output_dir=str(tmp_path / "run"),
        model={"path": model_of("chatml")},
        data={"train": [a, b], "max_length": 200, "on_bad_row": "drop"},
    )
    inputs = load_inputs(config, print)
    assert [e.source for e in inputs.examples.train] == [
        "a/rows.jsonl:2",
        "b/rows.jsonl:1",
        "b/rows.jsonl:2",
    ]
    assert [d.source for d in inputs.examples.dropped] == ["a/rows.jsonl:1"]
    assert said(report_of(inputs)) == {("b/rows.jsonl:1", "repeated")}


def test_texts_longer_than_the_models_positions_are_refused_with_the_longest(tmp_path, model_of):
    rows = [row(), row(target=(SW[0], SW[1] * 5, SW[2])), row(target=(SW[0], SW[1] * 3, SW[2]))]
    whole = report(tmp_path, model_of("chatml"), rows)["languages"]["sw"]["target"]["max"]
    with pytest.raises(
        UserError,
        match=(
            r"2 rows are longer than the 100 positions of .*; the longest, rows.jsonl:2, has"
            rf" {whole} tokens. Set data.max_length=100"
        ),
    ):
        report(tmp_path, model_of("chatml", max_position_embeddings=100), rows)
    with pytest.raises(UserError, match=r"1 rows are longer than the 100 .*held_out.jsonl:1"):
        report(
            tmp_path, model_of("chatml", max_position_embeddings=100), [row(system="x")], rows[1:2]
        )
    assert (
        report(tmp_path, model_of("chatml", max_position_embeddings=100), rows, max_length=100)[
            "languages"
        ]["sw"]["cut"]
        == 2
    )
    stretched = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 100,
    }
    report(
        tmp_path, model_of("chatml", max_position_embeddings=100, rope_parameters=stretched), rows
    )


def test_measured_rows_are_spaced_evenly_over_each_language():
    none = TokenizedResponse((1, 2), 1)
    examples = [
        example_of(f"rows:{i}", language, none, none, none, none)
        for i, language in enumerate("aababbaaaa" + "aab" + "c")
    ]
    places = {
        language: [i for i, e in enumerate(examples) if e.language == language]
        for language in "abc"
    }
    assert [len(places[language]) for language in "abc"] == [9, 4, 1]
    for count, of_a, of_b in (
        (1, [0], [0]),
        (2, [0, 4], [0, 2]),
        (3, [0, 3, 6], [0, 1, 2]),
        (4, [0, 2, 4, 6], [0, 1, 2, 3]),
    ):
        chosen = [int(e.source.split(":")[1]) for e in _of_each_language(examples, count)]
        assert chosen == sorted(
            [*(places["a"][i] for i in of_a), *(places["b"][i] for i in of_b), *places["c"]]
        )
    ten = [example_of(f"rows:{i}", "sw", none, none, none, none) for i in range(10)]
    assert [e.source for e in _of_each_language(ten, 3)] == ["rows:0", "rows:3", "rows:6"]
    assert (
        _of_each_language(ten, 10)
        == _of_each_language(ten, 99)
        == _of_each_language(ten, None)
        == ten
    )


def test_native_rows_of_the_other_tests_are_read(tmp_path, model_of):
    assert report(tmp_path, model_of("chatml"), native_rows())["languages"]["zh"]["rows"] == 3
