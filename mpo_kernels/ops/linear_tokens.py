"""Autograd from hidden states through a linear head to log-probabilities of labels, for any
upstream gradient; the [tokens, vocab] logits never exist as a whole.

With a trainable head the logits of a single chunk are kept, and turned into their gradient in
backward, where any upstream gradient is known: one GEMM forward, two backward. More rows than that
are computed again: three backward. With a frozen head dlogp/dH is made in the forward pass, where
the logits are, and its rows are scaled in backward (equation 10): two GEMMs in all.

Where the entropy is differentiable too, two factors of a row are known in backward only. A frozen
head then keeps its logits as a trainable one does: two GEMMs in all, three where they do not fit.
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
    boost_for,
    boosted,
    graph_ends_here,
    hidden_grad_dtype,
    scaled,
    spread,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.projection import Head, Needs, Projection, TokenOutputs
from mpo_kernels.ops.stats import constants_of, leaves_directions, row_stats, write_logit_grads
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions, Wanted, statistics_dtype


class LinearTokenResults(NamedTuple):
    """What M labels give, and what backward wants of it."""

    logp: torch.Tensor
    """(M,); differentiable."""
    entropy: torch.Tensor
    """(M,), like is_argmax, where token outputs are asked for, else (0,)."""
    is_argmax: torch.Tensor
    moments: torch.Tensor
    """(M, 2) where they are asked for, else (0, 2)."""
    normalizer: torch.Tensor
    """(M, 2) where the logits' gradients are made in backward, else (0, 2)."""
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
    wanted: Wanted,
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
        tokens = TokenOutputs.zeros(hidden, labels, labels if wanted.token_outputs else 0)
        dtype = statistics_dtype(hidden)
        normalizer, moments = (
            hidden.new_zeros(labels if is_wanted else 0, 2, dtype=dtype)
            for is_wanted in (keep_stats, wanted.moments)
        )
        # the rows' own factors are left to backward
        one = boosted(hidden.new_ones(1, dtype=dtype), rows.projection.dtype, options.scale)
        for chunk in rows.chunks():
            stats = row_stats(
                chunk.logits,
                chunk.labels,
                options,
                token_outputs=wanted.token_outputs,
                moments=wanted.moments,
                overwrite=True,
            )
            tokens.put(chunk.indices, stats)
            if stats.moments is not None:
                moments.index_copy_(0, chunk.indices, stats.moments)
            if keep_stats:
                normalizer.index_copy_(0, chunk.indices, stats.normalizer)
            if keep_hidden_grad:
                row_grads = one.row_grads.repeat(chunk.labels.numel())
                factors = write_logit_grads(
                    chunk.logits, chunk.labels, stats, row_grads, options, out=chunk.logits
                )
                gradients.add(chunk.indices, chunk.logits[0], chunk.hidden, None, factors)
        hidden_grad = gradients.result(options.parallel, boost=one.boost).hidden
        kept_logits = rows.projection.no_logits
        if may_keep_logits and rows.are_one_chunk:
            kept_logits = chunk.logits[0]
    return LinearTokenResults(*tokens, moments, normalizer, hidden_grad, kept_logits)


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
            on_device(host, hidden.device) for host in (scored.indices, scored.labels, scored.rows)
        )
        self._budget = head.rows_per_chunk(hidden, parallel)

    @property
    def are_one_chunk(self) -> bool:
        """Whether there are any, and their logits fit the budget together."""
        return 0 < self._indices.numel() <= self._budget

    def chunks(self, kept_logits: torch.Tensor | None = None) -> Iterator[_Chunk]:
        """Each with its logits: those that were kept of all rows, or computed."""
        for piece in split_rows(0, self._indices.numel(), self._budget):
            hidden = self.projection.rows(self._rows[piece])
            logits = self.projection.logits(hidden) if kept_logits is None else kept_logits[None]
            yield _Chunk(self._indices[piece], self._labels[piece], hidden, logits)


@linear_token_logprobs_op.register_fake
def _(hidden, head, targets, options, keep_stats, may_keep_logits, keep_hidden_grad, wanted):
    rows, floats = targets.labels.shape[0], {"dtype": statistics_dtype(hidden)}
    kept = torch.library.get_ctx().new_dynamic_size() if may_keep_logits else 0
    return LinearTokenResults(
        hidden.new_empty(rows, **floats),
        hidden.new_empty(rows if wanted.token_outputs else 0, **floats),
        hidden.new_empty(rows if wanted.token_outputs else 0, dtype=torch.bool),
        hidden.new_empty(rows if wanted.moments else 0, 2, **floats),
        hidden.new_empty(rows if keep_stats else 0, 2, **floats),
        hidden.new_empty(
            (rows, hidden.shape[1]) if keep_hidden_grad else 0,
            dtype=hidden_grad_dtype(hidden.dtype),
        ),
        head.weight.new_empty(kept, head.weight.shape[0], dtype=head.dtype_of_logits(hidden)),
    )


@operator("mpo_kernels::linear_token_logprobs_grad", strided=("hidden", "weight"))
def linear_token_logprobs_grad_op(
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    entropy: torch.Tensor | None,
    kept_logits: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    options: LogitOptions,
    needs: Needs,
    are_directions: bool,
) -> HeadGrads:
    """dL/dlogp (M,) and dL/dentropy (M,) -> gradients of the head. Logits (n, V) that were kept, or
    their directions, are left as they are."""
    stats = (RowDirections if are_directions else RowStats)(logp, normalizer, entropy, None)
    kept = kept_logits if kept_logits.shape[0] else None
    if kept is not None and not are_directions:
        kept = kept.clone()
    upstream = _RowGrads(grad_logp, grad_entropy)
    return _head_gradients(upstream, stats, kept, hidden, head, targets, options, needs)


class _RowGrads(NamedTuple):
    """Gradients of the results of M labels, or of some rows among them."""

    logp: torch.Tensor
    entropy: torch.Tensor | None

    def of(self, indices: torch.Tensor) -> _RowGrads:
        entropy = None if self.entropy is None else self.entropy[indices]
        return _RowGrads(self.logp[indices], entropy)

    def bounds(self, entropies: torch.Tensor | None) -> torch.Tensor:
        """What no gradient of a row's final logits exceeds: p |log p + H| is at most H, whose terms
        are the p |log p|."""
        if self.entropy is None or entropies is None:
            return self.logp
        # a row without a number is no reason for the others to have none
        return self.logp.abs() + self.entropy.abs() * entropies.nan_to_num(0.0)

    def times(self, boost: torch.Tensor | None) -> _RowGrads:
        if boost is None:
            return self
        return _RowGrads(self.logp * boost, None if self.entropy is None else self.entropy * boost)


def _head_gradients(
    upstream: _RowGrads,
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
            entropies = None if stats.entropy is None else stats.entropy[chunk.indices]
            of_rows = stats._replace(
                logp=stats.logp[chunk.indices],
                normalizer=stats.normalizer[chunk.indices],
                entropy=entropies,
            )
            row_grads = upstream.of(chunk.indices)
            boost = boost_for(row_grads.bounds(entropies), rows.projection.dtype, options.scale)
            row_grads = row_grads.times(boost)
            factors = write_logit_grads(
                chunk.logits,
                chunk.labels,
                of_rows,
                row_grads.logp,
                options,
                out=chunk.logits,
                entropy_grads=row_grads.entropy,
            )
            gradients.add(chunk.indices, chunk.logits[0], chunk.hidden, boost, factors)
        return gradients.result(options.parallel)


@linear_token_logprobs_grad_op.register_fake
def _(
    grad_logp,
    grad_entropy,
    logp,
    normalizer,
    entropy,
    kept_logits,
    hidden,
    head,
    targets,
    options,
    needs,
    are_directions,
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
    head, targets = given.head, given.targets
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constants_of(found, given.wanted))
    ctx.options = given.options  # and with it a Parallel, which lives until backward has run
    # now, since by the time of backward the environment may name another backend
    ctx.are_directions = not (
        given.wanted.token_outputs or given.wanted.moments
    ) and leaves_directions(found.kept_logits, given.options)
    ctx.keep_hidden_grad, ctx.ignore_index = given.keep_hidden_grad, targets.ignore_index
    ctx.head_options = head.gemm_dtype, head.chunk_bytes, head.logits_dtype
    ctx.hidden_shape, ctx.hidden_dtype = given.hidden.shape, given.hidden.dtype
    # Where dlogp/dH is there, neither hidden states nor weight are needed again.
    if given.keep_stats:
        ctx.save_for_backward(
            found.logp,
            found.normalizer,
            found.entropy if given.wanted.entropy_grad else None,
            found.kept_logits,
            given.hidden,
            head.weight,
            head.bias,
            targets.labels,
            targets.rows,
        )
    else:
        ctx.save_for_backward(found.hidden_grad, targets.rows)


def _backward(
    ctx: Any, grad_logp: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
) -> tuple:
    if grad_logp is None and grad_entropy is None:
        return None, None, None
    if ctx.keep_hidden_grad:
        assert grad_logp is not None
        hidden_grad, rows = ctx.saved_tensors
        hidden_grad = scaled(hidden_grad, grad_logp, grad_logp.new_ones(()), ctx.hidden_dtype)
        return spread(hidden_grad, rows, ctx.hidden_shape[0]), None, None
    logp, normalizer, entropy, kept_logits, hidden, weight, bias, labels, rows = ctx.saved_tensors
    if grad_logp is None:
        grad_logp = torch.zeros_like(logp)
    head = Head(weight, bias, *ctx.head_options)
    targets, needs = Targets(labels, rows, ctx.ignore_index), Needs(*ctx.needs_input_grad[:3])
    are_directions = kept_logits.shape[0] > 0 and ctx.are_directions
    upstream = [grad for grad in (grad_logp, grad_entropy) if grad is not None]
    if kept_logits.shape[0] and graph_ends_here(*upstream, kept_logits):
        stats = (RowDirections if are_directions else RowStats)(logp, normalizer, entropy, None)
        row_grads = _RowGrads(
            grad_logp.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()
        )
        grads = _head_gradients(
            row_grads, stats, kept_logits, hidden, head, targets, ctx.options, needs
        )
    else:
        grads = linear_token_logprobs_grad_op(
            grad_logp,
            grad_entropy,
            logp,
            normalizer,
            entropy,
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
