"""Every command with every file that it reads, and every place that it writes to, damaged in turn:
status 2, words, and no traceback.

What lies in a run's own folder is damaged in test_damaged_runs, a model's files one by one in
test_weights.
"""

import gc
import json
import os
import pwd
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from test_weights import POINTER
from tiny import native_rows, save_model, write_rows

from mpo.commands.app import status_of

FAST = ["train.max_steps=1", "train.pairs_per_step=2"]
READS = {
    "validate": (["validate", "run.yaml"], ["run.yaml", "rows.jsonl", "model"]),
    "dry-run": (["train", "run.yaml", "--dry-run"], ["run.yaml", "rows.jsonl", "model"]),
    "train": (["train", "run.yaml", *FAST], ["run.yaml", "rows.jsonl", "model"]),
    "precompute": (["precompute", "run.yaml"], ["run.yaml", "rows.jsonl", "model"]),
    "gaps": (
        ["gaps", "run.yaml", "--model", "other"],
        ["run.yaml", "rows.jsonl", "model", "other"],
    ),
    "build": (["data", "build", "build.yaml"], ["build.yaml", "pairs.jsonl", "known.jsonl"]),
    "export": (["export", "run", "--to", "exported"], ["run"]),
    "convert": (["convert", "run"], ["run"]),
    "plot": (["plot", "run", "--to", "plot.png"], ["run"]),
}
"""Commands, and what they read in the folder of `place`."""


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replaced(content):
    def damage(path):
        remove(path)
        path.write_bytes(content)

    return damage


def linked(target):
    def damage(path):
        remove(path)
        path.symlink_to(target or path)

    return damage


def folder(path):
    remove(path)
    path.mkdir()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "absent": remove,
    "empty": replaced(b""),
    "cut": cut,
    "binary": replaced(bytes(range(256)) * 3),
    "pointer": replaced(POINTER),
    "page": replaced(b"<!DOCTYPE html><html><body>not found</body></html>\n"),
    "list": replaced(b"[1, 2]\n"),
    "null": replaced(b"null\n"),
    "object": replaced(b'{"a": {"b": [1]}}\n'),
    "text": replaced(b'"a"\n'),
    "deep": replaced(b"[" * 100_000 + b"\n"),
    "digits": replaced(b'{"a": ' + b"9" * 5000 + b"}\n"),
    "surrogate": replaced(b'{"language": "\\ud800", "prompt": "\\udc00", "source": "\\ud800"}\n'),
    "folder": folder,
    "loop": linked(None),
    "dangling": linked("/nowhere/at/all"),
    "device": linked("/dev/null"),
}
"""Unreadable is the link to itself: the superuser may read everything else."""


FOLDERS = ("model", "other", "run")
OF_A_FOLDER = ("absent", "page", "folder", "loop", "dangling", "device")


@pytest.fixture(scope="module")
def origin(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("origin")
    for name in ("model", "other"):
        save_model(root / name, tokenizer)
    write_rows(root / "rows.jsonl", native_rows(dominants=2))
    data = {"train": ["rows.jsonl"], "max_length": 128}
    run = {"output_dir": "out", "model": {"path": "model", "dtype": "float32"}, "data": data}
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    write_rows(
        root / "pairs.jsonl", [{"prompt": "hello there", "chosen": "no way", "rejected": "yes sir"}]
    )
    write_rows(
        root / "known.jsonl",
        [
            {"source": text, "language": "sw", "translation": f"sw {text}"}
            for text in ("hello there", "no way", "yes sir")
        ],
    )
    build = {
        "input": ["pairs.jsonl"],
        "output": "made.jsonl",
        "languages": ["sw"],
        "translator": {"file": {"path": "known.jsonl"}},
    }
    (root / "build.yaml").write_text(yaml.safe_dump({**build, "filters": {"detect_from": None}}))
    before = dict(os.environ)
    here = Path.cwd()
    os.chdir(root)
    assert status_of(["train", "run.yaml", "output_dir=run", "checkpoint.every=1", *FAST]) == 0
    os.chdir(here)
    yield root
    from mpo.runtime import ranks

    ranks.leave()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def place(origin, tmp_path, monkeypatch):
    """A copy of it, which is the working folder."""
    shutil.copytree(origin, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "here"


def refused(capsys, arguments, status=2):
    """Runs the command and returns what it said, which must be short and no traceback."""
    capsys.readouterr()
    ended = status_of(arguments)
    said = capsys.readouterr()
    complaint = next(
        (
            said.err[found.start() :]
            for found in [re.search(r"^(Error|Unexpected error)", said.err, re.M)]
            if found
        ),
        said.err,
    )
    assert ended == status, (arguments, ended, complaint[-1000:])
    assert "Traceback" not in said.err + said.out and "Error:" in complaint
    assert len(complaint.splitlines()) < 25 and len(complaint) < 4000
    return complaint


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command, (_, names) in READS.items() for name in names],
)
def test_what_a_command_reads_is_damaged(place, capsys, command, name):
    arguments, _ = READS[command]
    kept = place.parent / "kept"
    for damage, make in DAMAGES.items():
        if name in FOLDERS and damage not in OF_A_FOLDER:
            continue
        (place / name).rename(kept)
        shutil.copytree(kept, place / name) if kept.is_dir() else shutil.copy(kept, place / name)
        make(place / name)
        try:
            said = refused(capsys, arguments)
            assert name.split(".")[0] in said, (damage, said)
        finally:
            remove(place / name)
            kept.rename(place / name)
            for made in ("out", "exported", "made.jsonl", "plot.png"):
                remove(place / made)
            for made in place.glob("made.jsonl.*"):
                made.unlink()


WRITES = {
    "train": (["train", "run.yaml", *FAST], "output_dir={}"),
    "precompute": (["precompute", "run.yaml"], "output_dir={}"),
    "store of precompute": (["precompute", "run.yaml"], "reference.store={}"),
    "store of train": (["train", "run.yaml", *FAST], "reference.store={}"),
    "build": (["data", "build", "build.yaml"], "output={}"),
    "export": (["export", "run"], "--to={}"),
    "plot": (["plot", "run"], "--to={}"),
}
PLACES = {
    "file": "pairs.jsonl",
    "below a file": "pairs.jsonl/x.png",
    "full folder": "full",
    "loop": "loop",
    "unwritable": "/proc/x.png",
    "below a device": "/dev/null/x.png",
    "long": "n" * 300 + ".png",
    "here": ".",
    "root": "/",
}


@pytest.mark.parametrize("command", WRITES)
def test_where_a_command_writes_is_no_place(place, capsys, command):
    """Nothing that was there is lost, either."""
    arguments, option = WRITES[command]
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    (place / "loop").symlink_to("loop")
    before = {
        path: path.read_bytes() for path in (place / "pairs.jsonl", place / "full" / "mine.txt")
    }
    for kind, name in PLACES.items():
        if (
            kind == "loop"
            and not (arguments[0] in ("train", "precompute") and option.startswith("output_dir"))
            and command != "plot"
        ):
            continue  # a link to nothing, whose place the output takes
        said = refused(capsys, [*arguments, option.format(name)])
        assert name.split("/")[0][:40] in said, (kind, said)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["picture.foo", "picture", ".png/", "full", ""])
def test_pictures_have_a_name_that_says_what_they_are(place, capsys, name):
    (place / "full").mkdir()
    said = refused(capsys, ["plot", "run", f"--to={name}"])
    assert "names no format" in said or "--to" in said


def test_a_picture_makes_its_folder(place, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    for name, made in (("new/folder/a.png", "new/folder/a.png"), ("~/b.PNG", "home/b.PNG")):
        assert status_of(["plot", "run", f"--to={name}"]) == 0
        assert (place / made).read_bytes().startswith(b"\x89PNG")


def test_links_to_folders_are_followed(place):
    """A run's folder, a model's and the data may lie on another disk."""
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("model", "rows.jsonl"):
        shutil.move(place / name, elsewhere / name)
        (place / name).symlink_to(elsewhere / name)
    for name in ("runs", "exports"):
        (elsewhere / name).mkdir()
        (place / name).symlink_to(elsewhere / name)
    assert status_of(["train", "run.yaml", "output_dir=runs", *FAST]) == 0
    assert (elsewhere / "runs" / "result.json").is_file()
    assert status_of(["export", "run", "--to=exports"]) == 0
    assert (elsewhere / "exports" / "model.safetensors").is_file()
    assert (place / "exports").is_symlink()


def test_a_run_goes_on_from_another_folder(place, monkeypatch, capsys):
    """Its configuration holds whole paths, so that neither the run nor its export depends on where
    one stands."""
    options = [
        "model.path=model",
        "data.train=[rows.jsonl]",
        "checkpoint.every=1",
        "train.pairs_per_step=2",
    ]
    (place / "recipe").mkdir()
    shutil.move(place / "run.yaml", place / "recipe" / "run.yaml")
    assert (
        status_of(["train", "recipe/run.yaml", "output_dir=moved", *options, "train.max_steps=2"])
        == 0
    )
    for name in ("model", "result.json"):
        remove(place / "moved" / name)
    gc.collect()  # the first run lets go of its folder when its process ends, or here
    monkeypatch.chdir(place / "recipe")
    absolute = [f"model.path={place}/model", f"data.train=[{place}/rows.jsonl]", *options[2:]]
    assert (
        status_of(
            ["train", "run.yaml", f"output_dir={place}/moved", *absolute, "train.max_steps=2"]
        )
        == 0
    )
    assert "2 of 2 steps done" in capsys.readouterr().out
    assert status_of(["export", "../moved", "--to=exported"]) == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, MASTER_ADDR is not set, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "a"}, "RANK is 'a'"),
        (
            {"RANK": "-1", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK is '-1'",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE is 'x'",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK 2 is not below WORLD_SIZE 2",
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "x",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
            },
            "LOCAL_RANK is 'x'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "precompute", "gaps"])
def test_half_of_a_launcher_is_refused(place, capsys, monkeypatch, command, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert status_of(READS[command][0]) == 2
    said = capsys.readouterr().err
    # said once on each node, by the rank whose number is a number
    assert "Traceback" not in said and (message in said or not said)


def test_without_a_home_folder_what_needs_none_works(place, capsys, monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "MPO_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert status_of(["validate", "run.yaml"]) == 0
    assert "set MPO_CACHE" in refused(
        capsys, ["validate", "run.yaml", "model.path=pypi:SmolLM2-135M-Instruct"]
    )
    assert "Set HOME" in refused(capsys, ["validate", "run.yaml", "output_dir=~/x"])


def test_a_run_named_in_the_place_of_its_model(place, capsys):
    for name in ("run", "nowhere", "rows.jsonl"):
        said = refused(capsys, ["gaps", "run.yaml", "--model", name])
        assert name in said
    assert f"Its model is {Path('run') / 'model'}" in refused(
        capsys, ["gaps", "run.yaml", "--model", "run"]
    )


def test_reports_of_damaged_runs_are_json_all_the_same(place, capsys):
    assert status_of(["gaps", "run.yaml", "--model", "other", "--json"]) == 0
    json.loads(capsys.readouterr().out)
