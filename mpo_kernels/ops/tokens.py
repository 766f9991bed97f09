"""Autograd from logits to log-probabilities of labels.

Registered as `mpo_kernels::token_logprobs` and `mpo_kernels::token_logprobs_grad`, so that
torch.compile takes them whole. The in-place variant, whose backward overwrites the logits, is an
autograd function of its own: a registered operator may not do that to a saved tensor.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from mpo_kernels.backends.results import RowStats
from mpo_kernels.ops.once import is_plain, refusing_second_derivatives, remember_inputs
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.stats import row_stats, write_logit_grads
from mpo_kernels.options import LogitOptions, statistics_dtype


class TokenResults(NamedTuple):
    """`RowStats` of N rows as operators return them: entropy and arg-max are (0,) unless asked
    for."""

    logp: torch.Tensor
    normalizer: torch.Tensor
    entropy: torch.Tensor
    is_argmax: torch.Tensor


@operator("mpo_kernels::token_logprobs", strided=("logits",))
def token_logprobs_op(
    logits: torch.Tensor, labels: torch.Tensor, options: LogitOptions, token_outputs: bool
) -> TokenResults:
    """logits (B, T, V), labels (N,) int64 -> statistics, of which `logp` is differentiable."""
    stats = row_stats(_rows(logits), labels, options, token_outputs=token_outputs)
    if stats.entropy is None or stats.is_argmax is None:
        none = stats.logp.new_empty(0)
        return TokenResults(stats.logp, stats.normalizer, none, none.new_empty(0, dtype=torch.bool))
    return TokenResults(stats.logp, stats.normalizer, stats.entropy, stats.is_argmax)


@token_logprobs_op.register_fake
def _(logits, labels, options, token_outputs):
    rows, extra = labels.numel(), labels.numel() if token_outputs else 0
    floats = {"dtype": statistics_dtype(logits)}
    return TokenResults(
        logits.new_empty(rows, **floats),
        logits.new_empty(rows, 2, **floats),
        logits.new_empty(extra, **floats),
        logits.new_empty(extra, dtype=torch.bool),
    )


@operator("mpo_kernels::token_logprobs_grad", strided=("logits",))
def token_logprobs_grad_op(
    grad_logp: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    options: LogitOptions,
) -> torch.Tensor:
    """dL/dlogp (N,) -> dL/dlogits (B, T, V), contiguous."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    stats = RowStats(logp, normalizer, None, None)
    write_logit_grads(_rows(logits), labels, stats, grad_logp, options, out=grad)
    return grad


@token_logprobs_grad_op.register_fake
def _(grad_logp, logits, labels, logp, normalizer, options):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, given: Any, found: TokenResults) -> None:
    ctx.options = given.options  # and with it a Parallel, which lives until backward has run
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.normalizer, found.entropy, found.is_argmax)
    ctx.save_for_backward(given.logits, given.labels, found.logp, found.normalizer)


def _backward(ctx: Any, grad_logp: torch.Tensor | None, *_: Any) -> tuple:
    if grad_logp is None:
        return (None,)
    return (token_logprobs_grad_op(grad_logp, *ctx.saved_tensors, ctx.options),)


token_logprobs_op.register_autograd(save=_save, backward=_backward)


class InplaceTokenLogprobs(torch.autograd.Function):
    """The same results as `mpo_kernels::token_logprobs`; backward overwrites the logits with their
    gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        options: LogitOptions,
        token_outputs: bool,
    ) -> tuple[torch.Tensor, ...]:
        labels = labels.contiguous()  # backward hands them to the kernel, past any operator's door
        found = token_logprobs_op(logits, labels, options, token_outputs)
        _save(ctx, SimpleNamespace(logits=logits, labels=labels, options=options), found)
        remember_inputs(ctx, (logits,))
        ctx.overwritten = False
        return tuple(found)

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
            return None, None, None, None
        if not is_plain(grad_logp):
            raise NotImplementedError(
                "inplace_backward=True has one place for one gradient, and several are asked for"
                " (vectorize=True, is_grads_batched=True). Call with inplace_backward=False."
            )
        logits, labels, logp, normalizer = ctx.saved_tensors
        stats = RowStats(logp, normalizer, None, None)
        write_logit_grads(logits, labels, stats, grad_logp.contiguous(), ctx.options, out=logits)
        ctx.overwritten = True
        torch.autograd.graph.increment_version(logits)  # kernels write behind autograd's back
        return logits, None, None, None


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """With the columns next to each other; torch.compile may hand over other strides than it was
    traced with."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
