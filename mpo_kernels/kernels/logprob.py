"""Log-probabilities of labels and their gradient: the two kernels that touch every logit.

With final logits z, label y, peak m = max z, total = sum exp(z - m) and the upstream gradient g of a row's log-probability:

    logp  = -log(1 + sum over j != y of exp(z_j - z_y))                      one read of the row
    dL/du = g * dz/du * (1 - p_y at the label, -p_j elsewhere)               one read and one write
    p_j = exp(z_j - m) / total        1 - p_y = -expm1(logp)
    z = cap * tanh(scale * u / cap)  ->  dz/du = scale * (1 - (z / cap)^2)

The label is kept out of the sum, so a label with p_y -> 1 keeps its digits in logp and in 1 - p_y; m and total are kept apart, so large
logits
lose none to the rounding of a log-sum-exp. An ignored row reads nothing in either kernel. Bytes per bf16 logit: 2 forward, 4 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STATS_BLOCK = 8192
"""Columns per step of the statistics: 32 elements a thread at 8 warps, i.e. four 128-bit loads of bf16 in flight, without spills."""

GRAD_BLOCK = 4096
"""Columns per program of the gradient. Half of that: where an odd vocabulary forbids vector access, addresses take twice the registers."""


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2x) + 1): right at both infinities, and exact to fp32 rounding relative to 1, which scaled by the cap is what z needs.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1 to full relative precision: 2 atanh(s) with s = x / (2 + x) <= 1/3, whose series needs eight terms in fp32.
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _one_minus_exp(x):
    # 1 - exp(x) for x <= 0 to full relative precision: near 0, where the difference would cancel, by the series of exp.
    series = 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _logprob_stats_kernel(
    logits_ptr,  # (B, T, V) any float, last dimension contiguous
    labels_ptr,  # (B * T,) int64
    logp_ptr,  # (B * T,) float32 out: 0 for ignored rows, NaN for labels outside [0, V)
    normalizer_ptr,  # (B * T, 2) float32 out: peak and total, not written for ignored rows
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
    else:
        row_ptr = logits_ptr + (row // T) * stride_b + (row % T) * stride_t
        peak = -float("inf")  # of the other columns
        total = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            others = (columns < V) & (columns != label)
            u = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)  # (BLOCK,)
            if HAS_SCALE:
                u = u * logit_scale
            if HAS_SOFTCAP:
                u = softcap * _tanh(u * inverse_softcap)
            z = tl.where(others, u, -float("inf"))  # after the cap, or padding would become -cap
            new_peak = tl.maximum(peak, tl.max(z, axis=0))
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # a block of -inf must not make inf - inf
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), axis=0)
            peak = new_peak
        known = (label >= 0) & (label < V)
        z_label = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        if HAS_SCALE:
            z_label = z_label * logit_scale
        if HAS_SOFTCAP:
            z_label = softcap * _tanh(z_label * inverse_softcap)
        # logp = -log(1 + exp(d)), d = log of the other columns' sum relative to the label. Both branches of |d| stay finite.
        d = (peak - z_label) + tl.log(total)
        d = tl.where(total == 0.0, -float("inf"), d)  # a vocabulary of one token
        tl.store(logp_ptr + row, -(tl.where(d > 0.0, d, 0.0) + _log1p(tl.exp(-tl.abs(d)))))
        new_peak = tl.maximum(peak, z_label)
        tl.store(normalizer_ptr + 2 * row, new_peak)
        tl.store(normalizer_ptr + 2 * row + 1, total * tl.exp(peak - new_peak) + tl.exp(z_label - new_peak))


@triton.jit
def _logprob_grad_kernel(
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (B * T,) int64
    logp_ptr,  # (B * T,) float32
    normalizer_ptr,  # (B * T, 2) float32
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
    # One program per block of one row: every block is independent, so few rows still fill the GPU. Grid on axis 0, which has no 65,535
    # limit.
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
        peak = tl.load(normalizer_ptr + 2 * row)
        slope = tl.load(row_grad_ptr + row)
        inverse_total = 1.0 / tl.load(normalizer_ptr + 2 * row + 1)
        not_label = _one_minus_exp(tl.load(logp_ptr + row))
        u = tl.load(logits_ptr + batch * stride_b + position * stride_t + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            u = u * logit_scale
            slope = slope * logit_scale
        if HAS_SOFTCAP:
            t = _tanh(u * inverse_softcap)
            z = softcap * t
            grad = slope * (1.0 - t * t) * tl.where(columns == label, not_label, -tl.exp(z - peak) * inverse_total)
        else:
            grad = slope * tl.where(columns == label, not_label, -tl.exp(u - peak) * inverse_total)
        tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def logprob_stats(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, logit_scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, T, V), labels (B * T,) int64 -> log-probabilities (B * T,) and normalizers (B * T, 2) (peak, total), both float32."""
    B, T, V = logits.shape
    logp = torch.empty(B * T, dtype=torch.float32, device=logits.device)
    normalizer = torch.empty(B * T, 2, dtype=torch.float32, device=logits.device)
    if B * T:
        _logprob_stats_kernel[(B * T,)](
            logits, labels, logp, normalizer, T, V, logits.stride(0), logits.stride(1), ignore_index,
            *_softcap_arguments(logit_scale, softcap), **_tile(V, STATS_BLOCK),
        )  # fmt: skip
    return logp, normalizer


def logprob_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    row_grad: torch.Tensor,
    out: torch.Tensor,
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (B * T,) float32 is dL/dlogp."""
    B, T, V = logits.shape
    tile = _tile(V, GRAD_BLOCK)
    blocks = triton.cdiv(V, tile["BLOCK"])
    if B * T:
        _logprob_grad_kernel[(B * T * blocks,)](
            logits, labels, logp, normalizer, row_grad, out, T, V, blocks, logits.stride(0), logits.stride(1),
            out.stride(0), out.stride(1), ignore_index, *_softcap_arguments(logit_scale, softcap), **tile,
        )  # fmt: skip


def _softcap_arguments(logit_scale: float, softcap: float | None) -> tuple:
    """(logit_scale, softcap, 1 / softcap, HAS_SCALE, HAS_SOFTCAP): reciprocals instead of a division per element."""
    cap = 1.0 if softcap is None else float(softcap)
    return float(logit_scale), cap, 1.0 / cap, logit_scale != 1.0, softcap is not None


def _tile(V: int, most: int) -> dict[str, int]:
    block = min(most, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": 8 if block >= 4096 else 4}
