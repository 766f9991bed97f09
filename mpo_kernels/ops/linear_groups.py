"""From hidden states through a linear head to the losses of groups of sequences, and to their
gradients in the same pass; the [tokens, vocab] logits never exist as a whole.

Only scored rows reach the head, in chunks of whole groups. The gradient of a row's log-probability
is known as soon as its group's sums are, so each chunk does: logits GEMM, statistics, losses,
gradient in the place of the logits, dH GEMM, dW GEMM (equation 10): three GEMMs, nothing
recomputed. The gradients are computed in the forward pass and only scaled in backward; backward
needs neither the weight's data (ZeRO-3 may have partitioned it by then) nor the caller's hidden
states.

A single chunk of few rows, about D, is smaller than dW. Its logits' gradients and rows are then
kept for backward instead, which scales the rows before the dW GEMM and saves the pass over dW. Not
so in half precision, where scaled rows would be rounded once more.

A group larger than the budget is computed in pieces, and the loss is not known until the last of
them is. What a row then lacks is a factor that it shares with its unit: with its pair under MPO,
with its sequence under any other loss. Rows of dH are multiplied by it when it is known, at any
time. dW can only be multiplied as a whole: that serves one unit, the longest, while nothing else is
in it, hence such groups come first. Of the other rows one piece's logits are still there; those of
further pieces are computed again: a fourth GEMM for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from mpo_kernels.backends.results import RowStats
from mpo_kernels.ops.chunks import (
    Chunk,
    Pieces,
    Targets,
    chunks_of,
    group_lengths,
    pieces_of,
    plan_groups,
    scored_rows,
)
from mpo_kernels.ops.gradients import (
    HeadGradients,
    Upstream,
    boosted,
    hidden_grad_dtype,
    scaled_in_backward,
    spread,
)
from mpo_kernels.ops.projection import Head, Needs, Projection, TokenOutputs
from mpo_kernels.ops.stats import row_stats, write_logit_grads
from mpo_kernels.options import LogitOptions, statistics_dtype


class LinearLosses(NamedTuple):
    """What S sequences of M labels give. Backward may scale the gradients in place: nobody but it
    may use them."""

    loss: torch.Tensor
    """() sum of the groups' losses; differentiable."""
    sequences: torch.Tensor
    """(S, ...) what the loss was computed from."""
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


class ChunkedLoss(Protocol):
    """A loss as the loop sees it. It takes in the log-probabilities of chunk after chunk.

    dL/dlogp of a row is a share, which is known before the logits are, times its unit's factor.
    """

    def units(self, chunk: Chunk) -> list[int]:
        """Rows of each unit of a chunk that is one group."""

    def shares(self, chunk: Chunk) -> torch.Tensor:
        """(n,) of its rows."""

    def add(self, chunk: Chunk, logp: torch.Tensor) -> Any:
        """Computes the losses of a chunk from (n,) log-probabilities, in all ranks of a context
        together; what the other two functions want to know."""

    def factors(self, found: Any) -> torch.Tensor:
        """(U,) of the chunk's units."""

    def row_grads(self, chunk: Chunk, found: Any) -> torch.Tensor:
        """(n,) dL/dlogp."""

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of all losses (), and of each sequence what they were computed from."""


@dataclass(frozen=True)
class Plan:
    """What is computed when."""

    labels: int
    """M."""
    budget: int
    """Rows whose logits exist at once."""
    chunks: list[Chunk]
    """Groups in pieces first: dW can be scaled as a whole while nothing else is in it."""
    counts: torch.Tensor
    """Host (S,) scored rows of each sequence, in all ranks of a context together."""
    keeps_chunk: bool
    """The only chunk's logits' gradients are kept in place of dW."""


def plan_of(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    cu_seqlens: torch.Tensor,
    options: LogitOptions,
    *,
    size: int,
    pairs: bool,
    may_keep_chunk: bool,
) -> Plan:
    """Reads the labels and checks them; host integers, but for the rows of each chunk. All ranks
    of a context plan the same chunks of groups of `size` sequences, for the longest of their
    parts."""
    parallel = options.parallel
    scored = scored_rows(
        targets,
        cu_seqlens,
        hidden_rows=hidden.shape[0],
        columns=head.weight.shape[0],
        parallel=parallel,
        pairs=pairs,
    )
    longest = scored.lengths if parallel is None else parallel.longest(scored.lengths)
    counts = scored.lengths if parallel is None else parallel.total(scored.lengths)
    lengths, budget = (
        group_lengths(longest.tolist(), size),
        head.rows_per_chunk(hidden, parallel),
    )
    chunks = in_pieces_first(plan_groups(lengths, budget), lengths, budget)
    return Plan(
        labels=targets.labels.numel(),
        budget=budget,
        chunks=chunks_of(scored, chunks, size, hidden.device),
        counts=counts,
        keeps_chunk=may_keep_chunk
        and len(chunks) == 1
        and sum(lengths) <= budget
        and _is_kept(sum(lengths), head, hidden),
    )


def in_pieces_first(chunks: list[range], lengths: Sequence[int], budget: int) -> list[range]:
    """Chunks of groups of `lengths` rows in the order in which they are computed."""
    return sorted(chunks, key=lambda groups: sum(lengths[g] for g in groups) <= budget)


def early_units(units: int, needs: Needs, weight_is_empty: bool) -> int:
    """How many of a chunk's units may have their gradients made before their factors are known."""
    if not needs.any or (needs.weight_grad and not weight_is_empty):
        return 0
    return 1 if needs.weight_grad or needs.bias_grad else units


def _is_kept(rows: int, head: Head, hidden: torch.Tensor) -> bool:
    """Whether a chunk is no larger than dW, and its rows can be scaled without losing digits to
    half precision."""
    is_precise = head.dtype(hidden) == torch.promote_types(head.weight.dtype, torch.float32)
    return is_precise and rows * sum(head.weight.shape) <= head.weight.numel()


def linear_losses(
    hidden: torch.Tensor,
    head: Head,
    plan: Plan,
    loss: ChunkedLoss,
    options: LogitOptions,
    needs: Needs,
    token_outputs: bool,
) -> LinearLosses:
    """The loop over chunks."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loop = _Loop(hidden, head, plan, loss, options, needs, token_outputs)
        for chunk in plan.chunks:
            loop.add(chunk)
        return loop.result()


class _Loop:
    """Takes in chunk after chunk, and has the results at the end."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        plan: Plan,
        loss: ChunkedLoss,
        options: LogitOptions,
        needs: Needs,
        token_outputs: bool,
    ) -> None:
        self._plan, self._loss, self._options, self._needs = plan, loss, options, needs
        self._projection, self._token_outputs = Projection(hidden, head), token_outputs
        summed = replace(needs, weight_grad=needs.weight_grad and not plan.keeps_chunk)
        self._gradients = HeadGradients(
            hidden, head, self._projection, summed, rows=plan.labels, scaled_later=True
        )
        rows = plan.labels if token_outputs else 0
        self._tokens = TokenOutputs.zeros(hidden, rows, rows)
        self._kept_grads, self._kept_hidden = (
            self._projection.weight.new_empty(0, size) for size in head.weight.shape
        )

    def add(self, chunk: Chunk) -> None:
        """Logits, statistics, losses and gradients of one chunk."""
        hidden, units = self._projection.rows(chunk.rows), self._loss.units(chunk)
        early = early_units(len(units), self._needs, self._gradients.weight_is_empty)
        pieces = pieces_of(units, self._plan.budget, early)
        stats, boost = self._early(chunk, hidden, pieces) if pieces.early else ({}, None)
        late = [piece for piece in (pieces.kept, *pieces.again) if piece is not None]
        for piece in reversed(late):  # whose logits the last one leaves there
            logits = self._projection.logits(hidden[piece])
            stats[piece.start] = self._stats(chunk, piece, logits)
        logp = torch.cat([stats[start].logp for start in sorted(stats)])
        found = self._loss.add(chunk, logp)
        if pieces.early:
            self._resolve(chunk, pieces, units, self._loss.factors(found), boost)
        if not (self._needs.any and late):
            return
        upstream = self._boosted(self._loss.row_grads(chunk, found))
        for piece in late:
            of_rows = stats[piece.start]
            if piece is not pieces.kept:
                logits = self._projection.logits(hidden[piece])
                of_rows = RowStats(*of_rows)  # which were not overwritten
            factors = self._add_gradients(chunk, piece, logits, of_rows, hidden, upstream)
        if self._plan.keeps_chunk:
            self._kept_grads = logits[0]
            self._kept_hidden = hidden if factors is None else hidden * factors[:, None]

    def result(self) -> LinearLosses:
        grads = self._gradients.result(self._options.parallel)
        return LinearLosses(
            *self._loss.results(),
            *self._tokens,
            grads.hidden,
            grads.pending,
            grads.weight.view(-1, self._projection.weight.shape[1]),
            grads.bias,
            self._kept_grads,
            self._kept_hidden,
        )

    def _early(
        self, chunk: Chunk, hidden: torch.Tensor, pieces: Pieces
    ) -> tuple[dict[int, RowStats], torch.Tensor | None]:
        """Statistics, by its first row, of each piece that may come early, and its gradients but
        for their factors; what they were multiplied by."""
        stats = {}
        upstream = self._boosted(self._loss.shares(chunk))
        self._gradients.defer()
        for piece in pieces.early:
            logits = self._projection.logits(hidden[piece])
            stats[piece.start] = self._stats(chunk, piece, logits)
            self._add_gradients(chunk, piece, logits, stats[piece.start], hidden, upstream)
        return stats, upstream.boost

    def _resolve(
        self,
        chunk: Chunk,
        pieces: Pieces,
        units: Sequence[int],
        factors: torch.Tensor,
        boost: torch.Tensor | None,
    ) -> None:
        """Gives the gradients that came early their factors."""
        start = 0
        for unit, rows in enumerate(units):
            of_unit = slice(start, start + rows)
            if any(of_unit.start <= piece.start < of_unit.stop for piece in pieces.early):
                factor = factors[unit : unit + 1]
                self._gradients.resolve(chunk.indices[of_unit], factor, boost)
            start += rows

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

    def _boosted(self, row_grads: torch.Tensor) -> Upstream:
        return boosted(row_grads, self._projection.dtype, self._options.scale)

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


def fake_losses(
    hidden: torch.Tensor,
    head: Head,
    rows: int,
    sequences: torch.Tensor,
    needs: Needs,
    *,
    may_keep_chunk: bool,
    token_outputs: bool,
) -> LinearLosses:
    """Results of `rows` labels without data; `sequences` as they will be."""
    (vocab, width), dtype = head.weight.shape, statistics_dtype(hidden)
    precise = torch.promote_types(head.weight.dtype, torch.float32)
    extra = rows if token_outputs else 0
    kept: int | torch.SymInt = 0
    summed: int | torch.SymInt = vocab if needs.weight_grad else 0
    if may_keep_chunk and needs.weight_grad:
        kept, summed = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return LinearLosses(
        sequences.new_empty(()),
        sequences,
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


def save(ctx: Any, given: Any, found: LinearLosses) -> None:
    """For `backward`, of an operator whose first tensors are hidden, weight and bias."""
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


def backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    """Scales the gradients."""
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
