"""Mean over the rows of each sequence in fp32 (equation 3), and its transpose (equation 9)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpo_kernels.backends.triton.launch import kernel, launch
from mpo_kernels.backends.triton.sequences import _bounds

POOL_ROWS, POOL_BLOCK = 16, 128
"""Rows and columns that a program of the pool reads at a time: narrow, so that few sequences still
give many programs."""

UNPOOL_BLOCK = 512
"""Columns that a program of its transpose writes; stores need not be waited for."""


@kernel
def _pool_kernel(
    hidden_ptr,  # (N, D) any float
    mask_ptr,  # (N,) uint8, not read unless HAS_MASK
    cu_seqlens_ptr,  # (S + 1,) int32
    pooled_ptr,  # (S, D) float32 out
    counts_ptr,  # (S,) float32 out
    N,
    D,
    stride_n,
    blocks,  # blocks of columns per sequence
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sequence = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    start, end = _bounds(cu_seqlens_ptr, sequence, N)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    count = tl.zeros([ROWS], dtype=tl.float32)
    # several rows at a time, so that enough loads are in flight
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        pooled = rows < end
        if HAS_MASK:
            # A row that is not pooled is not read, so what padding holds (even NaN) cannot matter.
            pooled = pooled & (tl.load(mask_ptr + rows, mask=pooled, other=0) != 0)
        row_ptr = hidden_ptr + rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
        # (ROWS, BLOCK)
        total += tl.load(row_ptr, mask=pooled[:, None] & inside[None, :], other=0.0).to(tl.float32)
        count += pooled.to(tl.float32)
    rows_pooled = tl.sum(count, axis=0)
    tl.store(
        pooled_ptr + sequence.to(tl.int64) * D + columns,
        tl.sum(total, axis=0) / rows_pooled,
        mask=inside,
    )
    if program % blocks == 0:
        tl.store(counts_ptr + sequence, rows_pooled)


@kernel
def _unpool_kernel(
    grad_pooled_ptr,  # (S, D) float32
    mask_ptr,  # (N,) uint8, not read unless HAS_MASK
    cu_seqlens_ptr,  # (S + 1,) int32
    counts_ptr,  # (S,) float32
    grad_ptr,  # (N, D) out, contiguous
    N,
    D,
    blocks,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sequence = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    grad = tl.load(grad_pooled_ptr + sequence.to(tl.int64) * D + columns, mask=inside, other=0.0)
    grad = grad / tl.load(counts_ptr + sequence)
    start, end = _bounds(cu_seqlens_ptr, sequence, N)
    row_ptr = grad_ptr + start.to(tl.int64) * D + columns
    for row in range(start, end):
        value = grad
        if HAS_MASK:
            value = tl.where(tl.load(mask_ptr + row) != 0, grad, 0.0)
        tl.store(row_ptr, value.to(grad_ptr.dtype.element_ty), mask=inside)
        row_ptr += D


def pool(
    hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, D), mask (N,) uint8 or None, cu_seqlens (S + 1,) int32 -> means (S, D) and row
    counts (S,), float32."""
    S, D = cu_seqlens.numel() - 1, hidden.shape[1]
    pooled = torch.empty(S, D, dtype=torch.float32, device=hidden.device)
    counts = torch.empty(S, dtype=torch.float32, device=hidden.device)
    block, blocks = _blocks(D, POOL_BLOCK)
    launch(
        _pool_kernel, S * blocks,
        hidden, mask, cu_seqlens, pooled, counts, hidden.shape[0], D, hidden.stride(0), blocks,
        HAS_MASK=mask is not None, ROWS=POOL_ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return pooled, counts


def unpool(
    grad_pooled: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes the gradient of the pooled rows into `out` (N, D), contiguous; 0 on rows that are not
    pooled."""
    S, D = grad_pooled.shape
    block, blocks = _blocks(D, UNPOOL_BLOCK)
    launch(
        _unpool_kernel, S * blocks,
        grad_pooled, mask, cu_seqlens, counts, out, out.shape[0], D, blocks,
        HAS_MASK=mask is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _blocks(D: int, most: int) -> tuple[int, int]:
    block = min(most, triton.next_power_of_2(D))
    return block, triton.cdiv(D, block)
