"""Autograd from hidden states through a linear head, whose [tokens, vocab] logits never exist as a
whole.

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

from typing import Any

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.ops.chunks import Chunk, plan_pairs, rows_per_chunk, split_rows
from mpo_kernels.ops.gradients import (
    HeadGradients,
    hidden_grad_dtype,
    power_of_two_for,
    scaled,
    scaled_in_backward,
)
from mpo_kernels.ops.once import differentiable_once
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.pairs import pair_losses
from mpo_kernels.ops.rows import rows_of_chunks, scored_rows
from mpo_kernels.ops.stats import (
    HeadOptions,
    RowStats,
    row_stats,
    statistics_dtype,
    write_logit_grads,
)
from mpo_kernels.parallel import Parallel, from_handle

_HEAD = (
    "int ignore_index, float logit_scale, float? softcap, Tensor? numbers, int? chunk_bytes,"
    " ScalarType? gemm_dtype, bool token_outputs, int parallel"
)


class _Head:
    """z = H W^T + b in the dtype of its GEMMs."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gemm_dtype: torch.dtype | None,
    ) -> None:
        self.dtype = gemm_dtype or hidden.dtype
        self.weight = weight.to(self.dtype)
        self.bias: torch.Tensor | None = None if bias is None else bias.to(self.dtype)
        self._logits = self.weight.new_empty(0, self.weight.shape[0])

    def rows_per_chunk(self, chunk_bytes: int | None, ranks: Parallel | None) -> int:
        """Rows whose logits fit the budget, the same on all ranks."""
        vocab = self.weight.shape[0]
        return rows_per_chunk(
            vocab if ranks is None else ranks.chunk_vocab(vocab), self.dtype.itemsize, chunk_bytes
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (1, n, V), in the memory of the last call's: two chunks are never there at
        once."""
        rows = hidden.shape[0]
        if self._logits.shape[0] < rows:
            self._logits = self._logits.new_empty(0)  # goes before its larger successor comes
            self._logits = self.weight.new_empty(rows, self.weight.shape[0])
        out = self._logits[:rows]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)[None]
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)[None]


class _TokenOutputs:
    """Per-token results at their places among all N rows: log-probabilities, and entropy and
    arg-max where they are asked for."""

    def __init__(self, rows: int, like: torch.Tensor, *, extra: bool) -> None:
        more = rows if extra else 0
        self.logp = like.new_zeros(rows, dtype=statistics_dtype(like))
        self.entropy = like.new_zeros(more, dtype=statistics_dtype(like))
        self.is_argmax = like.new_zeros(more, dtype=torch.bool)

    def add(self, places: torch.Tensor, stats: RowStats) -> None:
        self.logp.index_copy_(0, places, stats.logp)
        if stats.entropy is not None and stats.is_argmax is not None:
            self.entropy.index_copy_(0, places, stats.entropy)
            self.is_argmax.index_copy_(0, places, stats.is_argmax)


@operator(
    "mpo_kernels::linear_pair_loss",
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor cu_seqlens, Tensor"
        " reference_gap, Tensor? pair_weights, float beta, Tensor? beta_number, bool hidden_grad,"
        f" bool weight_grad, bool bias_grad, bool may_keep_chunk, {_HEAD}) ->"
        f" ({', '.join(['Tensor'] * 12)})"
    ),
    strided=("hidden", "weight"),
)
def linear_pair_loss_op(
    hidden, weight, bias, labels, cu_seqlens, reference_gap, pair_weights, beta, beta_number, hidden_grad, weight_grad, bias_grad,
    may_keep_chunk, ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    """hidden (N, D), labels (N,) and cu_seqlens (2P + 1,) on any device -> sum of the pairs' losses
    (), means (2P,), gaps (P,); logp, entropy, is_argmax (N,) or (0,); dH (N, D) and the factors
    (N,) still to be applied to its rows, or (0,); dW (V, D) or (0, D); db (V,) or (0,); the logits'
    gradients (n, V) and rows (n, D) of the only chunk, kept in place of dW where `may_keep_chunk`
    and they are smaller, else n = 0.

    `may_keep_chunk` makes shapes depend on the labels, which no compiler likes. Backward may scale
    the gradients in place: nobody but it may use them."""
    options, ranks = (
        HeadOptions.of(ignore_index, logit_scale, softcap, numbers),
        from_handle(parallel),
    )
    beta = beta if beta_number is None else beta_number
    needs = (hidden_grad, weight_grad, bias_grad)
    rows = scored_rows(labels, cu_seqlens, ignore_index, weight.shape[0], ranks)
    longest, counts = (
        (rows.lengths, rows.lengths)
        if ranks is None
        else (ranks.longest(rows.lengths), ranks.total(rows.lengths))
    )
    pairs, device = reference_gap.numel(), hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        backend, head = backend_for(hidden), _Head(hidden, weight, bias, gemm_dtype)
        budget = head.rows_per_chunk(chunk_bytes, ranks)
        plan = sorted(plan_pairs(longest.tolist(), budget), key=lambda chunk: chunk.rows <= budget)
        keeps_chunk = may_keep_chunk and weight_grad and _is_kept(plan, budget, weight, head.dtype)
        sums = (hidden_grad, weight_grad and not keeps_chunk, bias_grad)
        gradients = HeadGradients(hidden, weight, bias, head.weight, sums, scaled_later=True)
        kept_logits, kept_rows = (head.weight.new_empty(0, size) for size in weight.shape)
        row_scale = hidden.new_ones(
            hidden.shape[0] if hidden_grad else 0, dtype=statistics_dtype(hidden)
        )
        tokens = _TokenOutputs(hidden.shape[0] if token_outputs else 0, hidden, extra=token_outputs)
        losses, gaps, means = (reference_gap.new_empty(n) for n in (pairs, pairs, 2 * pairs))
        for chunk in rows_of_chunks(rows, [(c.first, c.last) for c in plan], device):
            here, there = (
                slice(chunk.first, chunk.last),
                slice(pairs + chunk.first, pairs + chunk.last),
            )
            chunk_hidden = hidden.index_select(0, chunk.places).to(head.dtype)
            pieces = split_rows(0, chunk.labels.numel(), budget) or [(0, 0)]
            is_deferred = (
                len(pieces) > 1 and any(needs) and (gradients.weight_is_empty or not weight_grad)
            )
            if is_deferred:
                # Gradients as if dL/dgap were 1, which needs only the sequences' lengths.
                chunk_counts = (
                    counts[[chunk.first, pairs + chunk.first]]
                    .to(losses.dtype)
                    .to(device, non_blocking=True)
                )
                row_grad = backend.row_grads(
                    losses.new_ones(1),
                    chunk_counts,
                    chunk.labels,
                    chunk.cu_seqlens,
                    ignore_index=ignore_index,
                )
                divisor = power_of_two_for(row_grad, head.dtype, options.logit_scale)
                bias_before = gradients.bias
                gradients.bias = torch.zeros_like(bias_before)

            stats = []
            for a, b in pieces:
                logits = head.logits(chunk_hidden[a:b])
                stats.append(
                    row_stats(
                        logits, chunk.labels[a:b], options, ranks, token_outputs=token_outputs
                    )
                )
                if is_deferred:
                    _add_gradients(
                        gradients,
                        chunk,
                        a,
                        b,
                        logits,
                        stats[-1],
                        row_grad,
                        divisor,
                        chunk_hidden,
                        options,
                        ranks,
                    )
                if token_outputs:
                    tokens.add(chunk.places[a:b], stats[-1])
            logp = torch.cat([piece.logp for piece in stats])
            weights = None if pair_weights is None else pair_weights[here]
            chunk_means, scored, gaps[here], losses[here], gap_grad = pair_losses(
                logp,
                chunk.labels,
                chunk.cu_seqlens,
                reference_gap[here],
                weights,
                beta,
                ignore_index,
                ranks,
            )
            means[here], means[there] = chunk_means.chunk(2)
            if not any(needs):
                continue
            if is_deferred:
                gradients.weight.mul_(gap_grad)
                gradients.bias = bias_before.addcmul_(gradients.bias, gap_grad)
                factor: torch.Tensor | None = gap_grad if divisor is None else gap_grad / divisor
            else:
                row_grad = backend.row_grads(
                    gap_grad, scored, chunk.labels, chunk.cu_seqlens, ignore_index=ignore_index
                )
                divisor = power_of_two_for(row_grad, head.dtype, options.logit_scale)
                for (a, b), piece in zip(pieces, stats, strict=True):
                    if len(pieces) > 1:
                        logits = head.logits(chunk_hidden[a:b])
                    _add_gradients(
                        gradients,
                        chunk,
                        a,
                        b,
                        logits,
                        piece,
                        row_grad,
                        divisor,
                        chunk_hidden,
                        options,
                        ranks,
                    )
                factor = None if divisor is None else 1 / divisor
            if keeps_chunk:
                kept_logits, kept_rows = logits[0], chunk_hidden
            if hidden_grad and factor is not None:
                row_scale.index_copy_(0, chunk.places, factor.expand(chunk.places.shape))
        gradients.finish()
        if hidden_grad and ranks is not None:
            ranks.add_hidden_grads(gradients.hidden)
    token_results = (tokens.logp, tokens.entropy, tokens.is_argmax)
    weight_grads = (
        gradients.weight.view(-1, weight.shape[1]),
        gradients.bias,
        kept_logits,
        kept_rows,
    )
    return losses.sum(), means, gaps, *token_results, gradients.hidden, row_scale, *weight_grads


def _is_kept(plan: list[Chunk], budget: int, weight: torch.Tensor, gemm_dtype: torch.dtype) -> bool:
    """Whether there is one chunk, no larger than dW, whose rows can be scaled without losing digits
    to half precision."""
    is_whole, is_precise = (
        len(plan) == 1 and plan[0].rows <= budget,
        gemm_dtype == torch.promote_types(weight.dtype, torch.float32),
    )
    return is_whole and is_precise and plan[0].rows * sum(weight.shape) <= weight.numel()


def _add_gradients(
    gradients, chunk, a, b, logits, stats, row_grad, divisor, chunk_hidden, options, ranks
):
    """Turns the logits of rows [a, b) of a chunk into their gradient, in place, and takes it in."""
    slope = row_grad[a:b] if divisor is None else row_grad[a:b] * divisor
    write_logit_grads(
        logits, chunk.labels[a:b], stats.logp, stats.normalizer, slope, logits, options, ranks
    )
    gradients.add(chunk.places[a:b], logits[0], chunk_hidden[a:b], divisor)


@linear_pair_loss_op.register_fake
def _(
    hidden, weight, bias, labels, cu_seqlens, reference_gap, pair_weights, beta, beta_number, hidden_grad, weight_grad, bias_grad,
    may_keep_chunk, ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    rows, pairs, floats = (
        hidden.shape[0],
        reference_gap.shape[0],
        {"dtype": statistics_dtype(hidden)},
    )
    precise = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
    extra = rows if token_outputs else 0
    sizes: tuple = (0, weight.shape[0] if weight_grad else 0)
    if may_keep_chunk and weight_grad:
        sizes = tuple(torch.library.get_ctx().new_dynamic_size() for _ in sizes)
    kept, summed = sizes
    return (
        *(reference_gap.new_empty(shape) for shape in ((), (2 * pairs,), (pairs,))),
        hidden.new_empty(extra, **floats),
        hidden.new_empty(extra, **floats),
        hidden.new_empty(extra, dtype=torch.bool),
        hidden.new_empty(hidden.shape if hidden_grad else 0, dtype=hidden_grad_dtype(hidden.dtype)),
        hidden.new_empty(rows if hidden_grad else 0, **floats),
        weight.new_empty(summed, weight.shape[1], **precise),
        weight.new_empty(weight.shape[0] if bias_grad else 0, **precise),
        *(weight.new_empty(kept, size, dtype=gemm_dtype or hidden.dtype) for size in weight.shape),
    )


def _save_pair_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*others[5:])
    ctx.dtypes = tuple(None if t is None else t.dtype for t in inputs[:3])
    ctx.needs, ctx.inputs = inputs[9:12], len(inputs)


def _pair_loss_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    none = (None,) * ctx.inputs
    if grad_loss is None:
        return none
    hidden, row_scale, weight, bias, kept_logits, kept_rows = ctx.saved_tensors
    scales = (row_scale, None, None)
    grads = [
        scaled_in_backward(grad, scale, grad_loss, dtype) if needed else None
        for grad, scale, dtype, needed in zip(
            (hidden, weight, bias), scales, ctx.dtypes, ctx.needs, strict=True
        )
    ]
    if ctx.needs[1] and not weight.shape[0]:
        grads[1] = torch.mm(kept_logits.T, kept_rows * grad_loss).to(ctx.dtypes[1])
    return *grads, *none[3:]


differentiable_once(linear_pair_loss_op, _pair_loss_backward, setup_context=_save_pair_loss)


@operator(
    "mpo_kernels::linear_token_logprobs",
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool keep_stats, bool"
        f" keep_hidden_grad, {_HEAD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    strided=("hidden", "weight"),
)
def linear_token_logprobs_op(
    hidden, weight, bias, labels, keep_stats, keep_hidden_grad,
    ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    """hidden (N, D), labels (N,) on any device -> logp (N,), entropy and is_argmax (N,) or (0,);
    for backward, the normalizers (N, 2) with `keep_stats`, or dlogp/dH (N, D) with
    `keep_hidden_grad`: a frozen head then needs two GEMMs in all."""
    options, ranks = (
        HeadOptions.of(ignore_index, logit_scale, softcap, numbers),
        from_handle(parallel),
    )
    rows = scored_rows(labels, None, ignore_index, weight.shape[0], ranks)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, gemm_dtype)
        gradients = HeadGradients(
            hidden, weight, None, head.weight, (keep_hidden_grad, False, False), scaled_later=True
        )
        tokens = _TokenOutputs(hidden.shape[0], hidden, extra=token_outputs)
        normalizer = hidden.new_zeros(
            hidden.shape[0] if keep_stats else 0, 2, dtype=statistics_dtype(hidden)
        )
        places, scored_labels = (
            t.to(hidden.device, non_blocking=True) for t in (rows.places, rows.labels)
        )
        one = hidden.new_ones(1, dtype=statistics_dtype(hidden))
        # the rows' own factors are left to backward
        unit = power_of_two_for(one, head.dtype, options.logit_scale)
        for a, b in split_rows(0, places.numel(), head.rows_per_chunk(chunk_bytes, ranks)):
            chunk_hidden = hidden.index_select(0, places[a:b]).to(head.dtype)
            logits = head.logits(chunk_hidden)
            stats = row_stats(
                logits, scored_labels[a:b], options, ranks, token_outputs=token_outputs
            )
            tokens.add(places[a:b], stats)
            if keep_stats:
                normalizer.index_copy_(0, places[a:b], stats.normalizer)
            if keep_hidden_grad:
                row_grad = (one if unit is None else one * unit).repeat(b - a)
                write_logit_grads(
                    logits,
                    scored_labels[a:b],
                    stats.logp,
                    stats.normalizer,
                    row_grad,
                    logits,
                    options,
                    ranks,
                )
                gradients.add(places[a:b], logits[0], chunk_hidden, None)
        if unit is not None:
            gradients.hidden.div_(unit)
        if keep_hidden_grad and ranks is not None:
            ranks.add_hidden_grads(gradients.hidden)
    return tokens.logp, tokens.entropy, tokens.is_argmax, normalizer, gradients.hidden


@linear_token_logprobs_op.register_fake
def _(
    hidden, weight, bias, labels, keep_stats, keep_hidden_grad,
    ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    rows, floats = hidden.shape[0], {"dtype": statistics_dtype(hidden)}
    return (
        hidden.new_empty(rows, **floats),
        hidden.new_empty(rows if token_outputs else 0, **floats),
        hidden.new_empty(rows if token_outputs else 0, dtype=torch.bool),
        hidden.new_empty(rows if keep_stats else 0, 2, **floats),
        hidden.new_empty(
            hidden.shape if keep_hidden_grad else 0, dtype=hidden_grad_dtype(hidden.dtype)
        ),
    )


@operator(
    "mpo_kernels::linear_token_logprobs_grad",
    schema=(
        "(Tensor grad_logp, Tensor logp, Tensor normalizer, Tensor hidden, Tensor weight, Tensor?"
        f" bias, Tensor labels, bool hidden_grad, bool weight_grad, bool bias_grad, {_HEAD}) ->"
        " (Tensor, Tensor, Tensor, Tensor)"
    ),
    strided=("hidden", "weight"),
)
def linear_token_logprobs_grad_op(
    grad_logp, logp, normalizer, hidden, weight, bias, labels, hidden_grad, weight_grad, bias_grad,
    ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    """dL/dlogp (N,) -> dH (N, D), the factors (N,) still to be applied to its rows, dW (V, D), db
    (V,); (0,) where not needed. The logits are computed again: three GEMMs."""
    options, ranks = (
        HeadOptions.of(ignore_index, logit_scale, softcap, numbers),
        from_handle(parallel),
    )
    rows = scored_rows(labels, None, ignore_index, weight.shape[0], ranks)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, gemm_dtype)
        needs, is_half = (hidden_grad, weight_grad, bias_grad), head.dtype == torch.float16
        gradients = HeadGradients(hidden, weight, bias, head.weight, needs, scaled_later=is_half)
        row_scale = torch.ones_like(logp) if hidden_grad else logp.new_empty(0)
        places, scored_labels = (
            t.to(hidden.device, non_blocking=True) for t in (rows.places, rows.labels)
        )
        for a, b in split_rows(0, places.numel(), head.rows_per_chunk(chunk_bytes, ranks)):
            here = places[a:b]
            chunk_hidden = hidden.index_select(0, here).to(head.dtype)
            logits, slope = head.logits(chunk_hidden), grad_logp.index_select(0, here)
            divisor = power_of_two_for(slope, head.dtype, options.logit_scale)
            if divisor is not None:
                slope = slope * divisor
                if hidden_grad:
                    row_scale.index_copy_(0, here, (1 / divisor).expand(here.shape))
            write_logit_grads(
                logits,
                scored_labels[a:b],
                logp[here],
                normalizer[here],
                slope,
                logits,
                options,
                ranks,
            )
            gradients.add(here, logits[0], chunk_hidden, divisor)
        gradients.finish()
        if hidden_grad and ranks is not None:
            ranks.add_hidden_grads(gradients.hidden)
    return gradients.hidden, row_scale, gradients.weight, gradients.bias


@linear_token_logprobs_grad_op.register_fake
def _(
    grad_logp, logp, normalizer, hidden, weight, bias, labels, hidden_grad, weight_grad, bias_grad,
    ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel,
):  # fmt: skip
    precise = {"dtype": torch.promote_types(weight.dtype, torch.float32)}
    is_half = (gemm_dtype or hidden.dtype) == torch.float16
    return (
        hidden.new_empty(
            hidden.shape if hidden_grad else 0,
            dtype=hidden_grad_dtype(hidden.dtype) if is_half else hidden.dtype,
        ),
        logp.new_empty(logp.shape if hidden_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0, **precise),
        weight.new_empty(weight.shape[0] if bias_grad else 0, **precise),
    )


def _save_token_logprobs(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, ctx.keep_stats, ctx.keep_hidden_grad, *ctx.head = inputs
    ctx.parallel = from_handle(ctx.head[-1])  # lives until backward has run
    logp, *others = output
    *_, normalizer, hidden_grad = others
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    # A frozen head needs neither hidden states nor weight again.
    ctx.save_for_backward(
        *((logp, normalizer, hidden, weight, bias, labels) if ctx.keep_stats else (hidden_grad,))
    )
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
    ctx.gemm_dtype = ctx.head[5] or hidden.dtype


def _token_logprobs_backward(ctx: Any, grad_logp: torch.Tensor | None, *_: Any) -> tuple:
    none = (None,) * 14
    if grad_logp is None:
        return none
    one = grad_logp.new_ones(())
    if ctx.keep_hidden_grad:
        (grad,) = ctx.saved_tensors
        return scaled(grad, grad_logp, one, ctx.dtypes[0]), *none[1:]
    needs = ctx.needs_input_grad[:3]
    hidden, row_scale, weight, bias = linear_token_logprobs_grad_op(
        grad_logp, *ctx.saved_tensors, *needs, *ctx.head
    )
    if needs[0] and ctx.gemm_dtype == torch.float16:
        hidden = scaled(hidden, row_scale, one, ctx.dtypes[0])
    grads = (hidden, weight, bias)
    return (
        *(
            g.to(dtype) if needed else None
            for g, dtype, needed in zip(grads, ctx.dtypes, needs, strict=True)
        ),
        *none[3:],
    )


differentiable_once(
    linear_token_logprobs_op, _token_logprobs_backward, setup_context=_save_token_logprobs
)
