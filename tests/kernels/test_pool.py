"""mean_pool and retention_loss against the float64 oracle."""

import pytest
import torch

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle

S, T, D = 4, 7, 37


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, T, D, generator=generator).add_(5).to(dtype)
    mask = torch.rand(S, T, generator=generator) > 0.4
    mask[:, 2] = True
    return hidden, mask, torch.randn(S, D, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient(dtype, reduction, masked, packed):
    hidden, mask, target = inputs(dtype)
    options = {"sequence_weights": torch.tensor([1.0, 0.0, 2.0, 0.5]), "reduction": reduction}
    layout = {"mask": mask if masked else None}
    if packed:
        hidden = hidden.reshape(-1, D)
        layout = {
            "mask": mask.reshape(-1) if masked else None,
            "cu_seqlens": torch.tensor([0, 7, 14, 21, 28], dtype=torch.int32),
        }
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = mpo_kernels.retention_loss(ours, target, **layout, **options)
    wide = options | {"sequence_weights": options["sequence_weights"].double()}
    want = oracle.retention_loss(theirs, target.double(), **layout, **wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (got * 1.5).sum().backward()
    (want * 1.5).sum().backward()
    assert ours.grad.dtype == dtype
    assert relative_error(ours.grad, theirs.grad) < (1e-5 if dtype == torch.float32 else 4.5e-3)


def test_padding_cannot_leak_into_the_pool():
    hidden, mask, _ = inputs()
    dirty = hidden.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(
        mpo_kernels.mean_pool(dirty, mask=mask), mpo_kernels.mean_pool(hidden, mask=mask)
    )


def test_pooling_is_in_fp32_for_bf16_states():
    """The mean of 1000 rows that differ in their last bf16 bit; a bf16 sum would be off by
    percents."""
    hidden = torch.full((1, 1000, 3), 1.0)
    hidden[0, ::2] += 2**-7
    assert torch.equal(mpo_kernels.mean_pool(hidden.bfloat16()), torch.full((1, 3), 1 + 2**-8))


def test_unequal_lengths_equal_each_on_its_own():
    hidden, _, _ = inputs()
    rows = hidden.reshape(-1, D)
    offsets = torch.tensor([0, 1, 9, 28], dtype=torch.int32)
    pooled = mpo_kernels.mean_pool(rows, cu_seqlens=offsets)
    for i, (a, b) in enumerate([(0, 1), (1, 9), (9, 28)]):
        torch.testing.assert_close(pooled[i], rows[a:b].mean(0))
