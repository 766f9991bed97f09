"""Every field of both configurations with every kind of value: it is taken as it was meant, or
refused with the field's name."""

import dataclasses
import datetime
import math
import types
import typing

import pytest
import yaml
from pydantic import BaseModel

from mpo.config import Config, load_config
from mpo.data_build.config import BuildConfig, load_build_config
from mpo.losses import find, named
from mpo.runtime.errors import UserError
from mpo.runtime.files import not_finite, to_json
from mpo.training.engine import deepspeed_settings, learning_rate

RUN = {"output_dir": "out", "model": {"path": "somewhere"}, "data": {"train": ["rows.jsonl"]}}
BUILD = {
    "input": ["pairs.jsonl"],
    "output": "rows.jsonl",
    "languages": ["sw"],
    "dominant_language": "en",
    "translator": {"file": {"path": "translations.jsonl"}},
}
VALUES = [
    *(
        None,
        True,
        False,
        "",
        " ",
        "x",
        "no",
        "x" * 5000,
        "a\0b",
        "\ud800",
        "nan",
        "1e400",
        "[a]",
        "${nowhere}",
    ),
    *(-1, 0, 1, 2**31, 2**63, 10**30, -(10**30)),
    *(0.5, 1.5, -0.5, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(
        [],
        {},
        [[]],
        [None],
        [1, 2, 3],
        [True],
        [math.nan, 0.5],
        [1, 1],
        [0.9, math.inf],
        ["a\0b"],
        {"x": 1},
        {"x": math.inf},
        {1: 2},
    ),
    datetime.date(2026, 1, 2),
]


def sections(kind, path=()):
    """(path, field) of every field, those of optional sections too."""
    for name, field in kind.model_fields.items():
        yield (*path, name), field
        parts = (
            typing.get_args(field.annotation)
            if isinstance(field.annotation, types.UnionType)
            else (field.annotation,)
        )
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part, (*path, name))


FIELDS = {
    (kind.__name__, ".".join(path)): (base, load)
    for kind, base, load in ((Config, RUN, load_config), (BuildConfig, BUILD, load_build_config))
    for path, _ in sections(kind)
}


# Those of other losses, which their sections alone have.
FIELDS |= {
    (name, f"loss.{field.name}"): ({**RUN, "loss": {"name": name}}, load_config)
    for name in (*named(), "own_losses:Lift")
    if name not in ("mpo", "kto")
    for field in dataclasses.fields(find(name))
}


REQUIRED = {
    "seq2seq": {"path": "x"},
    "server": {"base_url": "http://x", "model": "x"},
    "file": {"path": "x"},
    "chosen_from_model": {"path": "x"},
}


def with_value(base, path, value):
    tree = yaml.safe_load(yaml.safe_dump(base))
    place = tree
    for name in path[:-1]:
        if name in ("seq2seq", "server", "file") and name not in place:
            place.clear()  # one translator at a time
        place = place.setdefault(name, dict(REQUIRED.get(name, {})))
    place[path[-1]] = value
    return tree


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_every_value_of_every_field_is_taken_or_refused_by_name(tmp_path, kind, field):
    base, load = FIELDS[kind, field]
    path = tmp_path / "run.yaml"
    for value in VALUES:
        path.write_text(
            yaml.safe_dump(with_value(base, field.split("."), value), allow_unicode=False),
            encoding="utf-8",
        )
        try:
            config = load(path)
        except UserError as error:
            where = str(error).replace(str(path), "")
            assert (
                field.rsplit(".", 1)[-1] in where
                or "does not resolve" in where
                or "no readable YAML" in where
            ), (value, where)
            assert len(where) < 8000
            continue
        assert not_finite(config.model_dump()) == [], value
        assert all(abs(number) < 2**63 for number in _integers(config.model_dump())), value
        assert to_json(config.model_dump(mode="json"))
        meant = config
        for name in field.split("."):
            meant = getattr(meant, name)
        assert (
            not isinstance(value, bool) or meant == value or (value is False and "no" in str(meant))
        ), (value, meant)
        if isinstance(config, Config):
            _derived(config)


def _integers(value):
    if isinstance(value, dict | list | tuple):
        return [
            number
            for part in (value.values() if isinstance(value, dict) else value)
            for number in _integers(part)
        ]
    return [value] if isinstance(value, int) else []


def _derived(config):
    """What a run computes from the numbers of its configuration before it reads anything."""
    rates = [learning_rate(config.train, step, 10) for step in range(10)]
    assert all(math.isfinite(rate) and 0 <= rate <= config.train.learning_rate for rate in rates)
    try:
        deepspeed_settings(config)
    except UserError as error:
        assert "zero." in str(error) or "track." in str(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0"),
        ("train.seed=4294967296", "train.seed: Input should be less than 4294967296"),
        ("train.adam_betas=[0.9,1]", "train.adam_betas.1: Input should be less than 1"),
        ("train.learning_rate=.inf", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("loss.beta=.nan", "loss.beta"),
        ("train.epochs=.inf", "train.epochs"),
        ("data.weights=[.inf]", "data.weights.0"),
        ("data.train.0=x", "does not resolve"),
        ("data.train.0.x=y", "does not resolve"),
        ("model=x", "model: "),
        ("=x", "is not of the form"),
        (
            "train.pairs_per_step=true",
            "train.pairs_per_step: true is no value of it. YAML takes yes",
        ),
        ("train.pairs_per_step=" + "9" * 5000, "does not resolve|train.pairs_per_step"),
        (
            "train.max_steps=99999999999",
            "train.max_steps: Input should be less than or equal to 2147483647",
        ),
        ("output_dir=2026", "output_dir: Input should be a valid string"),
        ("model.path=[", "does not resolve"),
        ("loss={beta: 1, beta: 2}", "does not resolve"),
        ("zero.deepspeed={x: .inf}", "zero.deepspeed: x is no finite number"),
    ],
)
def test_values_that_ended_in_a_traceback_or_in_nothing(tmp_path, override, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("[", r"\[")):
        load_config(tmp_path / "run.yaml", [override])


@pytest.mark.parametrize(
    "text",
    [
        "? null\n: 1\noutput_dir: x",
        "null: 1",
        "1: 2",
        "{[a]: 1}",
        "output_dir: x\noutput_dir: y",
        "model: !!python/name:os.system x",
        "a: &a [*a]",
        "[" * 3000,
        "x: " * 3000,
        "{a: " * 3000,
        "seed: " + "9" * 5000,
        "\t",
        "output_dir: 'x",
        "---\na: 1\n---\nb: 2",
        "\ufeffoutput_dir: x",
        "<html><body>not found</body></html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    ],
)
def test_any_text_for_a_configuration(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    for load in (load_config, load_build_config):
        with pytest.raises(UserError, match=r"run\.yaml"):
            load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"\x00" * 100, bytes(range(256)), b"[1, 2]", b"null", b"3"]
)
def test_any_bytes_for_a_configuration(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_batch_size": 8}, "has no effect on a run. Remove it and set train.pairs_per_step"),
        ({"optimizer": {"type": "Adam"}}, "set train.learning_rate, train.adam_betas"),
        ({"scheduler": {"type": "WarmupLR"}}, "set train.schedule"),
        ({"fp16": {"enabled": True}}, "set model.dtype"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
        ({"curriculum_learning": {"enabled": True}}, "is no setting that a run passes on"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 1}},
            "zero.deepspeed.zero_optimization: reduce_bucket_sise",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": -1}},
            "reduce_bucket_size Input should be greater than",
        ),
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"gradient_accumulation_steps": 4}, "contradicts 1"),
    ],
)
def test_settings_of_deepspeed_that_would_be_ignored_are_refused(tmp_path, extra, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "zero": {"deepspeed": extra}}))
    with pytest.raises(UserError, match=message):
        deepspeed_settings(load_config(tmp_path / "run.yaml"))


def test_settings_of_deepspeed_that_a_run_heeds_are_passed_on(tmp_path):
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "zero": {"deepspeed": extra}}))
    settings = deepspeed_settings(load_config(tmp_path / "run.yaml"))
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000


def test_names_of_files_hold_from_any_folder(tmp_path, monkeypatch):
    """Beside the configuration, in the working folder or in the home folder: the configuration then
    has the whole path."""
    for folder in ("recipes", "work", "home"):
        (tmp_path / folder).mkdir()
    for name in ("recipes/beside.jsonl", "work/here.jsonl", "home/mine.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "work" / "model").mkdir()
    (tmp_path / "recipes" / "run.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    names = "data.train=[beside.jsonl,here.jsonl,~/mine.jsonl,hf:owner/name]"
    for path in ("../recipes/run.yaml", tmp_path / "recipes" / "run.yaml"):
        config = load_config(
            path, [names, "model.path=model", "output_dir=~/run", "reference.store=stores/a"]
        )
        expected = [
            str(tmp_path / name)
            for name in ("recipes/beside.jsonl", "work/here.jsonl", "home/mine.jsonl")
        ]
        assert list(config.data.train) == [*expected, "hf:owner/name"]
        assert config.model.path == str(tmp_path / "work" / "model")
        assert config.output_dir == str(tmp_path / "home" / "run")
        assert config.reference.store == str(tmp_path / "work" / "stores" / "a")
    assert load_config("../recipes/run.yaml", ["model.path=owner/name"]).model.path == "owner/name"


def test_without_a_home_folder(tmp_path, monkeypatch):
    import pathlib

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.raises(UserError, match="Set HOME, or write the whole path"):
        load_config(tmp_path / "run.yaml", ["output_dir=~/run"])
