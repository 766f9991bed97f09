"""What makes it this run: its rows, its model and what it computes. Not the day, nor where files
lie, nor how a run is watched."""

import itertools
import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from conftest import CHATML, make_tokenizer
from tiny import commands, mpo_process, native_rows, save_model, write_rows
from transformers.utils import chat_template_utils

from mpo.config import Config, load_config
from mpo.data import run_date
from mpo.data.run_date import dated, with_date
from mpo.models.inputs import load_inputs
from mpo.runtime.claims import Claim
from mpo.runtime.errors import UserError
from mpo.training import reference
from mpo.training.run_folder import OutputFolder

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
    """What `mpo train` does before it loads weights. Returns (whether it goes on, what it would
    train on)."""
    config = with_date(load_config(project / "run.yaml", list(overrides)))
    inputs = load_inputs(config, lambda line: None)
    folder = OutputFolder(Path(config.output_dir))
    model = reference.model_identity(inputs.model, inputs.tokenizer)
    return (
        folder.open(
            config, reference.rows_digest(inputs.examples.train, inputs.examples.measured), model, 1
        ),
        inputs,
    )


def test_a_run_of_yesterday_goes_on_today(project, tmp_path, clock):
    out = f"output_dir={tmp_path / 'run'}"
    goes_on, yesterday = begin(project, out)
    assert not goes_on
    assert "Today is 02 March 2026." in yesterday.tokenizer.decode(
        yesterday.examples.train[0].target.chosen.input_ids
    )
    clock.now_is = TUESDAY
    goes_on, today = begin(project, out)
    assert goes_on and today.examples.train == yesterday.examples.train
    assert (
        begin(project, f"output_dir={tmp_path / 'second'}")[1].examples.train
        != yesterday.examples.train
    )
    # Whatever else reads the rows of that run sees what it was trained on: validate, gaps, the dry
    # run.
    config = load_config(project / "run.yaml", [out])
    assert load_inputs(config, lambda line: None).examples.train == yesterday.examples.train


def test_a_date_may_be_given(project, tmp_path, clock):
    _, given = begin(project, f"output_dir={tmp_path / 'run'}", "data.date=2026-03-03")
    assert "Today is 03 March 2026." in given.tokenizer.decode(
        given.examples.train[0].target.chosen.input_ids
    )
    clock.now_is = datetime(2030, 1, 1)
    assert (
        begin(project, f"output_dir={tmp_path / 'run'}")[1].examples.train == given.examples.train
    )
    with pytest.raises(UserError, match="the training or the measured rows differ"):
        begin(project, f"output_dir={tmp_path / 'run'}", "data.date=2026-03-04")


@pytest.mark.parametrize("place", ["store", ".store.parts"])
def test_the_date_of_a_shared_store_is_that_of_the_runs_that_use_it(
    project, tmp_path, clock, place
):
    """Also of one whose build was interrupted: its finished parts are of that date."""
    (tmp_path / place).mkdir()
    (tmp_path / place / "manifest.json").write_text(
        json.dumps({"format": 2, "date": MONDAY.isoformat()})
    )
    clock.now_is = TUESDAY
    shared = [f"reference.store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}"]
    assert with_date(load_config(project / "run.yaml", shared)).data.date == MONDAY
    assert with_date(load_config(project / "run.yaml", shared[1:])).data.date == TUESDAY
    live = load_config(project / "run.yaml", [*shared, "reference.mode=live", "model.lora.rank=2"])
    assert with_date(live).data.date == TUESDAY


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"date": 5}', b'{"date": "yesterday"}', b"[]"]
)
def test_a_damaged_date_is_refused_and_not_replaced_by_today(project, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json.*(cannot be read|is none).*[Rr]estore"):
        with_date(load_config(project / "run.yaml", [f"output_dir={tmp_path}"]))


FORMATS = [
    "%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%A", "%-d.%-m.%y",
    "%H:%M:%S", "%I:%M %p", "%j", "%U",
    "%c", "%x", "%X", "%F", "%T", "%D", "%e", "%^a", "%_d",
    "no directive", "%", "100 %", "%d%d", "", "day %d of '%B'", '"%Y"',
]  # fmt: skip
PLACES = {
    "plain": "{{ strftime_now(FORMAT) }}",
    "when defined": (
        "{% if strftime_now is defined %}{{ strftime_now(FORMAT) }}{% else %}never{% endif %}"
    ),
    "in a macro": (
        "{% macro head(x) %}{{ x }} {{ strftime_now(FORMAT) }}{% endmacro %}{{ head('on') }}"
    ),
    "in a loop": (
        "{% for m in messages %}{% set day = strftime_now(FORMAT) %}{{ m['content'] }} {{ day }}{%"
        " endfor %}"
    ),
    "piece by piece": "{% set f = FORMAT %}{{ strftime_now(f[:1] ~ f[1:]) }}",
    "after a line break": "\n{{- 'x' }}\n  {{ strftime_now(FORMAT) }}\n",
    "set once": "{%- set date_string = strftime_now(FORMAT) %}\n{{- date_string }}",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_clock_prints_what_the_template_prints_on_that_day(place, clock):
    """transformers' own rendering, on that day, is the oracle."""
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    formats = FORMATS if place == "plain" else FORMATS[:2]
    for each, day in itertools.product(formats, (MONDAY, datetime(2027, 11, 30, 12, 5, 7))):
        template = PLACES[place].replace("FORMAT", json.dumps(each))
        clock.now_is = day
        expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        clock.now_is = datetime(1999, 1, 1)
        assert (
            tokenizer.apply_chat_template(
                messages, chat_template=dated(template, day), tokenize=False
            )
            == expected
        ), each


def test_a_template_without_a_date_is_left_as_it_is():
    assert dated(CHATML, MONDAY) == CHATML


# Every field, another value of it, and whether an interrupted run may go on with that.
FREE = {
    "output_dir", "log_every",
    "model.path", "model.revision",
    "data.train", "data.eval", "data.date",
    "reference.store",
    "zero.stage", "zero.offload_optimizer", "zero.offload_parameters", "zero.deepspeed",
    "checkpoint.every", "checkpoint.keep", "checkpoint.export",
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
    return (
        "another"
        if isinstance(value, str)
        else ["another"]
        if isinstance(value, list)
        else {"more": 1}
        if value == {}
        else "other"
    )


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
    config = load_config(
        project / "run.yaml",
        ["model.lora.rank=4", "data.date=2026-03-02", f"output_dir={tmp_path / 'run'}"],
    )
    OutputFolder(tmp_path / "run").open(config, "rows", {"weights": "a"}, 1)
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
            assert folder.open(mine, "rows", {"weights": "a"}, 1) and field in FREE, field
        except UserError as error:
            assert (
                field not in FREE
                and f"{field} is {value!r} there and {another(value)!r} here" in str(error)
            ), (field, error)
        finally:
            folder._claim.release()


@pytest.mark.parametrize(
    ("rows", "model", "message"),
    [
        ("other", {"weights": "a"}, "the training or the measured rows differ"),
        ("rows", {"weights": "b"}, "the model's weights is another one"),
        ("rows", {"weights": "a", "config": "c"}, "the model's config is another one"),
        (
            "rows",
            {"weights": "a", "attention": "eager"},
            "model.attention is None there and 'eager' here",
        ),
    ],
)
def test_other_rows_or_another_model_are_another_run(project, tmp_path, rows, model, message):
    """Whatever the reference: with reference.mode=live no store would notice."""
    config = load_config(project / "run.yaml", ["data.date=2026-03-02"])
    OutputFolder(tmp_path / "run").open(config, "rows", {"weights": "a"}, 1)
    with pytest.raises(UserError, match=f"holds another run: {message}"):
        OutputFolder(tmp_path / "run").open(config, rows, model, 1)


def test_a_moved_project_goes_on(project, tmp_path, clock, monkeypatch):
    """Model and data by absolute path, by relative path, from elsewhere, under other names: the
    contents are the same."""
    shutil.copytree(project, tmp_path / "first")
    assert begin(tmp_path / "first", f"output_dir={tmp_path / 'run'}")[0] is False
    (tmp_path / "first").rename(tmp_path / "second")
    assert begin(tmp_path / "second", f"output_dir={tmp_path / 'run'}")[0]
    monkeypatch.chdir(tmp_path)
    assert begin(
        project, "output_dir=run", "data.train=[second/train.jsonl]", "model.path=second/model"
    )[0]
    (tmp_path / "second" / "train.jsonl").rename(tmp_path / "second" / "rows.jsonl")
    os.utime(tmp_path / "second" / "rows.jsonl", (1, 1))
    assert begin(tmp_path / "second", f"output_dir={tmp_path / 'run'}", "data.train=[rows.jsonl]")[
        0
    ]


ROW_CHANGES = {
    "a row twice": lambda rows: [*rows, rows[0]],
    "another order": lambda rows: rows[::-1],
    "another language": lambda rows: [{**rows[0], "language": "ja"}, *rows[1:]],
    "a row less": lambda rows: rows[:-1],
}


@pytest.mark.parametrize("change", ROW_CHANGES)
def test_changed_rows_are_another_run(project, tmp_path, clock, change):
    """Also where the sequences are the same ones, in the same order of appearance: a repeated row
    makes other steps."""
    rows = native_rows(dominants=2)
    write_rows(tmp_path / "rows.jsonl", rows)
    options = [f"output_dir={tmp_path / 'run'}", f"data.train=[{tmp_path / 'rows.jsonl'}]"]
    begin(project, *options)
    write_rows(tmp_path / "rows.jsonl", ROW_CHANGES[change](rows))
    with pytest.raises(UserError, match="the training or the measured rows differ"):
        begin(project, *options)


def test_precompute_and_then_train_in_one_folder(project):
    """Precompute claims the folder as train does: for this run, so that train goes on, and no other
    one."""
    out, photos = project / "both", project / "photos"
    photos.mkdir()
    (photos / "beach.jpg").write_bytes(b"sun")
    run, into = str(project / "run.yaml"), f"output_dir={out}"
    steps = [
        # years ago, as far as the template is concerned
        ["mpo", "precompute", run, into, "data.date=2020-02-29"],
        ["look", str(out)],
        ["mpo", "precompute", run, into, "loss.pool=all"],
        ["mpo", "train", run, into, "train.max_steps=2"],
        ["mpo", "train", run, into],
        ["mpo", "precompute", run, into],
        ["mpo", "precompute", run, f"output_dir={photos}"],
        ["mpo", "precompute", run, f"output_dir={project / 'third'}", f"reference.store={photos}"],
    ]
    first, left, other_pool, shorter, trained, again, in_photos, over_photos = commands(
        steps, project
    )
    assert first["status"] == 0 and {"config.json", "reference/values.safetensors"} <= set(
        left["files"]
    ), first["text"]
    assert other_pool["status"] == 2 and "holds another run: loss.pool" in other_pool["text"]
    assert (
        shorter["status"] == 2
        and "holds another run: train.max_steps is None there and 2 here" in shorter["text"]
    )
    # found, not built
    assert trained["status"] == 0 and "Reference store:" not in trained["text"], trained["text"]
    assert json.loads((out / "config.json").read_text())["date"] == "2020-02-29T00:00:00"
    # of a finished run it is there already
    assert again["status"] == 0 and "Reference store:" in again["text"]
    assert in_photos["status"] == 2 and "is not empty and holds no MPO run" in in_photos["text"]
    assert over_photos["status"] == 2 and "holds no whole reference store" in over_photos["text"]
    assert [path.name for path in photos.iterdir()] == ["beach.jpg"]


def test_what_a_step_draws_is_the_same_after_an_interruption(project):
    """Dropout on the adapters: the random state is part of neither checkpoint nor clock."""
    options = [
        "model.lora.rank=2",
        "model.lora.dropout=0.5",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "checkpoint.export=false",
    ]
    out = project / "dropout"
    train = ["mpo", "train", str(project / "run.yaml"), f"output_dir={out}", *options]
    lost = ["result.json", "result.png", "checkpoints/step-00000006", "checkpoints/step-00000008"]
    steps = [
        train,
        ["look", str(out)],
        *(["damage", str(out / name), "absent"] for name in lost),
        train,
        ["look", str(out)],
    ]
    first, whole, *_, second, after = commands(steps, project)
    assert first["status"] == second["status"] == 0 and "4 of 8 steps done" in second["text"], (
        first["text"] + second["text"]
    )
    assert len(whole["steps"]) == 8 and after == {**whole, "files": after["files"]}


@pytest.mark.slow
def test_two_commands_that_want_one_store_at_once(project, tmp_path):
    """Both wait until a third lets go of it; then one builds it and the other finds it."""
    store = tmp_path / "stores" / "shared"
    third = Claim(tmp_path / "stores" / ".shared.lock")
    assert third.take() is None
    options = ["precompute", str(project / "run.yaml"), f"reference.store={store}"]
    processes = [
        mpo_process(*options, f"output_dir={tmp_path / name}", stderr=subprocess.STDOUT)
        for name in ("one", "two")
    ]
    said = [
        next(line for line in process.stdout if "Waiting for it" in line) for process in processes
    ]
    assert all("builds the reference store" in line for line in said)
    third.release()
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert sorted("Reference store: " in text and "sequences in" in text for text in texts) == [
        False,
        True,
    ], texts
    left = sorted(re.sub("-[0-9a-f]{16}", "-*", path.name) for path in store.parent.iterdir())
    assert left == [".shared-gaps-*.lock", ".shared.lock", "shared", "shared-gaps-*"]
