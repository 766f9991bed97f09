"""torch.utils.flop_counter counts what the operators do inside, which an instrument that looks into
them counts too."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mpo_kernels
from benchmarks.instruments.operators import Flops

V, D = 37, 8
CALLS = {
    "linear_mpo_loss": (
        lambda h, w, labels, chunk: (
            mpo_kernels.linear_mpo_loss(h, w, labels, torch.zeros(2), chunk_bytes=chunk).loss
        )
    ),
    "linear_mpo_loss none": (
        lambda h, w, labels, chunk: mpo_kernels.linear_mpo_loss(
            h, w, labels, torch.zeros(2), chunk_bytes=chunk, reduction="none"
        ).loss.sum()
    ),
    "linear_token_logprobs": (
        lambda h, w, labels, chunk: mpo_kernels.linear_token_logprobs(
            h, w, labels, chunk_bytes=chunk
        ).sum()
    ),
}


def counted(counter, function):
    with counter:
        function()
    return counter.get_total_flops() if isinstance(counter, FlopCounterMode) else counter.total


@pytest.mark.parametrize("call", CALLS)
# of a chunk: both pairs, neither, one or both of them are in pieces
@pytest.mark.parametrize("rows", [None, 20, 40, 70])
# positions of a sequence; so few that the chunk is kept for backward, and more
@pytest.mark.parametrize("scored", [2, 11])
def test_as_many_as_the_instrument_sees(call, rows, scored, monkeypatch):
    monkeypatch.setattr("mpo_kernels.ops.chunks.ROW_MULTIPLE", 1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((4, 50), -100)
    labels[:, -scored:] = 3
    labels[1:, -3 * scored :] = 5
    chunk = None if rows is None else rows * V * 4
    for trained in itertools.product([False, True], repeat=2):
        h, w = torch.randn(4, 50, D, generator=generator), torch.randn(V, D, generator=generator)
        leaves = [t.requires_grad_(grad) for t, grad in zip((h, w), trained, strict=True)]

        def step(leaves=leaves):
            value = CALLS[call](*leaves, labels, chunk)
            if value.requires_grad:
                value.backward()

        got = counted(FlopCounterMode(display=False), step)
        assert got == counted(Flops(), step)
        assert got >= 2 * int((labels != -100).sum()) * V * D * (1 + sum(trained))


def test_by_hand():
    """Ten scored rows, forward and both gradients: three products of 10 x 8 x 37."""
    labels = torch.full((4, 9), -100)
    labels[:, 3], labels[:2, :3] = 1, 2
    h, w = torch.randn(4, 9, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        mpo_kernels.linear_mpo_loss(h, w, labels, torch.zeros(2)).loss.backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * D * V


def test_without_data_all_rows_count():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        h, w = torch.randn(4, 9, D), torch.randn(V, D)
        mpo_kernels.linear_token_logprobs(h, w, torch.zeros(4, 9, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * 36 * D * V
