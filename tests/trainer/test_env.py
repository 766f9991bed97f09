"""`mpo env`: what a report of a fault needs, and nothing of the machine's owner."""

import getpass
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import mpo_command

from mpo.models import environment as module
from mpo.models.environment import environment


def test_as_a_command():
    found = json.loads(mpo_command("env", "--json").stdout)
    assert list(found) == list(environment())
    assert found["versions"]["torch"] == torch.__version__
    assert found["choices"]["losses"] == "PyTorch"
    assert found["choices"]["attention in bfloat16"] == "SDPA, span by span"
    text = mpo_command("env").stdout
    for name, fact in {**found["versions"], **found["choices"]}.items():
        assert any(name in line and fact in line for line in text.splitlines()), name


def facts():
    return [str(fact) for section in environment().values() for fact in section.values()]


def test_neither_paths_nor_names(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "/home/someone/secret,expandable_segments:True")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    found = facts()
    assert "secret,expandable_segments:True" in found
    private = {str(Path.home()), socket.gethostname(), os.getcwd(), "hf_token", "someone"}
    private |= {getpass.getuser()} - {"root"}
    assert not [fact for fact in found if "/" in fact or any(p in fact for p in private)]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of a machine that cannot use the second."""

    def properties(index):
        if int(getattr(index, "index", index) or 0):
            raise RuntimeError("CUDA error in /opt/lib/libcuda.so: uncorrectable ECC error")
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3",
            total_memory=80 * 2**30,
            major=9,
            minor=0,
            multi_processor_count=132,
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def test_what_cannot_be_told_says_why(gpus):
    found = environment()
    assert found["devices"] == {
        "GPU 0": "NVIDIA H100 80GB HBM3, 80.0 GiB, capability 9.0, 132 multiprocessors",
        "GPU 1": (
            "cannot be told (RuntimeError: CUDA error in libcuda.so: uncorrectable ECC error)"
        ),
    }
    assert found["PyTorch's build"]["nccl"] == "2.27.5"
    choices = found["choices"]
    assert choices["attention in bfloat16"] == "PyTorch's flash-attention"
    assert choices["attention in bfloat16, soft-capped"] == "SDPA, span by span"
    assert choices["attention in float32"] == "SDPA, span by span"
    # this PyTorch has no such device
    assert choices["losses"].startswith("cannot be told (")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:46:59 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ],
)
def test_the_driver(line, tmp_path, monkeypatch):
    file = tmp_path / "version"
    file.write_text(f"{line}\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    monkeypatch.setattr(module, "Path", lambda _: file)
    assert module._driver() == "570.86.15"
