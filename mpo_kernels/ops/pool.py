"""Autograd of the mean over each sequence's rows, pooled in fp32 whatever the input's dtype:
`mpo_kernels::mean_pool` and its transpose.

dL/dh_j = dL/dpool / n on each of the n pooled rows                                              (9)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.ops.operator import operator
from mpo_kernels.options import statistics_dtype


class Pooled(NamedTuple):
    """Of S sequences."""

    means: torch.Tensor
    """(S, D); differentiable."""
    counts: torch.Tensor
    """(S,) rows pooled."""


@operator("mpo_kernels::mean_pool", strided=("hidden",))
def mean_pool_op(
    hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> Pooled:
    """hidden (N, D), mask (N,) bool, cu_seqlens (S + 1,)."""
    rows = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    return Pooled(*backend_for(hidden).pool(rows, _bytes(mask), cu_seqlens))


@mean_pool_op.register_fake
def _(hidden, mask, cu_seqlens):
    sequences, dtype = cu_seqlens.shape[0] - 1, statistics_dtype(hidden)
    return Pooled(
        hidden.new_empty(sequences, hidden.shape[1], dtype=dtype),
        hidden.new_empty(sequences, dtype=dtype),
    )


@operator("mpo_kernels::mean_pool_grad")
def mean_pool_grad_op(
    grad_pooled: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    counts: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dL/dpool (S, D) -> dL/dhidden (rows, D) of `dtype`."""
    grad = torch.zeros(rows, grad_pooled.shape[1], dtype=dtype, device=grad_pooled.device)
    backend_for(grad_pooled).unpool(grad_pooled, _bytes(mask), cu_seqlens, counts, grad)
    return grad


@mean_pool_grad_op.register_fake
def _(grad_pooled, mask, cu_seqlens, counts, rows, dtype):
    return grad_pooled.new_empty(rows, grad_pooled.shape[1], dtype=dtype)


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _save(ctx: Any, given: Any, found: Pooled) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.counts)
    ctx.save_for_backward(given.mask, given.cu_seqlens, found.counts)
    ctx.rows, ctx.dtype = given.hidden.shape[0], given.hidden.dtype


def _backward(ctx: Any, grad_means: torch.Tensor | None, _: Any) -> tuple:
    if grad_means is None:
        return (None,)
    mask, cu_seqlens, counts = ctx.saved_tensors
    return (mean_pool_grad_op(grad_means, mask, cu_seqlens, counts, ctx.rows, ctx.dtype),)


mean_pool_op.register_autograd(save=_save, backward=_backward)
