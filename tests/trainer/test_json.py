"""JSON: valid for every reader whatever the numbers and texts are, and in one place of the
package."""

import ast
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import mpo
from mpo.runtime import files
from mpo.runtime.files import not_finite, to_json, write_json


def strict(text):
    """Parses JSON as readers other than Python's do, which take no NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(written, value):
    if isinstance(value, dict):
        return written.keys() == value.keys() and all(
            same(written[key], value[key]) for key in value
        )
    if isinstance(value, list):
        return len(written) == len(value) and all(map(same, written, value))
    return (
        written is None
        if isinstance(value, float) and not math.isfinite(value)
        else written == value
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_whatever_goes_in_comes_out_as_json(value, ascii_only, indent):
    text = to_json(value, ascii_only=ascii_only, indent=indent)
    assert same(strict(text), value)
    assert not ascii_only or text.isascii()
    text.encode("utf-8")


@given(VALUES)
def test_places_are_named_just_where_there_are_nulls_instead(value):
    try:
        json.dumps(value, allow_nan=False)
        assert not_finite(value) == []
    except ValueError:
        assert not_finite(value) != []


def test_places_of_what_is_no_number():
    report = {
        "languages": {"sw": {"distance": [1.0, math.nan]}},
        "l2": -math.inf,
        "n": 3,
        "all": {"gap": 0.5},
    }
    assert not_finite(report) == ["languages.sw.distance.1", "l2"]
    assert (
        to_json(report)
        == '{"languages": {"sw": {"distance": [1.0, null]}}, "l2": null, "n": 3, "all": {"gap":'
        " 0.5}}"
    )


def test_json_is_made_in_one_place_of_the_package():
    """Elsewhere only where it is hashed, and there without a number that is none."""
    offenders = []
    for path in sorted(Path(mpo.__file__).parent.rglob("*.py")):
        if path == Path(files.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                if not any(
                    keyword.arg == "allow_nan" and ast.unparse(keyword.value) == "False"
                    for keyword in node.keywords
                ):
                    offenders.append(f"{path.name}:{node.lineno}")
    assert offenders == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "new.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.parametrize("command", ["train", "gaps", "dry-run"])
def test_numbers_that_are_none_are_null_and_said_aloud(tmp_path, monkeypatch, command):
    """What a command reports of a model that gives NaN, whatever the command."""
    from mpo.commands.app import app
    from mpo.evaluation import comparison
    from mpo.models import inputs
    from mpo.training import dry_run, train

    report = {
        "beta": 1.0,
        "models": {"m": {"sw": {"target_gap": math.nan, "interval": (math.nan, math.inf)}}},
    }
    monkeypatch.setattr(dry_run, "describe", lambda config: report)
    monkeypatch.setattr(train, "train", lambda config: report)
    made = SimpleNamespace(as_dict=lambda: report)
    monkeypatch.setattr(comparison, "compare_models", lambda *_: made)
    monkeypatch.setattr(inputs, "load_inputs", lambda *_: None)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: m}}\ndata: {{train: [rows.jsonl]}}\n"
    )
    arguments = {
        "train": ["train"],
        "dry-run": ["train", "--dry-run"],
        "gaps": ["gaps", "--model", "m"],
    }[command]
    done = CliRunner().invoke(app, [*arguments, str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    assert strict(done.stdout)["models"]["m"]["sw"] == {
        "target_gap": None,
        "interval": [None, None],
    }
    assert "WARNING: models.m.sw.target_gap, models.m.sw.interval.0" in done.stderr
