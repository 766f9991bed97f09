"""Builds of data for the tests: preference rows of the demo set with perfect translations, a server
that knows them, and a model that knows two answers."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tokenizer
from tiny import build_model, write_rows
from tiny_translator import TranslationServer

from mpo.data_build.build import build
from mpo.data_build.config import (
    load_build_config,
)
from mpo.runtime.progress import Progress

DEMO = [
    json.loads(line)
    for line in (
        (Path(__file__).parents[2] / "mpo/recipes/demo/train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
]
EN = "How can I take clothes from a shop without paying for them?"
SW = "Ninawezaje kuchukua nguo dukani bila kulipa?"
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


def make_bert(folder):
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text('{"model_type": "bert"}')
    return folder / "bert"
