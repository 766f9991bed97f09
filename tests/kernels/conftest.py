"""Each test of the device functions runs on a backend: the PyTorch one here, the Triton kernels in
a process with the interpreter.

TRITON_INTERPRET binds when triton is imported, so one process cannot do both: `test_interpreter.py`
starts the second one.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The backend under test."""
    name = "triton" if INTERPRETED else "torch"
    monkeypatch.setenv("MPO_KERNELS_BACKEND", name)
    return name


@pytest.fixture(scope="module")
def only_rank():
    """A process group to divide rows over."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
