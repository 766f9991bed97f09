"""Autograd from hidden states through a linear head to log-probabilities of labels, for any
upstream gradient; the [tokens, vocab] logits never exist as a whole.

With a trainable head the logits of a single chunk are kept, and turned into their gradient in
backward, where any upstream gradient is known: one GEMM forward, two backward. More rows than that
are computed again: three backward. With a frozen head dlogp/dH is made in the forward pass, where
the logits are, and its rows are scaled in backward (equation 10): two GEMMs in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mpo_kernels.backends.results import RowDirections, RowStats
from mpo_kernels.ops.chunks import Targets, scored_rows, split_rows
from mpo_kernels.ops.gradients import (
    HeadGradients,
    HeadGrads,
    boosted,
    graph_ends_here,
    hidden_grad_dtype,
    scaled,
    spread,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.projection import Head, Needs, Projection, TokenOutputs
from mpo_kernels.ops.stats import leaves_directions, row_stats, write_logit_grads
from mpo_kernels.options import LogitOptions, statistics_dtype


class LinearTokenResults(NamedTuple):
    """What M labels give, and what backward wants of it."""

    logp: torch.Tensor
    """(M,); differentiable."""
    entropy: torch.Tensor
    """(M,), like is_argmax, where token outputs are asked for, else (0,)."""
    is_argmax: torch.Tensor
    normalizer: torch.Tensor
    """(M, 2) for a trainable head, else (0, 2)."""
    hidden_grad: torch.Tensor
    """(M, D) dlogp/dH for a frozen head, else (0,)."""
    kept_logits: torch.Tensor
    """(n, V) of the only chunk, where they are kept, or the directions of their gradients
    (`RowDirections`); else n is 0. Nobody but backward may use them, which may write over
    them."""


@operator("mpo_kernels::linear_token_logprobs", strided=("hidden", "weight"))
def linear_token_logprobs_op(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    options: LogitOptions,
    keep_stats: bool,
    may_keep_logits: bool,
    keep_hidden_grad: bool,
    token_outputs: bool,
) -> LinearTokenResults:
    """hidden (N, D), targets of M labels on any device -> log-probabilities; normalizers with
    `keep_stats`, dlogp/dH with `keep_hidden_grad`.

    `may_keep_logits` makes shapes depend on the labels, which no compiler likes.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows, labels = _Rows(hidden, head, targets, options), targets.labels.numel()
        gradients = HeadGradients(
            hidden,
            head,
            rows.projection,
            Needs(keep_hidden_grad, False, False),
            rows=labels,
            scaled_later=True,
        )
        tokens = TokenOutputs.zeros(hidden, labels, labels if token_outputs else 0)
        dtype = statistics_dtype(hidden)
        normalizer = hidden.new_zeros(labels if keep_stats else 0, 2, dtype=dtype)
        # the rows' own factors are left to backward
        one = boosted(hidden.new_ones(1, dtype=dtype), rows.projection.dtype, options.scale)
        for chunk in rows.chunks():
            stats = row_stats(
                chunk.logits, chunk.labels, options, token_outputs=token_outputs, overwrite=True
            )
            tokens.put(chunk.indices, stats)
            if keep_stats:
                normalizer.index_copy_(0, chunk.indices, stats.normalizer)
            if keep_hidden_grad:
                row_grads = one.row_grads.repeat(chunk.labels.numel())
                factors = write_logit_grads(
                    chunk.logits, chunk.labels, stats, row_grads, options, out=chunk.logits
                )
                gradients.add(chunk.indices, chunk.logits[0], chunk.hidden, None, factors)
        hidden_grad = gradients.result(options.parallel, boost=one.boost).hidden
        kept_logits = rows.projection.weight.new_empty(0, head.weight.shape[0])
        if may_keep_logits and rows.are_one_chunk:
            kept_logits = chunk.logits[0]
    return LinearTokenResults(*tokens, normalizer, hidden_grad, kept_logits)


class _Chunk(NamedTuple):
    """Scored rows whose logits exist at once, on the device."""

    indices: torch.Tensor
    """(n,) among the M labels."""
    labels: torch.Tensor
    """(n,)"""
    hidden: torch.Tensor
    """(n, D)"""
    logits: torch.Tensor
    """(1, n, V), in memory that the next chunk's take."""


class _Rows:
    """The scored rows, which it reads and checks."""

    def __init__(
        self, hidden: torch.Tensor, head: Head, targets: Targets, options: LogitOptions
    ) -> None:
        parallel = options.parallel
        scored = scored_rows(
            targets,
            None,
            hidden_rows=hidden.shape[0],
            columns=head.weight.shape[0],
            parallel=parallel,
        )
        self.projection = Projection(hidden, head)
        self._indices, self._labels, self._rows = (
            host.to(hidden.device, non_blocking=True)
            for host in (scored.indices, scored.labels, scored.rows)
        )
        self._budget = head.rows_per_chunk(hidden, parallel)

    @property
    def are_one_chunk(self) -> bool:
        """Whether there are any, and their logits fit the budget together."""
        return 0 < self._indices.numel() <= self._budget

    def chunks(self, kept_logits: torch.Tensor | None = None) -> Iterator[_Chunk]:
        """Each with its logits: those that were kept of all rows, or computed."""
        for piece in split_rows(self._indices.numel(), self._budget):
            hidden = self.projection.rows(self._rows[piece])
            logits = self.projection.logits(hidden) if kept_logits is None else kept_logits[None]
            yield _Chunk(self._indices[piece], self._labels[piece], hidden, logits)


@linear_token_logprobs_op.register_fake
def _(hidden, head, targets, options, keep_stats, may_keep_logits, keep_hidden_grad, token_outputs):
    rows, floats = targets.labels.shape[0], {"dtype": statistics_dtype(hidden)}
    kept = torch.library.get_ctx().new_dynamic_size() if may_keep_logits else 0
    return LinearTokenResults(
        hidden.new_empty(rows, **floats),
        hidden.new_empty(rows if token_outputs else 0, **floats),
        hidden.new_empty(rows if token_outputs else 0, dtype=torch.bool),
        hidden.new_empty(rows if keep_stats else 0, 2, **floats),
        hidden.new_empty(
            (rows, hidden.shape[1]) if keep_hidden_grad else 0,
            dtype=hidden_grad_dtype(hidden.dtype),
        ),
        head.weight.new_empty(kept, head.weight.shape[0], dtype=head.dtype(hidden)),
    )


@operator("mpo_kernels::linear_token_logprobs_grad", strided=("hidden", "weight"))
def linear_token_logprobs_grad_op(
    grad_logp: torch.Tensor,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    kept_logits: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    options: LogitOptions,
    needs: Needs,
    are_directions: bool,
) -> HeadGrads:
    """dL/dlogp (M,) -> gradients of the head. Logits (n, V) that were kept, or their directions,
    are left as they are."""
    stats = (RowDirections if are_directions else RowStats)(logp, normalizer, None, None)
    kept = kept_logits if kept_logits.shape[0] else None
    if kept is not None and not are_directions:
        kept = kept.clone()
    return _head_gradients(grad_logp, stats, kept, hidden, head, targets, options, needs)


def _head_gradients(
    grad_logp: torch.Tensor,
    stats: RowStats,
    kept_logits: torch.Tensor | None,
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    options: LogitOptions,
    needs: Needs,
) -> HeadGrads:
    """Logits that were kept become their gradient, in their place: two GEMMs. Others are computed
    again: three. All in the dtypes of what they are gradients of."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = _Rows(hidden, head, targets, options)
        gradients = HeadGradients(
            hidden,
            head,
            rows.projection,
            needs,
            rows=stats.logp.numel(),
            scaled_later=False,
            in_one_chunk=rows.are_one_chunk,
        )
        for chunk in rows.chunks(kept_logits):
            upstream = boosted(
                grad_logp.index_select(0, chunk.indices), rows.projection.dtype, options.scale
            )
            of_rows = stats._replace(
                logp=stats.logp[chunk.indices], normalizer=stats.normalizer[chunk.indices]
            )
            factors = write_logit_grads(
                chunk.logits, chunk.labels, of_rows, upstream.row_grads, options, out=chunk.logits
            )
            gradients.add(chunk.indices, chunk.logits[0], chunk.hidden, upstream.boost, factors)
        return gradients.result(options.parallel)


@linear_token_logprobs_grad_op.register_fake
def _(
    grad_logp, logp, normalizer, kept_logits, hidden, head, targets, options, needs, are_directions
):
    rows, (vocab, width) = logp.shape[0], head.weight.shape
    like = head.weight if head.bias is None else head.bias
    return HeadGrads(
        hidden.new_empty((rows, width) if needs.hidden_grad else 0),
        logp.new_empty(0),
        head.weight.new_empty((vocab, width) if needs.weight_grad else 0),
        like.new_empty(vocab if needs.bias_grad else 0),
    )


def _save(ctx: Any, given: Any, found: LinearTokenResults) -> None:
    head, targets, (_, *others) = given.head, given.targets, found
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.options = given.options  # and with it a Parallel, which lives until backward has run
    ctx.token_outputs = given.token_outputs
    ctx.keep_hidden_grad, ctx.ignore_index = given.keep_hidden_grad, targets.ignore_index
    ctx.gemm_dtype, ctx.chunk_bytes = head.gemm_dtype, head.chunk_bytes
    ctx.hidden_shape, ctx.hidden_dtype = given.hidden.shape, given.hidden.dtype
    # A frozen head needs neither hidden states nor weight again.
    if given.keep_stats:
        ctx.save_for_backward(
            found.logp,
            found.normalizer,
            found.kept_logits,
            given.hidden,
            head.weight,
            head.bias,
            targets.labels,
            targets.rows,
        )
    else:
        ctx.save_for_backward(found.hidden_grad, targets.rows)


def _backward(ctx: Any, grad_logp: torch.Tensor | None, *_: Any) -> tuple:
    if grad_logp is None:
        return None, None, None
    if ctx.keep_hidden_grad:
        hidden_grad, rows = ctx.saved_tensors
        hidden_grad = scaled(hidden_grad, grad_logp, grad_logp.new_ones(()), ctx.hidden_dtype)
        return spread(hidden_grad, rows, ctx.hidden_shape[0]), None, None
    logp, normalizer, kept_logits, hidden, weight, bias, labels, rows = ctx.saved_tensors
    head = Head(weight, bias, ctx.gemm_dtype, ctx.chunk_bytes)
    targets, needs = Targets(labels, rows, ctx.ignore_index), Needs(*ctx.needs_input_grad[:3])
    are_directions = (
        kept_logits.shape[0] > 0
        and not ctx.token_outputs
        and leaves_directions(kept_logits, ctx.options)
    )
    if kept_logits.shape[0] and graph_ends_here(grad_logp, kept_logits):
        stats = (RowDirections if are_directions else RowStats)(logp, normalizer, None, None)
        grads = _head_gradients(
            grad_logp.contiguous(), stats, kept_logits, hidden, head, targets, ctx.options, needs
        )
    else:
        grads = linear_token_logprobs_grad_op(
            grad_logp,
            logp,
            normalizer,
            kept_logits,
            hidden,
            head,
            targets,
            ctx.options,
            needs,
            are_directions,
        )
    hidden_grad = spread(grads.hidden, rows, hidden.shape[0]) if needs.hidden_grad else None
    weight_grad = grads.weight if needs.weight_grad else None
    return hidden_grad, weight_grad, grads.bias if needs.bias_grad else None


linear_token_logprobs_op.register_autograd(save=_save, backward=_backward)
