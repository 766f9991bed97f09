"""The PyTorch backend: the functions of `backends.triton` for tensors on devices that Triton does
not drive.

Lean rather than clever: blocks of rows that stay in cache, in-place passes, no copy of the logits
in fp32, ignored rows skipped. Float64 input is computed in float64, everything else in float32, but
for sums over a sequence on the CPU, which are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from mpo_kernels.backends.results import PairLosses, RowDirections, RowStats
from mpo_kernels.labels import IGNORED
from mpo_kernels.options import statistics_dtype

ROWS_BYTES = 2 << 20
"""Bytes of a block of rows in the computing dtype: it should stay in the last-level cache between
its passes."""

_NO_POWER = -1000.0
"""Its exponential is 0 in float64 too, and its product with 0 is 0, where that of -inf is NaN."""


def logprob_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    token_outputs: bool = False,
    moments: bool = False,
) -> RowStats:
    """Statistics of logits (B, T, V) and labels (N,) int64; entropy and arg-max with
    `token_outputs`, and `moments`."""
    partials = logprob_partials(
        logits,
        labels,
        logit_scale=logit_scale,
        softcap=softcap,
        token_outputs=token_outputs,
        moments=moments,
    )
    unknown = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
    partials[:, 3].masked_fill_(unknown, float("nan"))
    return combine(
        partials[None], labels, logits.shape[-1], token_outputs=token_outputs, moments=moments
    )


def logprob_directions(
    logits: torch.Tensor, labels: torch.Tensor, *, logit_scale: float | torch.Tensor
) -> RowDirections:
    """Statistics of logits (B, T, V) in the computing dtype, all rows scored, labels (N,) in [0,
    V); overwrites each row by the direction of its gradient.

    That is q_j, the softmax over the other tokens than the label, and at the label minus their sum,
    which is 1 but for rounding. It takes one exponential, and the gradient none.
    """
    N, V = labels.numel(), logits.shape[-1]
    partials = torch.zeros(N, 4, dtype=logits.dtype, device=logits.device)
    size = max(1, ROWS_BYTES // (V * logits.itemsize))
    for rows in (slice(first, first + size) for first in range(0, N, size)):
        z, at_label = logits.view(N, V)[rows], labels[rows][:, None]
        if not _is_one(logit_scale):
            z.mul_(logit_scale)
        z_label = z.gather(1, at_label)
        peak = z.scatter_(1, at_label, float("-inf")).amax(-1, keepdim=True)
        # A stand-in for the label that is as large as the largest of the others: its share tells
        # their total.
        z.scatter_(1, at_label, peak.masked_fill(peak == float("-inf"), 0))
        torch.softmax(z, -1, out=z)
        share = z.gather(1, at_label)
        # torch.softmax adds up a row less carefully than sum does
        others = z.scatter_(1, at_label, 0).sum(-1, keepdim=True)
        z.scatter_(1, at_label, torch.where(others == 0, -1, -others))
        weighted = torch.zeros_like(others)
        partials[rows] = torch.cat([peak, others / share, weighted, z_label], 1)
    return RowDirections(*combine(partials[None], labels, logits.shape[-1]))


def direction_factors(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logp: torch.Tensor,
    row_grad: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
) -> torch.Tensor:
    """(N,) what the rows that `logprob_directions` left in `logits` (B, T, V) are to be multiplied
    by to be dL/dlogits; row_grad (N,) is dL/dlogp."""
    at_label = logits.view(labels.numel(), -1).gather(1, labels[:, None])[:, 0]
    # at the label the product is dL/dlogp (1 - p)
    return row_grad * logit_scale * -torch.expm1(logp) / at_label


def logprob_partials(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    token_outputs: bool = False,
    moments: bool = False,
) -> torch.Tensor:
    """A slice of the vocabulary, logits (B, T, V), labels (N,) counted from its start -> partials
    (N, 4) for `combine`: peak, total and weighted sum of the columns besides the label, and the
    label's final logit, -inf where another slice has it. With `moments` (N, 6): the sum of the
    squares of exp(z - peak) too, and that of all final logits."""
    V, dtype = logits.shape[-1], statistics_dtype(logits)
    width = 6 if moments else 4
    partials = torch.zeros(labels.numel(), width, dtype=dtype, device=logits.device)
    # one for all blocks: new memory costs more than the arithmetic on it
    scratch = logits.new_empty(0, dtype=dtype)
    for rows, block, keep in _scored_blocks(logits, labels, dtype):
        wanted = labels[rows][keep]
        here = ((wanted >= 0) & (wanted < V))[:, None]
        at_label = wanted.clamp(0, V - 1)[:, None]
        z = _final_logits(block, dtype, logit_scale, softcap)  # (rows, V)
        z_label = z.gather(1, at_label).masked_fill(~here, float("-inf"))
        # The largest of all columns serves as the peak of the others: finite unless all are -inf,
        # and one pass less.
        peak = z.amax(-1, keepdim=True)
        shift = peak.masked_fill(peak == float("-inf"), 0)
        may_overwrite = z is not block and not token_outputs and not moments
        if not may_overwrite and scratch.shape[0] < z.shape[0]:
            scratch = torch.empty_like(z, memory_format=torch.contiguous_format)
        # (rows, V)
        powers = torch.sub(z, shift, out=z if may_overwrite else scratch[: z.shape[0]]).exp_()
        # The label is kept out of the sum, so that p -> 1 keeps its digits.
        powers.scatter_(1, at_label, powers.gather(1, at_label).masked_fill_(here, 0))
        total = powers.sum(-1, keepdim=True)
        weighted = torch.zeros_like(total)
        if token_outputs:
            weighted = torch.where(powers > 0, powers * (z - shift), 0).sum(-1, keepdim=True)
        sums = [peak, total, weighted, z_label]
        if moments:
            sums += [powers.square_().sum(-1, keepdim=True), z.sum(-1, keepdim=True)]
        values = torch.cat(sums, 1)
        partials[rows] = partials[rows].masked_scatter(keep[:, None], values)
    return partials


def combine(
    partials: torch.Tensor,
    labels: torch.Tensor,
    vocab: int,
    *,
    token_outputs: bool = False,
    moments: bool = False,
) -> RowStats:
    """partials (parts, N, 4), with `moments` (parts, N, 6), of `vocab` columns together, labels
    (N,) -> what `logprob_stats` returns."""
    scored = labels != IGNORED
    part_peak, part_total, part_weighted, part_label, *others = partials.unbind(-1)  # (parts, N)
    peak, z_label = part_peak.amax(0), part_label.amax(0)  # amax hands NaN on
    apart = (part_peak - peak).masked_fill(part_total == 0, 0)  # 0 also where -inf - -inf would be
    total = (part_total * apart.exp()).sum(0)
    # -inf where no other column counts
    d = torch.where(total == 0, float("-inf"), peak - z_label + total.log())
    new_peak = torch.maximum(peak, z_label)
    new_total = (
        torch.where(total == 0, 0, total * (peak - new_peak).exp()) + (z_label - new_peak).exp()
    )
    # Where all columns are -inf, one is +inf or one is NaN, the whole row's softmax is NaN, and so
    # is its total by itself: inf - inf.
    logp = torch.where(
        new_total.isnan(), new_total, -torch.logaddexp(d, torch.zeros_like(d))
    ).where(scored, 0)
    found = RowStats(logp, torch.stack([new_peak, new_total], -1), None, None)
    if moments:
        part_squares, part_sum = others
        squares = (part_squares * apart.exp().square()).sum(0)
        both = torch.stack([_log_sum_squares(d, logp, total, squares), part_sum.sum(0) / vocab], -1)
        found = found._replace(moments=both.where(scored[:, None], 0))
    if not token_outputs:
        return found
    weighted = ((part_weighted + part_total * apart) * apart.exp()).sum(0)
    at_label = torch.where(logp == float("-inf"), 0, -logp.exp() * logp)
    tail = torch.log1p((-d.abs()).exp())
    log_others = torch.where(d > 0, total.log(), z_label - peak) + tail  # log Z - peak
    elsewhere = torch.where(total > 0, -torch.expm1(logp) * (log_others - weighted / total), 0)
    # The peak may be the label's own: equal to it is the most that the others can be.
    is_argmax = (z_label >= peak) & scored
    return found._replace(entropy=(at_label + elsewhere).where(scored, 0), is_argmax=is_argmax)


def _log_sum_squares(
    d: torch.Tensor, logp: torch.Tensor, total: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """Equation (11), with d = log((1 - p_y) / p_y): neither a likely label nor an impossible one
    loses digits."""
    log_others = -torch.logaddexp(-d, torch.zeros_like(d))  # log(1 - p_y)
    elsewhere = 2 * (log_others - total.log()) + squares.log()
    return torch.logaddexp(2 * logp, elsewhere.masked_fill(squares == 0, float("-inf")))


def logprob_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: RowStats,
    row_grad: torch.Tensor,
    out: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    entropy_grad: torch.Tensor | None = None,
) -> None:
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (B * T,) is
    dL/dlogp, entropy_grad (B * T,) dL/dentropy, which needs the rows' entropy."""
    dtype, T = statistics_dtype(logits), logits.shape[1]
    ignored = labels == IGNORED
    if bool(ignored.any()):
        out.masked_fill_(ignored.view(out.shape[:2])[..., None], 0)
    for rows, block, keep in _scored_blocks(logits, labels, dtype):
        batch, first = divmod(rows.start, T)
        target = out[batch, first : first + rows.stop - rows.start]
        upstream = row_grad[rows][keep].to(dtype)[:, None] * logit_scale
        logp = stats.logp[rows][keep][:, None]
        peak, total = stats.normalizer[rows][keep].split(1, dim=1)
        wanted = labels[rows][keep][:, None]
        at_label = wanted.clamp(0, logits.shape[2] - 1)
        not_label = upstream * -torch.expm1(logp)
        # else the label is in another slice of the vocabulary, or unknown
        here = at_label == wanted
        # Where the result has the computing dtype it is computed where it goes.
        buffer = target if target.dtype == dtype and target.shape == block.shape else None
        if softcap is None:
            z = (
                block
                if _is_one(logit_scale)
                else torch.mul(block.to(dtype), logit_scale, out=buffer)
            )
            grad = torch.sub(z, peak, out=buffer)
        else:
            t = torch.mul(block.to(dtype), logit_scale / softcap).tanh_()
            grad = torch.mul(t, softcap).sub_(peak)
        if entropy_grad is None or stats.entropy is None:
            grad.exp_().mul_(-upstream / total)
        else:
            entropy = stats.entropy[rows][keep][:, None]
            slope = entropy_grad[rows][keep].to(dtype)[:, None] * logit_scale
            # -(log p + H) p with log p = z - peak - log total; 0 log 0 is 0
            grad.clamp_min_(_NO_POWER)
            factor = torch.mul(grad, slope).add_(upstream + slope * (entropy - total.log()))
            grad.exp_().mul_(factor.div_(-total))
            log_label = logp.clamp_min(_NO_POWER)
            not_label -= slope * log_label.exp() * (log_label + entropy)
        grad.scatter_(1, at_label, torch.where(here, not_label, grad.gather(1, at_label)))
        if softcap is not None:
            # 1 - tanh^2 = 1 / cosh^2, which does not cancel where the cap saturates.
            grad.mul_(
                torch.mul(block.to(dtype), logit_scale / softcap, out=t)
                .cosh_()
                .square_()
                .reciprocal_()
            )
        if grad is not target:
            target[keep] = grad.to(target.dtype)


def sequence_sums(
    logp: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """(N,) log-probs -> (S, 2): their sum over each sequence, and its number of scored rows."""
    # One row after the other: in float32 the sum of a long response would lose digits that the
    # difference of two such sums needs.
    # not every other device has float64
    dtype = torch.float64 if logp.device.type == "cpu" else logp.dtype
    rows = torch.stack([logp.to(dtype), (labels != IGNORED).to(dtype)], -1)
    zeros = torch.zeros(cu_seqlens.numel() - 1, 2, dtype=dtype, device=logp.device)
    return zeros.index_add(0, _sequence_of_row(cu_seqlens, labels.numel()), rows).to(logp.dtype)


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
    """(N,) log-probs -> losses of P pairs and what they were computed from.

    `sums` (2P, 2): the sequences' sums where the rows here are only a part of them
    (context-parallel).
    """
    total, counts = (sequence_sums(logp, labels, cu_seqlens) if sums is None else sums).unbind(-1)
    means = total / counts
    chosen, rejected = means.chunk(2)
    gaps = chosen - rejected
    weight = torch.ones_like(gaps) if pair_weights is None else pair_weights
    error = (beta * gaps - reference_gap).where(weight != 0, 0)  # of fillers, too, if not finite
    return PairLosses(
        losses=weight * error * error,
        means=means,
        gaps=gaps,
        counts=counts,
        gap_grads=2 * beta * weight * error,
    )


def row_grads(
    gap_grads: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """dL/dRG (P,) -> dL/dlogp of every row (N,), 0 for ignored rows."""
    per_sequence = torch.cat([gap_grads, -gap_grads]) / counts
    of_rows = per_sequence[_sequence_of_row(cu_seqlens, labels.numel())]
    return of_rows.where(labels != IGNORED, 0)


def pool(
    hidden: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, D), mask (N,) uint8 or None, cu_seqlens (S + 1,) int32 -> means (S, D) and row
    counts (S,)."""
    dtype = statistics_dtype(hidden)
    pooled, counts = [], []
    for rows in _slices(cu_seqlens):
        kept = hidden[rows] if mask is None else hidden[rows][mask[rows].bool()]
        pooled.append(kept.sum(0, dtype=dtype) / kept.shape[0])
        counts.append(kept.shape[0])
    return torch.stack(pooled), torch.tensor(counts, dtype=dtype, device=hidden.device)


def unpool(
    grad_pooled: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes the gradient of the pooled rows into `out` (N, D); 0 on rows that are not pooled."""
    for rows, grad, count in zip(_slices(cu_seqlens), grad_pooled, counts, strict=True):
        out[rows] = (grad / count).to(out.dtype)
    if mask is not None:
        out.masked_fill_(~mask.bool()[:, None], 0)


def _final_logits(
    block: torch.Tensor,
    dtype: torch.dtype,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
) -> torch.Tensor:
    z = block.to(dtype)
    if softcap is not None:
        return torch.mul(z, logit_scale / softcap).tanh_().mul_(softcap)
    return z if _is_one(logit_scale) else z * logit_scale


def _is_one(number: float | torch.Tensor) -> bool:
    """Without reading a tensor."""
    return not isinstance(number, torch.Tensor) and number == 1.0


def _scored_blocks(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, logits of the scored ones among them, which of them are scored), in blocks of rows
    that stay in cache.

    A block lies within one batch entry, so any pair of outer strides is a plain slice, and a block
    that is all scored is not copied.
    """
    B, T, V = logits.shape
    size = max(1, ROWS_BYTES // (V * dtype.itemsize))
    for batch in range(B):
        for first in range(0, T, size):
            last = min(first + size, T)
            rows = slice(batch * T + first, batch * T + last)
            keep = labels[rows] != IGNORED
            if bool(keep.all()):
                yield rows, logits[batch, first:last], keep
            elif bool(keep.any()):
                yield rows, logits[batch, first:last][keep], keep


def _sequence_of_row(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.repeat_interleave(cu_seqlens.diff().to(torch.int64), output_size=rows)


def _slices(cu_seqlens: torch.Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]
