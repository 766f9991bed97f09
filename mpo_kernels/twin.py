"""The PyTorch backend: the functions of `mpo_kernels.kernels` for tensors on devices that Triton does not drive.

Lean rather than clever: blocks of rows that stay in cache, in-place passes, no copy of the logits in fp32, ignored rows skipped.
Float64 input is computed in float64, everything else in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

ROWS_BYTES = 4 << 20
"""Bytes of a block of rows in the computing dtype: it should stay in the last-level cache between its passes."""


def logprob_stats(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, logit_scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, T, V), labels (B * T,) int64 -> log-probabilities (B * T,) and normalizers (B * T, 2) (peak, total)."""
    B, T, V = logits.shape
    dtype = _computing_dtype(logits)
    logp = torch.zeros(B * T, dtype=dtype, device=logits.device)
    normalizer = torch.ones(B * T, 2, dtype=dtype, device=logits.device)
    for rows, block, keep in _scored_blocks(logits, labels, ignore_index, dtype):
        wanted = labels[rows][keep]
        known = (wanted >= 0) & (wanted < V)
        at_label = wanted.where(known, 0)[:, None]
        z = _final_logits(block, dtype, logit_scale, softcap)  # (rows, V)
        peak = z.amax(-1, keepdim=True)
        shifted = z.gather(1, at_label) - peak
        powers = torch.sub(z, peak, out=None if z is block else z).exp_()  # (rows, V)
        # The label is kept out of the sum, so that p -> 1 keeps its digits.
        others = powers.scatter_(1, at_label, 0).sum(-1, keepdim=True)
        gap = others.log() - shifted
        logp[rows] = logp[rows].masked_scatter(keep, -torch.logaddexp(gap, torch.zeros_like(gap))[:, 0].where(known, float("nan")))
        normalizer[rows] = normalizer[rows].masked_scatter(keep[:, None], torch.cat([peak, others + shifted.exp()], 1))
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
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (B * T,) is dL/dlogp."""
    dtype, T = _computing_dtype(logits), logits.shape[1]
    ignored = labels == ignore_index
    if bool(ignored.any()):
        out.masked_fill_(ignored.view(out.shape[:2])[..., None], 0)
    for rows, block, keep in _scored_blocks(logits, labels, ignore_index, dtype):
        batch, first = divmod(rows.start, T)
        target = out[batch, first : first + rows.stop - rows.start]
        slope = row_grad[rows][keep].to(dtype)[:, None] * logit_scale
        peak, total = normalizer[rows][keep].split(1, dim=1)
        at_label = labels[rows][keep].clamp(0, logits.shape[2] - 1)[:, None]
        not_label = slope * -torch.expm1(logp[rows][keep][:, None])
        # Where the result has the computing dtype it is computed where it goes.
        buffer = target if target.dtype == dtype and target.shape == block.shape else None
        if softcap is None:
            z = block if logit_scale == 1.0 else torch.mul(block.to(dtype), logit_scale, out=buffer)
            grad = torch.sub(z, peak, out=buffer).exp_().mul_(-slope / total).scatter_(1, at_label, not_label)
        else:
            t = torch.mul(block.to(dtype), logit_scale / softcap).tanh_()
            grad = torch.mul(t, softcap).sub_(peak).exp_().mul_(-slope / total).scatter_(1, at_label, not_label)
            grad.mul_(t.square_().neg_().add_(1))
        if grad is not target:
            target[keep] = grad.to(target.dtype)


def pair_loss(
    logp: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    *,
    beta: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) log-probs -> sequence means (2P,), scored counts (2P,), gaps (P,), weighted losses (P,), dloss/dgap (P,)."""
    scored = (labels != ignore_index).to(logp.dtype)
    sequence = _sequence_of_row(cu_seqlens, labels.numel())
    zeros = torch.zeros(cu_seqlens.numel() - 1, dtype=logp.dtype, device=logp.device)
    counts = zeros.index_add(0, sequence, scored)
    means = zeros.index_add(0, sequence, logp) / counts
    chosen, rejected = means.chunk(2)
    gap = chosen - rejected
    error = beta * gap - reference_gap
    weight = torch.ones_like(gap) if pair_weights is None else pair_weights
    return means, counts, gap, weight * error * error, 2 * beta * weight * error


def row_grads(
    gap_grad: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor, *, ignore_index: int
) -> torch.Tensor:
    """dL/dRG (P,) -> dL/dlogp of every row (N,), 0 for ignored rows."""
    per_sequence = torch.cat([gap_grad, -gap_grad]) / counts
    return per_sequence[_sequence_of_row(cu_seqlens, labels.numel())].where(labels != ignore_index, 0)


def pool(hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, D), mask (N,) uint8 or None, cu_seqlens (S + 1,) int32 -> means (S, D) and row counts (S,)."""
    dtype = _computing_dtype(hidden)
    pooled, counts = [], []
    for rows in _slices(cu_seqlens):
        kept = hidden[rows] if mask is None else hidden[rows][mask[rows].bool()]
        pooled.append(kept.sum(0, dtype=dtype) / kept.shape[0])
        counts.append(kept.shape[0])
    return torch.stack(pooled), torch.tensor(counts, dtype=dtype, device=hidden.device)


def unpool(grad_pooled: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor, counts: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the gradient of the pooled rows into `out` (N, D); 0 on rows that are not pooled."""
    for rows, grad, count in zip(_slices(cu_seqlens), grad_pooled, counts, strict=True):
        out[rows] = (grad / count).to(out.dtype)
    if mask is not None:
        out.masked_fill_(~mask.bool()[:, None], 0)


def _final_logits(block: torch.Tensor, dtype: torch.dtype, logit_scale: float, softcap: float | None) -> torch.Tensor:
    z = block.to(dtype)
    if softcap is not None:
        return torch.mul(z, logit_scale / softcap).tanh_().mul_(softcap)
    return z if logit_scale == 1.0 else z * logit_scale


def _scored_blocks(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, logits of the scored ones among them, which of them are scored), in blocks of rows that stay in cache.

    A block lies within one batch entry, so any pair of outer strides is a plain slice, and a block that is all scored is not copied.
    """
    B, T, V = logits.shape
    size = max(1, ROWS_BYTES // (V * dtype.itemsize))
    for batch in range(B):
        for first in range(0, T, size):
            last = min(first + size, T)
            rows = slice(batch * T + first, batch * T + last)
            keep = labels[rows] != ignore_index
            if bool(keep.all()):
                yield rows, logits[batch, first:last], keep
            elif bool(keep.any()):
                yield rows, logits[batch, first:last][keep], keep


def _computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sequence_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.repeat_interleave(cu_seqlens.diff().to(torch.int64), output_size=rows)


def _slices(cu_seqlens: torch.Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]
