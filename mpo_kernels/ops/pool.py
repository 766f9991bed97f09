"""Autograd of the mean over each sequence's rows, pooled in fp32 whatever the input's dtype:
`mpo_kernels::mean_pool` and its transpose.

dL/dh_j = dL/dpool / n on each of the n pooled rows                                              (9)
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.ops.once import differentiable_once
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.stats import statistics_dtype


@operator(
    "mpo_kernels::mean_pool",
    schema="(Tensor hidden, Tensor? mask, Tensor cu_seqlens) -> (Tensor, Tensor)",
    strided=("hidden",),
)
def mean_pool_op(hidden, mask, cu_seqlens):
    """hidden (N, D), mask (N,) bool, cu_seqlens (S + 1,) -> means (S, D), rows pooled (S,)."""
    rows = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    return backend_for(hidden).pool(
        rows, None if mask is None else mask.view(torch.uint8), cu_seqlens
    )


@mean_pool_op.register_fake
def _(hidden, mask, cu_seqlens):
    sequences, dtype = cu_seqlens.shape[0] - 1, statistics_dtype(hidden)
    return hidden.new_empty(sequences, hidden.shape[1], dtype=dtype), hidden.new_empty(
        sequences, dtype=dtype
    )


@operator(
    "mpo_kernels::mean_pool_grad",
    schema=(
        "(Tensor grad_pooled, Tensor? mask, Tensor cu_seqlens, Tensor counts, int rows, ScalarType"
        " dtype) -> Tensor"
    ),
)
def mean_pool_grad_op(grad_pooled, mask, cu_seqlens, counts, rows, dtype):
    """dL/dpool (S, D) -> dL/dhidden (rows, D) of `dtype`."""
    grad = torch.zeros(rows, grad_pooled.shape[1], dtype=dtype, device=grad_pooled.device)
    backend_for(grad_pooled).unpool(
        grad_pooled.contiguous(),
        None if mask is None else mask.view(torch.uint8),
        cu_seqlens,
        counts,
        grad,
    )
    return grad


@mean_pool_grad_op.register_fake
def _(grad_pooled, mask, cu_seqlens, counts, rows, dtype):
    return grad_pooled.new_empty(rows, grad_pooled.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, mask, cu_seqlens = inputs
    _, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(mask, cu_seqlens, counts)
    ctx.rows, ctx.dtype = hidden.shape[0], hidden.dtype


def _backward(ctx: Any, grad_pooled: torch.Tensor | None, _: Any) -> tuple:
    if grad_pooled is None:
        return None, None, None
    mask, cu_seqlens, counts = ctx.saved_tensors
    return mean_pool_grad_op(grad_pooled, mask, cu_seqlens, counts, ctx.rows, ctx.dtype), None, None


differentiable_once(mean_pool_op, _backward, setup_context=_save)
