"""From log-probabilities of tokens to the loss of pairs: tiny, deterministic, and the only device
place of the loss formula.

With avg the mean over a sequence's scored rows, chosen sequence p and rejected sequence P + p
(equations 1, 2 and 8):

    RG_p = avg_p - avg_{P+p}        e_p = beta * RG_p - RG_ref_p
    loss_p = w_p * e_p^2            dloss_p/dRG_p = 2 * beta * w_p * e_p
    dRG_p/dlogp_row = +1/|y_p| on chosen rows, -1/|y_{P+p}| on rejected rows
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mpo_kernels.backends.results import PairLosses
from mpo_kernels.backends.triton.launch import kernel, launch
from mpo_kernels.labels import IGNORED

BLOCK = 1024
"""Rows of a sequence that one program reads at a time."""


@triton.jit
def _sequence_sum(logp_ptr, labels_ptr, start, end, ignore_index, BLOCK: tl.constexpr):
    """Sum of a sequence's log-probabilities and the number of its scored rows, always added in the
    same order."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < end
        label = tl.load(labels_ptr + rows, mask=inside, other=ignore_index)
        total += tl.load(logp_ptr + rows, mask=inside, other=0.0)
        count += tl.where(label != ignore_index, 1.0, 0.0)
    return tl.sum(total, axis=0), tl.sum(count, axis=0)


@triton.jit
def _bounds(cu_seqlens_ptr, sequence, N):
    """Rows [start, end) of a sequence, clamped: wrong offsets may give wrong numbers but never
    leave the tensors."""
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    return tl.maximum(start, 0), tl.minimum(end, N)


@kernel
def _sequence_sums_kernel(
    logp_ptr,  # (N,) float32, 0 for ignored rows
    labels_ptr,  # (N,) int64
    cu_seqlens_ptr,  # (S + 1,) int32
    sums_ptr,  # (S, 2) float32 out: sum of log-probabilities, scored rows
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, end = _bounds(cu_seqlens_ptr, sequence, N)
    total, count = _sequence_sum(logp_ptr, labels_ptr, start, end, ignore_index, BLOCK)
    tl.store(sums_ptr + 2 * sequence, total)
    tl.store(sums_ptr + 2 * sequence + 1, count)


@kernel
def _pair_kernel(
    sums_ptr,  # (2P, 2) float32, read instead of the rows with HAS_SUMS
    logp_ptr,  # (N,) float32, 0 for ignored rows
    labels_ptr,  # (N,) int64
    cu_seqlens_ptr,  # (2P + 1,) int32
    reference_gap_ptr,  # (P,) float32
    weights_ptr,  # (P,) float32, not read unless HAS_WEIGHTS
    means_ptr,  # (2P,) float32 out
    counts_ptr,  # (2P,) float32 out
    gap_ptr,  # (P,) float32 out
    loss_ptr,  # (P,) float32 out
    gap_grad_ptr,  # (P,) float32 out: dloss/dRG
    N,
    P,
    beta,  # a number, or with BETA_IS_STORED a pointer to one
    ignore_index,
    BETA_IS_STORED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Equations (1) and (2), and dloss/dRG."""
    pair = tl.program_id(0)
    if BETA_IS_STORED:
        beta = tl.load(beta)
    if HAS_SUMS:
        chosen_sum = tl.load(sums_ptr + 2 * pair)
        chosen_count = tl.load(sums_ptr + 2 * pair + 1)
        rejected_sum = tl.load(sums_ptr + 2 * (P + pair))
        rejected_count = tl.load(sums_ptr + 2 * (P + pair) + 1)
    else:
        start, end = _bounds(cu_seqlens_ptr, pair, N)
        chosen_sum, chosen_count = _sequence_sum(
            logp_ptr, labels_ptr, start, end, ignore_index, BLOCK
        )
        start, end = _bounds(cu_seqlens_ptr, P + pair, N)
        rejected_sum, rejected_count = _sequence_sum(
            logp_ptr, labels_ptr, start, end, ignore_index, BLOCK
        )
    chosen = chosen_sum / chosen_count
    rejected = rejected_sum / rejected_count
    gap = chosen - rejected
    error = beta * gap - tl.load(reference_gap_ptr + pair)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + pair)
        error = tl.where(weight != 0.0, error, 0.0)  # of a filler, too, if it is not finite
    tl.store(means_ptr + pair, chosen)
    tl.store(means_ptr + P + pair, rejected)
    tl.store(counts_ptr + pair, chosen_count)
    tl.store(counts_ptr + P + pair, rejected_count)
    tl.store(gap_ptr + pair, gap)
    tl.store(loss_ptr + pair, weight * error * error)
    tl.store(gap_grad_ptr + pair, 2.0 * beta * weight * error)


@kernel
def _row_grad_kernel(
    gap_grad_ptr,  # (P,) float32: dL/dRG
    counts_ptr,  # (2P,) float32
    labels_ptr,  # (N,) int64
    cu_seqlens_ptr,  # (2P + 1,) int32
    row_grad_ptr,  # (N,) float32 out
    N,
    P,
    ignore_index,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    is_chosen = sequence < P
    pair = tl.where(is_chosen, sequence, sequence - P)
    grad = (
        tl.where(is_chosen, 1.0, -1.0)
        * tl.load(gap_grad_ptr + pair)
        / tl.load(counts_ptr + sequence)
    )
    start, end = _bounds(cu_seqlens_ptr, sequence, N)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < end
        label = tl.load(labels_ptr + rows, mask=inside, other=ignore_index)
        tl.store(row_grad_ptr + rows, tl.where(label != ignore_index, grad, 0.0), mask=inside)


def sequence_sums(
    logp: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """(N,) log-probs -> (S, 2) float32: their sum over each sequence, and its number of scored
    rows."""
    S = cu_seqlens.numel() - 1
    sums = torch.empty(S, 2, dtype=torch.float32, device=logp.device)
    launch(
        _sequence_sums_kernel, S,
        logp, labels, cu_seqlens, sums, logp.numel(), IGNORED, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return sums


def pair_loss(
    logp: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    *,
    beta: float | torch.Tensor,
    sums: torch.Tensor | None = None,
) -> PairLosses:
    """(N,) log-probs -> losses of P pairs and what they were computed from, all float32.

    beta: a number, or () float32 on the device.
    `sums` (2P, 2): the sequences' sums where the rows here are only a part of them
    (context-parallel).
    """
    P, is_stored = reference_gap.numel(), isinstance(beta, torch.Tensor)
    losses, means, gaps, counts, gap_grads = found = PairLosses(
        *(torch.empty(n, dtype=torch.float32, device=logp.device) for n in (P, 2 * P, P, 2 * P, P))
    )
    launch(
        _pair_kernel, P,
        sums, logp, labels, cu_seqlens, reference_gap, pair_weights,
        means, counts, gaps, losses, gap_grads,
        logp.numel(), P, beta if is_stored else float(beta), IGNORED,
        BETA_IS_STORED=is_stored, HAS_SUMS=sums is not None, HAS_WEIGHTS=pair_weights is not None,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return found


def row_grads(
    gap_grads: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """dL/dRG (P,) -> dL/dlogp of every row (N,) float32, 0 for ignored rows."""
    found = torch.zeros(labels.numel(), dtype=torch.float32, device=labels.device)
    P = gap_grads.numel()
    launch(
        _row_grad_kernel, 2 * P,
        gap_grads, counts, labels, cu_seqlens, found, labels.numel(), P, IGNORED,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return found
