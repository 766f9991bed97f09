"""Exact bytes that the kernels move, and their bounds, counted in the interpreter. Run by
`test_interpreter.py`."""

import pytest
import torch
from cases import INTERPRETED, labels_of, regime

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

import mpo_kernels
from benchmarks.instruments.operators import Memory
from benchmarks.instruments.traffic import Meter
from mpo_kernels.backends.triton.tiles import Tile, use_tiles

P, T = 2, 6


def run(vocab, mask, inplace=False, packed=False):
    labels = labels_of((2 * P, T), vocab, mask=mask)
    logits = regime("normal", (2 * P, T, vocab), labels).bfloat16()
    layout = {}
    if packed:
        logits, labels = logits.view(-1, vocab), labels.view(-1)
        layout = {"cu_seqlens": torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)}
    working = logits.clone().requires_grad_() * 1
    with Meter() as forward:
        loss = mpo_kernels.mpo_loss(
            working, labels, torch.zeros(P), inplace_backward=inplace, **layout
        ).loss
    with Meter() as backward:
        loss.backward()
    assert forward.clean and backward.clean
    return forward, backward, int((labels != -100).sum()), labels.numel()


@pytest.mark.parametrize("vocab", [1000, 8192, 8197, 20011])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_at_most_six_bytes_per_bf16_logit(vocab, inplace, packed):
    forward, backward, _, rows = run(vocab, "none", inplace, packed)
    total = sum(m.loaded.total() + m.stored.total() for m in (forward, backward))
    assert 6 <= total / (rows * vocab) <= (6.05 if vocab >= 8192 else 6.2)


@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "shared rows"])
def test_moments_and_the_gradient_of_the_entropy_read_no_logit_again(whole):
    labels = labels_of((2 * P, T), 1000, mask="none")
    logits = regime("normal", (2 * P, T, 1000), labels).bfloat16().requires_grad_()
    tile = Tile(1024, 2) if whole else Tile(128, 1)
    with use_tiles(stats=tile, grad=tile):
        with Meter() as forward:
            found = mpo_kernels.token_statistics(logits, labels, moments=True, entropy_grad=True)
        with Meter() as backward:
            (found.logprobs + found.entropy).sum().backward()
    assert forward.clean and backward.clean
    # the label's logit once more
    assert forward.loaded["logits_ptr"] == (1000 + 1) * 2 * labels.numel()
    assert backward.loaded["logits_ptr"] == 1000 * 2 * labels.numel()
    assert backward.stored["grad_ptr"] == 1000 * 2 * labels.numel()


def step(order):
    """All functions forward and backward with split rows and token outputs; the programs of each
    launch run in `order`."""
    labels = labels_of((2 * P, T), 300)
    generator = torch.Generator().manual_seed(0)
    logits = regime("normal", (2 * P, T, 300), labels).bfloat16().requires_grad_()
    hidden, weight = (
        torch.randn(2 * P, T, 16, generator=generator).requires_grad_(),
        torch.randn(300, 16, generator=generator).requires_grad_(),
    )
    gap, results = torch.tensor([0.2, -0.4]), []
    with use_tiles(stats=Tile(64, 1), grad=Tile(128, 1)), Meter(order) as meter:
        out = mpo_kernels.mpo_loss(logits, labels, gap, softcap=20.0, token_outputs=True)
        linear = mpo_kernels.linear_mpo_loss(hidden, weight, labels, gap, chunk_bytes=1)
        l2 = mpo_kernels.retention_loss(hidden, torch.zeros(2 * P, 16), mask=labels != -100)
        found = mpo_kernels.token_statistics(logits, labels, moments=True, entropy_grad=True)
        (out.loss + linear.loss + l2 + found.entropy.sum()).backward()
        results += [out.loss, linear.loss, l2, *out.tokens[:3], *found]
        results += [logits.grad, hidden.grad, weight.grad]
    return meter, results


@pytest.mark.parametrize("order", [None, "reverse", "shuffle"])
def test_no_race_no_hazard_and_the_same_bits_in_any_order(order):
    meter, results = step(order)
    assert meter.clean, (meter.out_of_bounds, meter.races, meter.hazards, meter.uninitialised)
    _, again = step(None)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_ignored_rows_are_not_read():
    forward, backward, scored, rows = run(20011, "some")
    # a row, and its label's logit once more
    assert forward.loaded["logits_ptr"] == (20011 + 1) * 2 * scored
    assert backward.loaded["logits_ptr"] == 20011 * 2 * scored
    # their gradient is 0 and must be written
    assert backward.stored["grad_ptr"] == 20011 * 2 * rows
    assert forward.stored["logits_ptr"] == backward.stored["logits_ptr"] == 0


def test_in_place_needs_under_one_percent_of_the_logits_besides_them():
    labels = labels_of((2 * P, T), 20011)
    working = regime("normal", (2 * P, T, 20011), labels).bfloat16().requires_grad_() * 1
    with Memory() as seen:
        loss = mpo_kernels.mpo_loss(
            working, labels, torch.zeros(P), inplace_backward=True, validate=False
        ).loss
        (grad,) = torch.autograd.grad(loss, working)
    assert grad.data_ptr() == working.data_ptr()
    assert seen.total < 0.01 * working.untyped_storage().nbytes()


def test_pooling_reads_pooled_rows_once():
    hidden, mask = torch.randn(3, 5, 70), torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 1:3] = True
    with Meter() as meter:
        mpo_kernels.mean_pool(hidden, mask=mask)
    assert meter.loaded["hidden_ptr"] == 3 * 2 * 70 * 4 and not meter.out_of_bounds


def test_wrong_labels_and_offsets_never_leave_the_tensors():
    logits = torch.randn(12, 33)
    labels = torch.randint(0, 33, (12,))
    labels[3], labels[7] = 33, 2**40
    offsets = torch.tensor([-7, 3, 6, 9, 400], dtype=torch.int32)
    with Meter() as meter:
        mpo_kernels.mpo_loss(
            logits.requires_grad_(), labels, torch.zeros(2), cu_seqlens=offsets, validate=False
        ).loss.backward()
    assert not meter.out_of_bounds


def test_the_meter_sees_an_access_out_of_bounds():
    @triton.jit
    def _overrun_kernel(x_ptr, n, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        tl.store(x_ptr + columns, tl.load(x_ptr + columns, mask=columns < n) + 1, mask=columns < n)

    x = torch.zeros(16)[:6]
    with Meter() as meter:
        _overrun_kernel[(1,)](x, 8, BLOCK=8)
    assert len(meter.out_of_bounds) == 2 and meter.loaded["x_ptr"] == 24
