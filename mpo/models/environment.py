"""What a report of a fault needs to know of a machine: versions, devices, and what is chosen for
them. No name of the machine or its user, and no path."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpo.models.attention import FLASH_ATTN, flash_attn, kernel_of
from mpo.runtime.errors import installed
from mpo_kernels.backends import backend_for

PACKAGES = (
    *("mpo-kernels", "torch", "triton", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("deepspeed", "peft", "bitsandbytes", "flash-attn", "datasets", "numpy"),
)
VARIABLES = (
    *("MPO_KERNELS_BACKEND", "TRITON_INTERPRET", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"),
    *("CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("PYTORCH_TUNABLEOP_ENABLED", "TORCH_BLAS_PREFER_CUBLASLT", "CUBLAS_WORKSPACE_CONFIG"),
    *("OMP_NUM_THREADS", "NCCL_P2P_DISABLE", "NCCL_DEBUG", "NCCL_ALGO"),
)
"""Of the environment: what changes which code runs."""
HEAD_DIM = 128
"""For which attention is asked."""


def environment() -> dict[str, dict[str, Any]]:
    """Facts by section. One that cannot be told says why: a report is made where something is
    broken."""
    return {
        "versions": {"python": platform.python_version(), **{p: installed(p) for p in PACKAGES}},
        "PyTorch's build": {
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
            "cudnn": _told(torch.backends.cudnn.version),
            "nccl": _told(_nccl),
            "driver": _told(_driver),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _told(_cpu),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": _told(_memory),
        },
        "devices": _devices(),
        "choices": {
            "losses": _told(_backend),
            "attention in bfloat16": _told(lambda: _attention(torch.bfloat16)),
            "attention in bfloat16, soft-capped": _told(
                lambda: _attention(torch.bfloat16, softcap=True)
            ),
            "attention in float32": _told(lambda: _attention(torch.float32)),
            "flash-attn": _told(_flash_attn),
        },
        "variables": {
            name: _without_paths(os.environ[name]) for name in VARIABLES if name in os.environ
        },
    }


def _told(fact: Callable[[], Any]) -> Any:
    """The fact, or why there is none."""
    try:
        return fact()
    except Exception as error:  # whatever a broken installation raises
        return f"cannot be told ({type(error).__name__}: {_without_paths(str(error))[:200]})"


def _without_paths(text: str) -> str:
    """The last names of paths alone.

    >>> _without_paths("/home/someone/lib/libcudart.so.12: no such file")
    'libcudart.so.12: no such file'
    """
    return re.sub(r"[^\s'\"=:,]*/", "", " ".join(text.split()))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _devices() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"GPU": "none that this PyTorch can use"}
    return {f"GPU {i}": _told(lambda i=i: _gpu(i)) for i in range(torch.cuda.device_count())}  # type: ignore[misc]


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return (
        f"{found.name}, {found.total_memory / 2**30:.1f} GiB, capability"
        f" {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
    )


def _backend() -> str:
    name = backend_for(torch.empty(0, device=_device())).__name__.rpartition(".")[2]
    return {"triton": "Triton kernels", "eager": "PyTorch"}[name]


def _attention(dtype: torch.dtype, softcap: bool = False) -> str:
    return kernel_of(_device(), dtype, HEAD_DIM, softcap=softcap)


def _flash_attn() -> str:
    if installed("flash-attn") == "not installed":
        return "not installed"
    return "loads" if flash_attn() else f"not used: older than {FLASH_ATTN}, or it does not load"


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _driver() -> str | None:
    """Of NVIDIA's kernel module."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\s(\d+\.\d[\d.]*)\s", file.read_text()) if file.is_file() else None
    return found[1] if found else None


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
