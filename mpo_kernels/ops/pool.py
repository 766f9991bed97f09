"""Autograd of the mean over each sequence's rows, pooled in fp32 whatever the input's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mpo_kernels.backend import backend_for


class MeanPool(torch.autograd.Function):
    """hidden (N, D), mask (N,) uint8 or None, cu_seqlens (S + 1,) -> (S, D). dL/dh_j = dL/dpool / n on each of the n pooled rows."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
        pooled, counts = backend_for(hidden).pool(hidden, mask, cu_seqlens)
        ctx.save_for_backward(mask, cu_seqlens, counts)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mask, cu_seqlens, counts = ctx.saved_tensors
        grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad_pooled.device)
        backend_for(grad).unpool(grad_pooled.contiguous(), mask, cu_seqlens, counts, grad)
        return grad, None, None
