"""The PyTorch backend: the functions of `mpo_kernels.kernels` for tensors on devices that Triton does not drive.

Lean rather than clever: blocks of rows that stay in cache, in-place passes, no copy of the logits in fp32, ignored rows skipped.
Float64 input is computed in float64, everything else in float32.
"""

from __future__ import annotations

import torch

ROWS_BYTES = 4 << 20
"""Bytes of a block of rows in the computing dtype: it should stay in the last-level cache between its passes."""


def logprob_stats(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, logit_scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, T, V), labels (B * T,) int64 -> log-probability and log-sum-exp of each row, both (B * T,)."""
    B, T, V = logits.shape
    dtype = _computing_dtype(logits)
    logp = torch.zeros(B * T, dtype=dtype, device=logits.device)
    lse = torch.zeros_like(logp)
    scored = labels != ignore_index
    known = (labels >= 0) & (labels < V)
    for batch, first, last in _row_blocks(B, T, V, dtype):
        rows = slice(batch * T + first, batch * T + last)
        keep = scored[rows]
        block, wanted, ok = _kept(logits[batch, first:last], keep), labels[rows][keep], known[rows][keep]
        if not block.shape[0]:
            continue
        z = _final_logits(block, dtype, logit_scale, softcap)  # (rows, V)
        block_lse = torch.logsumexp(z, -1)
        picked = z.gather(1, wanted.where(ok, 0)[:, None])[:, 0].where(ok, float("nan"))
        logp[rows] = logp[rows].masked_scatter(keep, picked - block_lse)
        lse[rows] = lse[rows].masked_scatter(keep, block_lse)
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
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (B * T,) is dL/dlogp."""
    B, T, V = logits.shape
    dtype = _computing_dtype(logits)
    scored = labels != ignore_index
    for batch, first, last in _row_blocks(B, T, V, dtype):
        rows = slice(batch * T + first, batch * T + last)
        target = out[batch, first:last]
        keep = scored[rows]
        whole = bool(keep.all())
        if not whole:
            target.masked_fill_(~keep[:, None], 0)
            if not keep.any():
                continue
        block, wanted = _kept(logits[batch, first:last], keep), labels[rows][keep].clamp(0, V - 1)[:, None]
        upstream = row_grad[rows][keep].to(dtype)[:, None]
        # Where the result has the computing dtype it is computed where it goes; the inputs of a block are read before they are overwritten.
        buffer = target if whole and target.dtype == dtype else None
        if softcap is None:
            z = torch.mul(block, logit_scale, out=buffer) if logit_scale != 1.0 else block
            grad = torch.sub(z, lse[rows][keep][:, None], out=buffer).exp_().mul_(-upstream)
            grad.scatter_add_(1, wanted, upstream)
        else:
            t = torch.mul(block.to(dtype), logit_scale / softcap).tanh_()
            grad = torch.sub(t * softcap, lse[rows][keep][:, None]).exp_().mul_(-upstream)
            grad.scatter_add_(1, wanted, upstream)
            grad.mul_(t.square_().neg_().add_(1))
        if logit_scale != 1.0:
            grad.mul_(logit_scale)
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


def _kept(block: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return block if bool(keep.all()) else block[keep]


def _row_blocks(B: int, T: int, V: int, dtype: torch.dtype):
    """(batch, first, last) of blocks of rows within one batch entry, so that any pair of outer strides is a plain slice."""
    rows = max(1, ROWS_BYTES // (V * dtype.itemsize))
    return [(batch, first, min(first + rows, T)) for batch in range(B) for first in range(0, T, rows)]


def _computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sequence_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.repeat_interleave(cu_seqlens.diff().to(torch.int64), output_size=rows)


def _slices(cu_seqlens: torch.Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
