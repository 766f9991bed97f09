"""Autograd from logits to log-probabilities of labels.

Registered as `mpo_kernels::token_logprobs` and `mpo_kernels::token_logprobs_grad`, so that
torch.compile takes them whole. The in-place variant, whose backward overwrites the logits, is an
autograd function of its own: a registered operator may not do that to a saved tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.ops.once import (
    differentiable_once,
    is_plain,
    refusing_second_derivatives,
    remember_inputs,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.stats import HeadOptions, row_stats, statistics_dtype, write_logit_grads
from mpo_kernels.parallel import from_handle

_HEAD = "int ignore_index, float logit_scale, float? softcap, Tensor? numbers, int parallel"


@operator(
    "mpo_kernels::token_logprobs",
    schema=(
        f"(Tensor logits, Tensor labels, bool token_outputs, {_HEAD}) -> (Tensor, Tensor, Tensor,"
        " Tensor)"
    ),
    strided=("logits",),
)
def token_logprobs_op(
    logits, labels, token_outputs, ignore_index, logit_scale, softcap, numbers, parallel
):
    """logits (B, T, V), labels (N,) int64 -> logp (N,), normalizer (N, 2), entropy (N,), is_argmax
    (N,); the last two (0,) unless asked."""
    options = HeadOptions.of(ignore_index, logit_scale, softcap, numbers)
    stats = row_stats(
        _rows(logits), labels, options, from_handle(parallel), token_outputs=token_outputs
    )
    if not token_outputs:
        return (
            stats.logp,
            stats.normalizer,
            stats.logp.new_empty(0),
            stats.logp.new_empty(0, dtype=torch.bool),
        )
    return tuple(stats)


@token_logprobs_op.register_fake
def _(logits, labels, token_outputs, ignore_index, logit_scale, softcap, numbers, parallel):
    rows, extra = labels.numel(), labels.numel() if token_outputs else 0
    floats = {"dtype": statistics_dtype(logits)}
    return (
        logits.new_empty(rows, **floats),
        logits.new_empty(rows, 2, **floats),
        logits.new_empty(extra, **floats),
        logits.new_empty(extra, dtype=torch.bool),
    )


@operator(
    "mpo_kernels::token_logprobs_grad",
    schema=(
        f"(Tensor grad_logp, Tensor logits, Tensor labels, Tensor logp, Tensor normalizer, {_HEAD})"
        " -> Tensor"
    ),
    strided=("logits",),
)
def token_logprobs_grad_op(
    grad_logp,
    logits,
    labels,
    logp,
    normalizer,
    ignore_index,
    logit_scale,
    softcap,
    numbers,
    parallel,
):
    """dL/dlogp (N,) -> dL/dlogits (B, T, V), contiguous."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = HeadOptions.of(ignore_index, logit_scale, softcap, numbers)
    write_logit_grads(
        _rows(logits),
        labels,
        logp,
        normalizer,
        grad_logp.contiguous(),
        grad,
        options,
        from_handle(parallel),
    )
    return grad


@token_logprobs_grad_op.register_fake
def _(
    grad_logp,
    logits,
    labels,
    logp,
    normalizer,
    ignore_index,
    logit_scale,
    softcap,
    numbers,
    parallel,
):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, _, *ctx.head = inputs
    logp, normalizer, *others = output
    ctx.parallel = from_handle(ctx.head[-1])  # lives until backward has run
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(normalizer, *others)
    ctx.save_for_backward(logits, labels, logp, normalizer)


def _backward(ctx: Any, grad_logp: torch.Tensor | None, *_: Any) -> tuple:
    grad = (
        None
        if grad_logp is None
        else token_logprobs_grad_op(grad_logp, *ctx.saved_tensors, *ctx.head)
    )
    return grad, *(None,) * 7


differentiable_once(token_logprobs_op, _backward, setup_context=_save)


class InplaceTokenLogprobs(torch.autograd.Function):
    """The same results as `mpo_kernels::token_logprobs`; backward overwrites the logits with their
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, *arguments: Any
    ) -> tuple[torch.Tensor, ...]:
        labels = labels.contiguous()  # backward hands them to the kernel, past any operator's door
        output = token_logprobs_op(logits, labels, *arguments)
        _save(ctx, (logits, labels, *arguments), output)
        remember_inputs(ctx, (logits,))
        ctx.overwritten = False
        return output

    @staticmethod
    @refusing_second_derivatives
    def backward(ctx: Any, grad_logp: torch.Tensor | None, *_: Any) -> tuple:
        if ctx.overwritten:
            raise RuntimeError(
                "The logits were overwritten by their gradient in an earlier backward pass"
                " (inplace_backward=True), so a second one cannot be computed. Call with"
                " inplace_backward=False to use retain_graph=True."
            )
        if grad_logp is None:
            return (None,) * 8
        if not is_plain(grad_logp):
            raise NotImplementedError(
                "inplace_backward=True has one place for one gradient, and several are asked for"
                " (vectorize=True, is_grads_batched=True). Call with inplace_backward=False."
            )
        logits, labels, logp, normalizer = ctx.saved_tensors
        *head, parallel = ctx.head
        write_logit_grads(
            logits,
            labels,
            logp,
            normalizer,
            grad_logp.contiguous(),
            logits,
            HeadOptions.of(*head),
            from_handle(parallel),
        )
        ctx.overwritten = True
        torch.autograd.graph.increment_version(logits)  # kernels write behind autograd's back
        return logits, *(None,) * 7


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """With the columns next to each other; torch.compile may hand over other strides than it was
    traced with."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
