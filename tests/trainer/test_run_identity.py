"""What makes it this run: its rows, its model and what it computes. Not the day, nor where files lie, nor how a run is watched."""

import itertools
import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHATML, make_tokenizer
from test_train import losses
from tiny import mpo_command, native_rows, save_model, write_rows
from transformers.utils import chat_template_utils

from mpo import reference, run_date
from mpo.config import Config, load_config
from mpo.errors import UserError
from mpo.output_folder import OutputFolder
from mpo.prepare import prepare
from mpo.run_date import dated, with_date

MONDAY, TUESDAY = datetime(2026, 3, 2, 23, 59, 58), datetime(2026, 3, 3, 0, 0, 1)
TODAY = "{{ '<|im_start|>' }}system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + CHATML


class Clock:
    """Stands for datetime where the package and transformers look at the time."""

    def __init__(self, monkeypatch):
        self.now_is, clock = MONDAY, self

        class Frozen(datetime):
            @classmethod
            def now(cls, tz=None):
                return clock.now_is

        monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
        monkeypatch.setattr(run_date, "datetime", Frozen)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model whose template prints the day."""
    root = tmp_path_factory.mktemp("identity")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TODAY
    save_model(root / "model", tokenizer)
    write_rows(root / "train.jsonl", native_rows(dominants=2))
    sections = {
        "output_dir": str(root / "run"),
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"]},
        "train": {"epochs": 4, "pairs_per_step": 2, "learning_rate": 3e-4},
        "zero": {"stage": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    return root


def begin(project, *overrides):
    """What `mpo train` does before it loads weights. Returns (whether it goes on, what it would train on)."""
    config = with_date(load_config(project / "run.yaml", list(overrides)))
    prepared = prepare(config, lambda line: None)
    folder = OutputFolder(Path(config.output_dir))
    model = reference.model_identity(prepared.model, prepared.tokenizer)
    return folder.open(config, reference.rows_digest(prepared.examples, prepared.measured), model), prepared


def test_a_run_of_yesterday_goes_on_today(project, tmp_path, clock):
    out = f"output_dir={tmp_path / 'run'}"
    goes_on, yesterday = begin(project, out)
    assert not goes_on
    assert "Today is 02 March 2026." in yesterday.tokenizer.decode(yesterday.examples[0].target_chosen.input_ids)
    clock.now_is = TUESDAY
    goes_on, today = begin(project, out)
    assert goes_on and today.examples == yesterday.examples
    assert begin(project, f"output_dir={tmp_path / 'second'}")[1].examples != yesterday.examples
    # Whatever else reads the rows of that run sees what it was trained on: validate, gaps, the dry run.
    config = load_config(project / "run.yaml", [out])
    assert prepare(config, lambda line: None).examples == yesterday.examples


def test_a_date_may_be_given(project, tmp_path, clock):
    _, given = begin(project, f"output_dir={tmp_path / 'run'}", "data.date=2026-03-03")
    assert "Today is 03 March 2026." in given.tokenizer.decode(given.examples[0].target_chosen.input_ids)
    clock.now_is = datetime(2030, 1, 1)
    assert begin(project, f"output_dir={tmp_path / 'run'}")[1].examples == given.examples
    with pytest.raises(UserError, match="the training or the measured rows differ"):
        begin(project, f"output_dir={tmp_path / 'run'}", "data.date=2026-03-04")


@pytest.mark.parametrize("place", ["store", ".store.parts"])
def test_the_date_of_a_shared_store_is_that_of_the_runs_that_use_it(project, tmp_path, clock, place):
    """Also of one whose build was interrupted: its finished parts are of that date."""
    (tmp_path / place).mkdir()
    (tmp_path / place / "manifest.json").write_text(json.dumps({"format": 2, "date": MONDAY.isoformat()}))
    clock.now_is = TUESDAY
    shared = [f"reference.store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}"]
    assert with_date(load_config(project / "run.yaml", shared)).data.date == MONDAY
    assert with_date(load_config(project / "run.yaml", shared[1:])).data.date == TUESDAY
    live = load_config(project / "run.yaml", [*shared, "reference.mode=live", "model.lora.rank=2"])
    assert with_date(live).data.date == TUESDAY


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"date": 5}', b'{"date": "yesterday"}', b"[]"])
def test_a_damaged_date_is_refused_and_not_replaced_by_today(project, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json.*(cannot be read|is none).*[Rr]estore"):
        with_date(load_config(project / "run.yaml", [f"output_dir={tmp_path}"]))


FORMATS = [
    "%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A", "%-d.%-m.%y", "%H:%M:%S", "%I:%M %p", "%j", "%U", "%c", "%x", "%X", "%F", "%T", "%D", "%e",
    "%^a", "%_d", "no directive", "%", "100 %", "%d%d", "", "day %d of '%B'", '"%Y"',
]  # fmt: skip
PLACES = {
    "plain": "{{ strftime_now(FORMAT) }}",
    "when defined": "{% if strftime_now is defined %}{{ strftime_now(FORMAT) }}{% else %}never{% endif %}",
    "in a macro": "{% macro head(x) %}{{ x }} {{ strftime_now(FORMAT) }}{% endmacro %}{{ head('on') }}",
    "in a loop": "{% for m in messages %}{% set day = strftime_now(FORMAT) %}{{ m['content'] }} {{ day }}{% endfor %}",
    "piece by piece": "{% set f = FORMAT %}{{ strftime_now(f[:1] ~ f[1:]) }}",
    "after a line break": "\n{{- 'x' }}\n  {{ strftime_now(FORMAT) }}\n",
    "set once": "{%- set date_string = strftime_now(FORMAT) %}\n{{- date_string }}",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_clock_prints_what_the_template_prints_on_that_day(place, clock):
    """transformers' own rendering, on that day, is the oracle."""
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    for each, day in itertools.product(FORMATS, (MONDAY, datetime(2027, 11, 30, 12, 5, 7))):
        template = PLACES[place].replace("FORMAT", json.dumps(each))
        clock.now_is = day
        expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        clock.now_is = datetime(1999, 1, 1)
        assert tokenizer.apply_chat_template(messages, chat_template=dated(template, day), tokenize=False) == expected, each


def test_a_template_without_a_date_is_left_as_it_is():
    assert dated(CHATML, MONDAY) == CHATML


# Every field, another value of it, and whether an interrupted run may go on with that.
FREE = {
    "output_dir", "log_every", "model.path", "model.revision", "data.train", "data.eval", "data.date", "reference.store", "zero.stage",
    "zero.offload_optimizer", "zero.offload_parameters", "zero.deepspeed", "checkpoint.every", "checkpoint.keep", "checkpoint.export",
    "track.tensorboard", "track.wandb", "track.comet", "track.project", "track.run_name",
}  # fmt: skip


def leaves(tree, where=""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    return "another" if isinstance(value, str) else ["another"] if isinstance(value, list) else {"more": 1} if value == {} else "other"


def changed(tree, field, value):
    copy = json.loads(json.dumps(tree))
    *path, last = field.split(".")
    section = copy
    for name in path:
        section = section[name]
    section[last] = value
    return copy


def test_every_field_is_part_of_a_run_or_known_not_to_be(project, tmp_path):
    """Generated from the configuration, so that a new field has to be thought of."""
    config = load_config(project / "run.yaml", ["model.lora.rank=4", "data.date=2026-03-02", f"output_dir={tmp_path / 'run'}"])
    OutputFolder(tmp_path / "run").open(config, "rows", {"weights": "a"})
    plain = config.model_dump(mode="json")
    fields = dict(leaves(plain))
    assert fields.keys() >= FREE - {"zero.deepspeed"} and len(fields) > 45
    for field, value in fields.items():
        mine = Config.model_construct(**plain)
        tree = changed(plain, field, another(value))
        object.__setattr__(mine, "model_dump", lambda mode, tree=tree: tree)
        object.__setattr__(mine, "data", config.data)
        folder = OutputFolder(tmp_path / "run")
        try:
            assert folder.open(mine, "rows", {"weights": "a"}) and field in FREE, field
        except UserError as error:
            assert field not in FREE and f"{field} is {value!r} there and {another(value)!r} here" in str(error), (field, error)
        finally:
            folder._claim.release()


@pytest.mark.parametrize(
    ("rows", "model", "message"),
    [
        ("other", {"weights": "a"}, "the training or the measured rows differ"),
        ("rows", {"weights": "b"}, "the model's weights is another one"),
        ("rows", {"weights": "a", "config": "c"}, "the model's config is another one"),
        ("rows", {"weights": "a", "attention": "eager"}, "model.attention is None there and 'eager' here"),
    ],
)
def test_other_rows_or_another_model_are_another_run(project, tmp_path, rows, model, message):
    """Whatever the reference: with reference.mode=live no store would notice."""
    config = load_config(project / "run.yaml", ["data.date=2026-03-02"])
    OutputFolder(tmp_path / "run").open(config, "rows", {"weights": "a"})
    with pytest.raises(UserError, match=f"holds another run: {message}"):
        OutputFolder(tmp_path / "run").open(config, rows, model)


def test_a_moved_project_goes_on(project, tmp_path, clock, monkeypatch):
    """Model and data by absolute path, by relative path, from elsewhere, under other names: the contents are the same."""
    shutil.copytree(project, tmp_path / "first")
    assert begin(tmp_path / "first", f"output_dir={tmp_path / 'run'}")[0] is False
    (tmp_path / "first").rename(tmp_path / "second")
    assert begin(tmp_path / "second", f"output_dir={tmp_path / 'run'}")[0]
    monkeypatch.chdir(tmp_path)
    assert begin(project, "output_dir=run", "data.train=[second/train.jsonl]", "model.path=second/model")[0]
    (tmp_path / "second" / "train.jsonl").rename(tmp_path / "second" / "rows.jsonl")
    os.utime(tmp_path / "second" / "rows.jsonl", (1, 1))
    assert begin(tmp_path / "second", f"output_dir={tmp_path / 'run'}", "data.train=[rows.jsonl]")[0]


ROW_CHANGES = {
    "a row twice": lambda rows: [*rows, rows[0]],
    "another order": lambda rows: rows[::-1],
    "another language": lambda rows: [{**rows[0], "language": "ja"}, *rows[1:]],
    "a row less": lambda rows: rows[:-1],
}


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_changed_rows_are_another_run(project, tmp_path, clock, change):
    """Also where the sequences are the same ones, in the same order of appearance: a repeated row makes other steps."""
    rows = native_rows(dominants=2)
    write_rows(tmp_path / "rows.jsonl", rows)
    options = [f"output_dir={tmp_path / 'run'}", f"data.train=[{tmp_path / 'rows.jsonl'}]"]
    begin(project, *options)
    write_rows(tmp_path / "rows.jsonl", ROW_CHANGES[change](rows))
    with pytest.raises(UserError, match="the training or the measured rows differ"):
        begin(project, *options)


def go(command, project, *overrides, expect=0):
    result = mpo_command(command, str(project / "run.yaml"), *overrides)
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


def test_precompute_and_then_train_in_one_folder(project):
    """Precompute claims the folder as train does: for this run, so that train goes on, and no other one."""
    out = project / "both"
    into = f"output_dir={out}"
    go("precompute", project, into, "data.date=2020-02-29")  # six years ago, as far as the template is concerned
    assert (out / "config.json").is_file() and (out / "reference" / "values.safetensors").is_file()
    assert "holds another run: loss.pool" in go("precompute", project, into, "loss.pool=all", expect=2)
    text = go("train", project, into, "train.max_steps=2", expect=2)
    assert "holds another run: train.max_steps is None there and 2 here" in text
    text = go("train", project, into)
    assert "Reference" in text and "Reference store:" not in text  # found, not built
    assert json.loads((out / "config.json").read_text())["date"] == "2020-02-29T00:00:00"
    assert "Reference store" in go("precompute", project, into)  # of a finished run it is there already
    photos = project / "photos"
    photos.mkdir()
    (photos / "beach.jpg").write_bytes(b"sun")
    assert "is not empty and holds no MPO run" in go("precompute", project, f"output_dir={photos}", expect=2)
    assert [p.name for p in photos.iterdir()] == ["beach.jpg"]


def test_what_a_step_draws_is_the_same_after_an_interruption(project):
    """Dropout on the adapters: the random state is part of neither checkpoint nor clock."""
    options = ["model.lora.rank=2", "model.lora.dropout=0.5", "checkpoint.every=2", "checkpoint.keep=9", "checkpoint.export=false"]
    out = project / "dropout"
    go("train", project, f"output_dir={out}", *options)
    whole = losses(out)
    for name in ("result.json", "result.png"):
        (out / name).unlink()
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.name > "step-00000004":
            shutil.rmtree(folder)
    assert "4 of 8 steps done" in go("train", project, f"output_dir={out}", *options)
    assert torch.equal(losses(out), whole)
