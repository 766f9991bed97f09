"""`mpo fields` and `mpo recipes`: every field with what it takes, its default and its meaning, on
any terminal."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny import mpo_command

from mpo.commands.reference import _chosen, _show_fields
from mpo.config import Config, load_config, recipes
from mpo.data_build.config import BuildConfig
from mpo.runtime.fields import describe
from mpo.runtime.settings import Section

ROOT = Path(__file__).parents[2]


def all_fields(kind):
    return [field for section in describe(kind) for field in section.fields]


@pytest.mark.parametrize("kind", [Config, BuildConfig])
def test_every_field_has_its_type_its_default_and_a_meaning(kind):
    """Of its own: no two say the same, but for what two sections share."""
    for section in describe(kind):
        assert section.about and section.about.endswith((".", "2505.16869")), section.name
    for field in all_fields(kind):
        assert field.type and field.about.endswith("."), field.name
        holder, *path = kind, *field.name.split(".")
        for name in path[:-1]:
            parts = holder.model_fields[name].annotation
            holder, *_ = [
                part
                for part in (parts, *getattr(parts, "__args__", ()))
                if isinstance(part, type) and issubclass(part, Section)
            ]
        own = holder.model_fields[path[-1]]
        assert field.required == own.is_required()
        if not field.required:
            assert field.default == own.get_default(call_default_factory=True)


def test_types_and_limits_are_in_words():
    words = {field.name: field.type for kind in (Config, BuildConfig) for field in all_fields(kind)}
    assert {
        "output_dir": "text, not empty",
        "model.quantize": "nf4 | int8 | null",
        "model.activation_checkpointing": "true | false | selective",
        "model.lora.dropout": "number, >= 0, < 1",
        "model.lora.target_modules": "all-linear | list of text",
        "data.train": "list of text, not empty",
        "data.eval": "list of text",
        "data.date": "date | null",
        "data.max_length": "integer, >= 2, <= 2^31-1",
        "loss.beta": "number, > 0, <= 1e6",
        "loss.chunk_bytes": "integer | null, >= 1, < 2^63",
        "train.adam_betas": "2 x number, >= 0, < 1",
        "train.seed": "integer, >= 0, < 2^32",
        "zero.stage": "0 | 1 | 2 | 3",
        "zero.deepspeed": "mapping",
        "translator.seq2seq.codes": "mapping",
    }.items() <= words.items()


@pytest.mark.parametrize("columns", [40, 80, 140])
@pytest.mark.parametrize("wanted", [None, "build"])
def test_they_fit_the_terminal(columns, wanted):
    out = Console(file=io.StringIO(), width=columns)
    sections = _chosen(wanted)
    _show_fields(sections, out)
    text = out.file.getvalue()
    if columns >= 80:
        assert max(map(len, text.splitlines())) <= columns
    shown = re.sub(r"\s", "", text)
    for section in sections:
        assert re.sub(r"\s", "", section.about) in shown
        for field in section.fields:
            assert re.sub(r"\s", "", field.about) in shown and field.name.split(".")[-1] in shown


def test_fields_as_a_command():
    one = json.loads(mpo_command("fields", "loss.beta", "--json").stdout)
    assert [(f["name"], f["default"], f["required"]) for f in one] == [("loss.beta", 1.0, False)]
    everything = json.loads(mpo_command("fields", "--json").stdout)
    assert [f["name"] for f in everything] == [f.name for f in all_fields(Config)]
    text = mpo_command("fields", "model").stdout
    assert "model.lora" in text and "attention" in text and "Peak learning rate" not in text
    text = mpo_command("fields", "build.translator").stdout
    assert "translator.server" in text and "base_url" in text


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("los.beta", "did you mean 'loss.beta'?"),
        ("betta", "did you mean 'loss.beta'?"),
        ("build.translators", "did you mean 'build.translator'?"),
        ("build.base_ulr", "did you mean 'build.translator.server.base_url'?"),
        ("zzz", "known sections: model, model.lora, data"),
    ],
)
def test_an_unknown_section_is_refused_with_the_nearest_name(wanted, hint):
    with pytest.raises(Exception, match="unknown section or field") as error:
        _chosen(wanted)
    assert hint in str(error.value)
    if wanted == "trian":
        refused = mpo_command("fields", wanted)
        assert refused.returncode == 2 and refused.stderr == f"Error: {error.value}\n"


def test_recipes_as_a_command():
    found = json.loads(mpo_command("recipes", "--json").stdout)
    assert {r["name"]: Path(r["file"]) for r in found} == recipes()
    for recipe in found:  # the first comment, whole, in one line
        assert recipe["about"].endswith(".") and len(recipe["about"]) <= 98
        assert load_config(recipe["name"]).output_dir == f"runs/{recipe['name']}"
    text = mpo_command("recipes").stdout
    assert all(r["name"] in text and r["about"] in text for r in found)
    assert "mpo train demo" in text


def test_examples_name_recipes_and_no_path_of_a_clone():
    """A recipe's name works wherever the package is installed."""
    places = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("mpo/recipes/*.yaml"),
        *ROOT.glob("mpo/**/*.py"),
    ]
    command = re.compile(r"mpo (?:train|validate|gaps|precompute) (\S+)")
    named = set()
    for place in places:
        found = command.findall(place.read_text(encoding="utf-8"))
        assert not any("mpo/recipes" in name for name in found), place
        named.update(found)
    assert {"demo", "published", "llama-3.1-8b"} <= named
