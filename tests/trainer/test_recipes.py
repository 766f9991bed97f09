"""Each shipped recipe, as it is, on a small file of the form that it was written for and a small
model of its architecture."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from tiny import save_model
from typer.testing import CliRunner

from mpo.commands.app import app
from mpo.config import load_config

RECIPES = Path(__file__).parents[2] / "mpo/recipes"
DEMO = [
    json.loads(line)
    for line in (RECIPES / "demo/train.jsonl").read_text(encoding="utf-8").splitlines()
]
OTHERS = ("ja", "ko", "ar", "bn", "sw")
ROWS = 6
"""Dominant pairs of a published file here."""

# recipe: architecture, chat template, dominant language, the other language that is not in OTHERS
SHIPPED = {
    "llama-3.1-8b": ("llama", "stripping", "en", "zh"),
    "llama-3.1-70b": ("llama", "stripping", "en", "zh"),
    "published": ("llama", "chatml", "en", "zh"),
    "gemma-2-9b": ("gemma2", "gemma", "en", "zh"),
    "qwen2.5-7b": ("qwen2", "chatml", "zh", "en"),
}


def pairs_in(language):
    """The demo's pairs in one language, in one order."""
    shown = [
        (row["id"].rsplit("-", 1)[0], row["dominant" if language == "en" else "target"])
        for row in DEMO
    ]
    return dict(
        pair for pair, row in zip(shown, DEMO, strict=True) if language in ("en", row["language"])
    )


def published(dominant, languages):
    """Rows in the published form: each dominant pair once for each language, in an order that mixes
    them."""
    of = {language: list(pairs_in(language).values()) for language in (dominant, *languages)}

    def side(name, pair):
        values = {
            f"{name}_{kind}": {"from": "gpt", "value": pair[kind]}
            for kind in ("chosen", "rejected")
        }
        return {
            f"{name}_conversations": [{"from": "human", "value": pair["prompt"][0]["content"]}],
            **values,
        }

    rows = [
        (name, {**side("source", of[dominant][i]), **side("target", of[name][i])})
        for i in range(ROWS)
        for name in languages
    ]
    return sorted(rows, key=lambda row: json.dumps(row[1])[-40:])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One folder for each architecture and template, made when it is asked for. Byte tokens are
    many, so it has many positions."""
    root = tmp_path_factory.mktemp("models")

    def of(architecture, template):
        folder = root / f"{architecture}-{template}"
        if not folder.exists():
            save_model(folder, make_tokenizer(template), architecture)
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(
                json.dumps({**values, "max_position_embeddings": 8192})
            )
        return str(folder)

    return of


def command(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def write(path, rows):
    path.write_text(json.dumps([row for _, row in rows], ensure_ascii=False), encoding="utf-8")
    return str(path)


def test_every_shipped_recipe_is_asked_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*SHIPPED, "demo"}


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_recipe_reads_the_file_that_it_was_published_with(recipe, models, tmp_path):
    architecture, template, dominant, other = SHIPPED[recipe]
    rows = published(dominant, (other, *OTHERS))
    languages = [language for language, _ in rows]
    english = pairs_in("en")["shoplifting"]["prompt"][0]["content"]
    # As in the published files: English inside of other prompts, or in place of them; a text that
    # was never translated; escapes.
    places = [languages.index(name) for name in OTHERS]
    for place in places[:4]:
        prompt = rows[place][1]["target_conversations"][0]
        prompt["value"] = f"{english} {english} {prompt['value']}"
    left = len(rows) - 1 - languages[::-1].index("ja")
    rows[left][1]["target_conversations"][0]["value"] = english
    rows[places[0]][1]["target_chosen"]["value"] += " &quot;"
    untranslated = len(rows) - 1 - languages[::-1].index("sw")
    for part in ("conversations", "chosen", "rejected"):
        rows[untranslated][1][f"target_{part}"] = rows[untranslated][1][f"source_{part}"]
    expected = {name: languages.count(name) - (name == "sw") for name in set(languages)}

    arguments = [
        recipe,
        f"data.train=[{write(tmp_path / 'file.json', rows)}]",
        f"model.path={models(architecture, template)}",
        "--json",
    ]
    seen = command("validate", *arguments)
    assert {name: row["rows"] for name, row in seen["languages"].items()} == expected
    assert seen["dropped"] == {"target_untranslated": 1} and seen["dominant_pairs"] == ROWS
    # bytes are long; English in prompts
    assert not {item["reason"] for item in seen["suspicious"]} - {"length_ratio", "wrong_script"}
    for view in seen["views"]:
        cut = seen["languages"][view["language"]]["cut"]
        assert cut or view["chosen"][1].endswith(("<|im_end|>", "<|eot|>", "<end_of_turn>"))

    told = command("train", *arguments, "--dry-run", f"output_dir={tmp_path / 'run'}")
    config = load_config(recipe)
    assert told["languages"] == expected
    assert told["rows"] == sum(expected.values())
    assert told["dropped"] == 1
    assert told["steps"] == -(
        -round(told["rows"] * config.train.epochs) // config.train.pairs_per_step
    )
    assert told["measured"] == told["rows"]
    assert told["reference_sequences"] == 2 * ROWS
    assert len(told["memory"]) == 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "dominant", "other"),
    [("qwen2.5-7b", "en", "zh"), ("llama-3.1-8b", "zh", "en"), ("gemma-2-9b", "sw", "zh")],
)
def test_a_file_whose_dominant_side_is_in_another_language_is_refused(
    recipe, dominant, other, models, tmp_path
):
    architecture, template, expected, _ = SHIPPED[recipe]
    path = write(
        tmp_path / "file.json",
        published(dominant, (other, *(name for name in OTHERS if name != dominant))),
    )
    arguments = [recipe, f"data.train=[{path}]", f"model.path={models(architecture, template)}"]
    for name, options in (("validate", []), ("train", ["--dry-run"])):
        with pytest.raises(
            Exception,
            match=(
                rf"dominant side of .*file.json is in {dominant}, not in {expected} \(6 of 6"
                r" pairs.*Set data.dom"
            ),
        ):
            command(name, *arguments, *options)


def test_the_demo_recipe_reads_the_set_that_it_ships_with(models, tmp_path):
    arguments = ["demo", f"model.path={models('llama', 'chatml')}", "--json"]
    seen = command("validate", *arguments)
    heldout = (RECIPES / "demo/heldout.jsonl").read_text(encoding="utf-8").count("\n")
    assert set(seen["languages"]) == set(seen["held_out"]) == {"zh", *OTHERS}
    assert not seen["dropped"]
    assert sum(row["rows"] for row in seen["languages"].values()) == len(DEMO)
    assert sum(row["rows"] for row in seen["held_out"].values()) == heldout
    assert not {item["reason"] for item in seen["suspicious"]} - {"length_ratio"}
    told = command("train", *arguments, "--dry-run", f"output_dir={tmp_path / 'run'}")
    assert told["rows"] == len(DEMO) and told["measured"] == heldout and told["dropped"] == 0
