"""The configuration: what loads, what is refused, and with which words."""

from pathlib import Path

import pytest

from mpo.config import load_config
from mpo.runtime.errors import UserError

MINIMAL = "output_dir: out\nmodel: {path: somewhere}\ndata: {train: [rows.jsonl]}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, ["loss.beta=1.5", "train.max_steps=3", "data.train=[a.jsonl, b.jsonl]"]
    )
    assert (config.loss.beta, config.train.max_steps, config.data.train) == (
        1.5,
        3,
        ("a.jsonl", "b.jsonl"),
    )
    assert config.loss.retention_weight == 1.0


def test_files_beside_the_configuration_are_found(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    config = load_config(write(tmp_path, MINIMAL), ["data.eval=[elsewhere.jsonl]"])
    assert config.data.train == (str(tmp_path / "rows.jsonl"),)
    assert config.data.eval == ("elsewhere.jsonl",)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "loss: {betta: 1}", [], "loss.betta: unknown field; did you mean 'beta'?"),
        (MINIMAL + "zzz: 1", [], "zzz: unknown field; known fields: output_dir, model, data"),
        (MINIMAL, ["trian.seed=1"], "trian: unknown field; did you mean 'train'?"),
        (MINIMAL, ["loss.beta=-1"], "loss.beta: Input should be greater than 0 (given: -1)"),
        (MINIMAL, ["loss.beta=high"], "loss.beta: Input should be a valid number"),
        (MINIMAL, ["model.dtype=float16"], "model.dtype: Input should be 'bfloat16' or 'float32'"),
        (MINIMAL, ["zero.stage=4"], "zero.stage: Input should be 0, 1, 2 or 3"),
        (MINIMAL, ["data.train=[]"], "data.train"),
        (MINIMAL, ["data.max_length=1"], "data.max_length"),
        (MINIMAL, ["train.pairs_per_micro_batch=9"], "larger than train.pairs_per_step (8)"),
        (MINIMAL, ["loss.beta"], "is not of the form section.field=value"),
        ("model: {path: x}\ndata: {train: [a]}", [], "output_dir: missing"),
        ("model: [", [], "is no readable YAML"),
        ("- a\n- b", [], "holds no mapping of sections"),
        ("just a word", [], "unknown field"),
        ("", [], "output_dir: missing"),
        ("output_dir: ${nowhere}", [], "does not resolve"),
    ],
)
def test_refused(tmp_path, text, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text), overrides)
    assert message in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No configuration file at"):
        load_config(tmp_path / "none.yaml")


def test_yaml_tags_cannot_run_code(tmp_path):
    with pytest.raises(UserError):
        load_config(write(tmp_path, "output_dir: !!python/object/apply:os.getcwd []"))


@pytest.mark.parametrize(
    "name", sorted(p.name for p in (Path(__file__).parents[2] / "mpo" / "recipes").glob("*.yaml"))
)
def test_shipped_recipes_are_valid(name):
    config = load_config(Path(__file__).parents[2] / "mpo" / "recipes" / name)
    if name == "demo.yaml":
        assert all(Path(file).is_file() for file in (*config.data.train, *config.data.eval))


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").output_dir == "runs/demo"
    with pytest.raises(UserError, match="demo, gemma-2-9b"):
        load_config("dmeo")
