"""Autograd from hidden states through a linear head to the losses of pairs; the [tokens, vocab]
logits never exist as a whole.

Only scored rows reach the head, in chunks of whole pairs. The gradient c_i of a row's
log-probability is known as soon as its pair's gap is, so each chunk does: logits GEMM, statistics,
pair loss, gradient in the place of the logits, dH GEMM, dW GEMM (equation 10): three GEMMs, nothing
recomputed. The gradients are computed in the forward pass and only scaled in backward; backward
needs neither the weight's data (ZeRO-3 may have partitioned it by then) nor the caller's hidden
states.

A single chunk of few rows, about D, is smaller than dW. Its logits' gradients and rows are then
kept for backward instead, which scales the rows before the dW GEMM and saves the pass over dW. Not
so in half precision, where scaled rows would be rounded once more.

A pair larger than the budget is computed in pieces, whose c is not known until the last of them is.
Its dH rows are scaled by c when it is; so is dW where nothing else is in it yet, hence such pairs
come first. For each further one the logits are computed again: a fourth GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.backends.results import PairLosses, RowStats
from mpo_kernels.ops.chunks import Chunk, Targets, chunks_of, pair_lengths, plan_pairs, scored_rows
from mpo_kernels.ops.gradients import (
    HeadGradients,
    Upstream,
    boosted,
    hidden_grad_dtype,
    scaled_in_backward,
    spread,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.pairs import PairConstants, pair_losses
from mpo_kernels.ops.projection import Head, Needs, Projection, TokenOutputs
from mpo_kernels.ops.stats import row_stats, write_logit_grads
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions, statistics_dtype


class LinearPairLosses(NamedTuple):
    """What P pairs of M labels give. Backward may scale the gradients in place: nobody but it may
    use them."""

    loss: torch.Tensor
    """() sum of the pairs' losses; differentiable."""
    means: torch.Tensor
    """(2P,)"""
    gaps: torch.Tensor
    """(P,)"""
    logp: torch.Tensor
    """(M,), with entropy and is_argmax, where token outputs are asked for, else (0,)."""
    entropy: torch.Tensor
    is_argmax: torch.Tensor
    hidden_grad: torch.Tensor
    """(M, D), or (0,) where not needed."""
    pending: torch.Tensor
    """(M,) factors still to be applied to the rows of `hidden_grad`."""
    weight_grad: torch.Tensor
    """(V, D), or (0, D) where not needed or not yet made."""
    bias_grad: torch.Tensor
    """(V,) or (0,)"""
    kept_grads: torch.Tensor
    """(n, V) the logits' gradients of the only chunk, kept for dW where they are smaller; else n is
    0."""
    kept_hidden: torch.Tensor
    """(n, D) its rows."""


@operator("mpo_kernels::linear_pair_loss", strided=("hidden", "weight"))
def linear_pair_loss_op(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    cu_seqlens: torch.Tensor,
    constants: PairConstants,
    options: LogitOptions,
    needs: Needs,
    may_keep_chunk: bool,
    token_outputs: bool,
) -> LinearPairLosses:
    """hidden (N, D), targets of M labels and cu_seqlens (2P + 1,) on any device -> losses and
    gradients.

    `may_keep_chunk` makes shapes depend on the labels, which no compiler likes.
    """
    plan = _plan(hidden, head, targets, cu_seqlens, options, may_keep_chunk and needs.weight_grad)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        sums = _Sums(hidden, head, plan, constants, options, needs, token_outputs)
        for chunk in plan.chunks:
            sums.add(chunk)
        return sums.result()


@dataclass(frozen=True)
class _Plan:
    """What is computed when."""

    labels: int
    """M."""
    chunks: list[Chunk]
    """Pairs in pieces first: dW can be scaled as a whole while no other pair is in it."""
    counts: torch.Tensor
    """Host (2P,) scored rows of each sequence, in all ranks of a context together."""
    keeps_chunk: bool
    """The only chunk's logits' gradients are kept in place of dW."""


def _plan(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    cu_seqlens: torch.Tensor,
    options: LogitOptions,
    may_keep_chunk: bool,
) -> _Plan:
    """Reads the labels and checks them; host integers, but for the rows of each chunk. All ranks
    of a context plan the same chunks of pairs, for the longest of their parts."""
    parallel, columns = options.parallel, head.weight.shape[0]
    scored = scored_rows(
        targets, cu_seqlens, hidden_rows=hidden.shape[0], columns=columns, parallel=parallel
    )
    longest = scored.lengths if parallel is None else parallel.longest(scored.lengths)
    counts = scored.lengths if parallel is None else parallel.total(scored.lengths)
    lengths, budget = pair_lengths(longest.tolist()), head.rows_per_chunk(hidden, parallel)
    groups = plan_pairs(lengths, budget)
    groups.sort(key=lambda group: sum(lengths[pair] for pair in group) <= budget)
    return _Plan(
        labels=targets.labels.numel(),
        chunks=chunks_of(scored, groups, budget, hidden.device),
        counts=counts,
        keeps_chunk=may_keep_chunk
        and len(groups) == 1
        and sum(lengths) <= budget
        and _is_kept(sum(lengths), head, hidden),
    )


def _is_kept(rows: int, head: Head, hidden: torch.Tensor) -> bool:
    """Whether a chunk is no larger than dW, and its rows can be scaled without losing digits to
    half precision."""
    is_precise = head.dtype(hidden) == torch.promote_types(head.weight.dtype, torch.float32)
    return is_precise and rows * sum(head.weight.shape) <= head.weight.numel()


class _Sums:
    """Takes in chunk after chunk, and has the results at the end."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        plan: _Plan,
        constants: PairConstants,
        options: LogitOptions,
        needs: Needs,
        token_outputs: bool,
    ) -> None:
        self._plan, self._constants, self._options, self._needs = plan, constants, options, needs
        self._backend, self._projection = backend_for(hidden), Projection(hidden, head)
        self._token_outputs = token_outputs
        summed = replace(needs, weight_grad=needs.weight_grad and not plan.keeps_chunk)
        self._gradients = HeadGradients(
            hidden, head, self._projection, summed, rows=plan.labels, scaled_later=True
        )
        like, pairs = constants.reference_gap, constants.reference_gap.numel()
        self._losses, self._gaps = like.new_empty(pairs), like.new_empty(pairs)
        self._means = like.new_empty(2, pairs)  # chosen and rejected
        rows = plan.labels if token_outputs else 0
        self._tokens = TokenOutputs.zeros(hidden, rows, rows)
        self._kept_grads, self._kept_hidden = (
            self._projection.weight.new_empty(0, size) for size in head.weight.shape
        )

    def add(self, chunk: Chunk) -> None:
        """Logits, statistics, losses of the pairs, gradients of one chunk."""
        hidden = self._projection.rows(chunk.rows)
        is_deferred = len(chunk.pieces) > 1 and self._gradients.may_defer
        upstream = None
        if is_deferred:
            upstream = self._upstream_but_for_dgap(chunk)
            self._gradients.defer()
        stats = []
        for piece in chunk.pieces:
            logits = self._projection.logits(hidden[piece])
            stats.append(self._stats(chunk, piece, logits))
            if upstream is not None:
                self._add_gradients(chunk, piece, logits, stats[-1], hidden, upstream)
        found = self._pair_losses(chunk, stats)
        if upstream is not None:
            self._gradients.resolve(chunk.indices, found.gap_grads, upstream.boost)
        elif self._needs.any:
            upstream = self._upstream(chunk, found.gap_grads, found.counts)
            for piece, piece_stats in zip(chunk.pieces, stats, strict=True):
                if len(chunk.pieces) > 1:  # the next piece's took their place
                    logits = self._projection.logits(hidden[piece])
                    piece_stats = RowStats(*piece_stats)
                factors = self._add_gradients(chunk, piece, logits, piece_stats, hidden, upstream)
        if self._plan.keeps_chunk:
            self._kept_grads = logits[0]
            self._kept_hidden = hidden if factors is None else hidden * factors[:, None]

    def result(self) -> LinearPairLosses:
        grads = self._gradients.result(self._options.parallel)
        return LinearPairLosses(
            self._losses.sum(),
            self._means.view(-1),
            self._gaps,
            *self._tokens,
            grads.hidden,
            grads.pending,
            grads.weight.view(-1, self._projection.weight.shape[1]),
            grads.bias,
            self._kept_grads,
            self._kept_hidden,
        )

    def _stats(self, chunk: Chunk, piece: slice, logits: torch.Tensor) -> RowStats:
        stats = row_stats(
            logits,
            chunk.labels[piece],
            self._options,
            token_outputs=self._token_outputs,
            overwrite=True,
        )
        if self._token_outputs:
            self._tokens.put(chunk.indices[piece], stats)
        return stats

    def _pair_losses(self, chunk: Chunk, stats: list[RowStats]) -> PairLosses:
        """Of the chunk's pairs, noted in their places."""
        found = pair_losses(
            torch.cat([piece.logp for piece in stats]),
            chunk.labels,
            chunk.cu_seqlens,
            self._constants.of(chunk.pairs),
            self._options.parallel,
        )
        here = slice(chunk.pairs.start, chunk.pairs.stop)
        self._losses[here], self._gaps[here] = found.losses, found.gaps
        self._means[:, here] = found.means.view(2, -1)
        return found

    def _upstream(self, chunk: Chunk, gap_grads: torch.Tensor, counts: torch.Tensor) -> Upstream:
        """dL/dlogp of the chunk's rows."""
        row_grads = self._backend.row_grads(gap_grads, counts, chunk.labels, chunk.cu_seqlens)
        return boosted(row_grads, self._projection.dtype, self._options.scale)

    def _upstream_but_for_dgap(self, chunk: Chunk) -> Upstream:
        """dL/dlogp of the rows of one pair as if its dL/dgap were 1, which needs only the lengths
        of its sequences."""
        counts = self._plan.counts.view(2, -1)[:, chunk.pairs.start].to(self._losses.dtype)
        counts = on_device(counts, self._losses.device)
        return self._upstream(chunk, self._losses.new_ones(1), counts)

    def _add_gradients(
        self,
        chunk: Chunk,
        piece: slice,
        logits: torch.Tensor,
        stats: RowStats,
        hidden: torch.Tensor,
        upstream: Upstream,
    ) -> torch.Tensor | None:
        """Turns the logits of a piece into their gradient, in place, and takes it in; returns the
        factors that its rows lack."""
        factors = write_logit_grads(
            logits,
            chunk.labels[piece],
            stats,
            upstream.row_grads[piece],
            self._options,
            out=logits,
        )
        self._gradients.add(chunk.indices[piece], logits[0], hidden[piece], upstream.boost, factors)
        return factors


@linear_pair_loss_op.register_fake
def _(hidden, head, targets, cu_seqlens, constants, options, needs, may_keep_chunk, token_outputs):
    rows, pairs = targets.labels.shape[0], constants.reference_gap.shape[0]
    (vocab, width), dtype = head.weight.shape, statistics_dtype(hidden)
    precise = torch.promote_types(head.weight.dtype, torch.float32)
    extra = rows if token_outputs else 0
    kept: int | torch.SymInt = 0
    summed = vocab if needs.weight_grad else 0
    if may_keep_chunk and needs.weight_grad:
        kept, summed = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return LinearPairLosses(
        constants.reference_gap.new_empty(()),
        constants.reference_gap.new_empty(2 * pairs),
        constants.reference_gap.new_empty(pairs),
        hidden.new_empty(extra, dtype=dtype),
        hidden.new_empty(extra, dtype=dtype),
        hidden.new_empty(extra, dtype=torch.bool),
        hidden.new_empty(
            (rows, width) if needs.hidden_grad else 0, dtype=hidden_grad_dtype(hidden.dtype)
        ),
        hidden.new_empty(rows if needs.hidden_grad else 0, dtype=dtype),
        head.weight.new_empty(summed, width, dtype=precise),
        head.weight.new_empty(vocab if needs.bias_grad else 0, dtype=precise),
        head.weight.new_empty(kept, vocab, dtype=head.dtype(hidden)),
        head.weight.new_empty(kept, width, dtype=head.dtype(hidden)),
    )


def _save(ctx: Any, given: Any, found: LinearPairLosses) -> None:
    head, (_, *others) = given.head, found
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(
        found.hidden_grad,
        found.pending,
        found.weight_grad,
        found.bias_grad,
        found.kept_grads,
        found.kept_hidden,
        given.targets.rows,
    )
    ctx.needs, ctx.hidden_rows = given.needs, given.hidden.shape[0]
    ctx.hidden_dtype, ctx.weight_dtype = given.hidden.dtype, head.weight.dtype
    ctx.bias_dtype = None if head.bias is None else head.bias.dtype


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return None, None, None
    hidden, pending, weight, bias, kept_grads, kept_hidden, rows = ctx.saved_tensors
    hidden_grad = weight_grad = bias_grad = None
    if ctx.needs.hidden_grad:
        hidden_grad = scaled_in_backward(hidden, pending, grad_loss, ctx.hidden_dtype)
        hidden_grad = spread(hidden_grad, rows, ctx.hidden_rows)
    if ctx.needs.weight_grad and weight.shape[0]:
        weight_grad = scaled_in_backward(weight, None, grad_loss, ctx.weight_dtype)
    elif ctx.needs.weight_grad:
        weight_grad = torch.mm(kept_grads.T, kept_hidden * grad_loss).to(ctx.weight_dtype)
    if ctx.needs.bias_grad:
        bias_grad = scaled_in_backward(bias, None, grad_loss, ctx.bias_dtype)
    return hidden_grad, weight_grad, bias_grad


linear_pair_loss_op.register_autograd(save=_save, backward=_backward)
