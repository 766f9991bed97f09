"""What a call sends to a GPU leaves from page-locked memory."""

import pytest
import torch

from mpo_kernels.ops import transfer
from mpo_kernels.ops.transfer import on_device

GPU = torch.device("cuda", 0)


@pytest.fixture
def copies(monkeypatch):
    """(from page-locked memory, to, without waiting) of each copy; none is made."""
    found, locked = [], []

    def pin_memory(tensor):
        locked.append(tensor.clone())
        return locked[-1]

    def to(tensor, device, non_blocking=False):
        found.append((any(tensor is one for one in locked), device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_from_the_host_to_a_gpu(copies):
    on_device(torch.arange(3), GPU)
    assert copies == [(True, GPU, True)]


def test_within_the_host_and_from_a_gpu(copies):
    on_device(torch.arange(3), torch.device("cpu"))
    on_device(torch.empty(3, device="meta"), torch.device("cpu"))
    on_device(torch.empty(3, device="meta"), GPU)
    assert [(locked, waits_not) for locked, _, waits_not in copies] == [(False, False)] * 3


@pytest.mark.parametrize("why", ["captured", "compiled", "wrapped"])
def test_where_no_memory_can_be_locked(copies, why, monkeypatch):
    if why == "captured":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if why == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if why == "wrapped":
        monkeypatch.setattr(transfer, "is_wrapped", lambda tensor: True)
    on_device(torch.arange(3), GPU)
    assert copies == [(False, GPU, True)]
