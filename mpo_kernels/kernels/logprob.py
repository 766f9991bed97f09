"""Log-probabilities of labels and their gradient: the two kernels that touch every logit.

With final logits z, lse = log sum exp z, and the upstream gradient g of a row's log-probability:

    logp  = z[label] - lse                                        one read of the row
    dL/du = g * (onehot(label) - exp(z - lse)) * dz/du            one read and one write
    z = cap * tanh(scale * u / cap)  ->  dz/du = scale * (1 - (z / cap)^2)

An ignored row reads nothing in either kernel. Bytes per bf16 logit: 2 forward, 4 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_BLOCK = 8192
"""Columns per block: 32 elements a thread at 8 warps, i.e. four 128-bit loads of bf16 in flight, without spills."""


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2x) + 1): right at both infinities, and exact to fp32 rounding relative to 1, which scaled by the cap is what z needs.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _logprob_stats_kernel(
    logits_ptr,  # (B, T, V) any float, last dimension contiguous
    labels_ptr,  # (B * T,) int64
    logp_ptr,  # (B * T,) float32 out: 0 for ignored rows, NaN for labels outside [0, V)
    lse_ptr,  # (B * T,) float32 out: 0 for ignored rows
    T,
    V,
    stride_b,
    stride_t,
    ignore_index,
    logit_scale,
    softcap,
    inverse_softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * V exceeds 2^31
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(logp_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + (row // T) * stride_b + (row % T) * stride_t
        peak = -float("inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            u = tl.load(row_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)  # (BLOCK,)
            if HAS_SCALE:
                u = u * logit_scale
            if HAS_SOFTCAP:
                u = softcap * _tanh(u * inverse_softcap)
            z = tl.where(inside, u, -float("inf"))  # after the cap, or padding would become -cap
            new_peak = tl.maximum(peak, tl.max(z, axis=0))
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # a block of -inf must not make inf - inf
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), axis=0)
            peak = new_peak
        lse = peak + tl.log(total)
        known = (label >= 0) & (label < V)
        u = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        if HAS_SCALE:
            u = u * logit_scale
        if HAS_SOFTCAP:
            u = softcap * _tanh(u * inverse_softcap)
        tl.store(logp_ptr + row, u - lse)
        tl.store(lse_ptr + row, lse)


@triton.jit
def _logprob_grad_kernel(
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B * T,) int64
    lse_ptr,  # (B * T,) float32
    row_grad_ptr,  # (B * T,) float32: dL/dlogp of each row, not read for ignored rows
    grad_ptr,  # (B, T, V) out, may be logits_ptr
    T,
    V,
    blocks,  # blocks of columns per row
    stride_b,
    stride_t,
    grad_stride_b,
    grad_stride_t,
    ignore_index,
    logit_scale,
    softcap,
    inverse_softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program per block of one row: every block is independent, so few rows still fill the GPU. Grid on axis 0, which has no 65,535 limit.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    batch = row // T
    position = row % T
    out_ptr = grad_ptr + batch * grad_stride_b + position * grad_stride_t + columns
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(out_ptr, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=inside)
    else:
        lse = tl.load(lse_ptr + row)
        upstream = tl.load(row_grad_ptr + row)
        u = tl.load(logits_ptr + batch * stride_b + position * stride_t + columns, mask=inside, other=0.0).to(tl.float32)
        slope = upstream
        if HAS_SCALE:
            u = u * logit_scale
            slope = slope * logit_scale
        if HAS_SOFTCAP:
            t = _tanh(u * inverse_softcap)
            u = softcap * t
            grad = slope * (1.0 - t * t) * (tl.where(columns == label, 1.0, 0.0) - tl.exp(u - lse))
        else:
            grad = slope * (tl.where(columns == label, 1.0, 0.0) - tl.exp(u - lse))
        tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def logprob_stats(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, logit_scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, T, V), labels (B * T,) int64 -> log-probability and log-sum-exp of each row, both (B * T,) float32."""
    B, T, V = logits.shape
    logp = torch.empty(B * T, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logp)
    if B * T:
        _logprob_stats_kernel[(B * T,)](
            logits, labels, logp, lse, T, V, logits.stride(0), logits.stride(1), ignore_index,
            *_softcap_arguments(logit_scale, softcap), **_tile(V),
        )  # fmt: skip
    return logp, lse


def logprob_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    out: torch.Tensor,
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (B * T,) float32 is dL/dlogp."""
    B, T, V = logits.shape
    tile = _tile(V)
    blocks = triton.cdiv(V, tile["BLOCK"])
    if B * T:
        _logprob_grad_kernel[(B * T * blocks,)](
            logits, labels, lse, row_grad, out, T, V, blocks, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1),
            ignore_index, *_softcap_arguments(logit_scale, softcap), **tile,
        )  # fmt: skip


def _softcap_arguments(logit_scale: float, softcap: float | None) -> tuple:
    """(logit_scale, softcap, 1 / softcap, HAS_SCALE, HAS_SOFTCAP): reciprocals instead of a division per element."""
    cap = 1.0 if softcap is None else float(softcap)
    return float(logit_scale), cap, 1.0 / cap, logit_scale != 1.0, softcap is not None


def _tile(V: int) -> dict[str, int]:
    block = min(MAX_BLOCK, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}
