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
from mpo_kernels.ops.stats import constants_of, row_stats, write_logit_grads
from mpo_kernels.options import LogitOptions, Wanted, statistics_dtype


class TokenResults(NamedTuple):
    """`RowStats` of N rows as operators return them: entropy and arg-max are (0,), and moments
    (0, 2), unless asked for."""

    logp: torch.Tensor
    normalizer: torch.Tensor
    entropy: torch.Tensor
    is_argmax: torch.Tensor
    moments: torch.Tensor


@operator("mpo_kernels::token_logprobs", strided=("logits",))
def token_logprobs_op(
    logits: torch.Tensor, labels: torch.Tensor, options: LogitOptions, wanted: Wanted
) -> TokenResults:
    """logits (B, T, V), labels (N,) int64 -> statistics, of which `logp` is differentiable, and
    the entropy where it is asked to be."""
    stats = row_stats(
        _rows(logits),
        labels,
        options,
        token_outputs=wanted.token_outputs,
        moments=wanted.moments,
    )
    none = stats.logp.new_empty(0)
    return TokenResults(
        stats.logp,
        stats.normalizer,
        none if stats.entropy is None else stats.entropy,
        none.new_empty(0, dtype=torch.bool) if stats.is_argmax is None else stats.is_argmax,
        none.new_empty(0, 2) if stats.moments is None else stats.moments,
    )


@token_logprobs_op.register_fake
def _(logits, labels, options, wanted):
    rows, extra = labels.numel(), labels.numel() if wanted.token_outputs else 0
    floats = {"dtype": statistics_dtype(logits)}
    return TokenResults(
        logits.new_empty(rows, **floats),
        logits.new_empty(rows, 2, **floats),
        logits.new_empty(extra, **floats),
        logits.new_empty(extra, dtype=torch.bool),
        logits.new_empty(rows if wanted.moments else 0, 2, **floats),
    )


@operator("mpo_kernels::token_logprobs_grad", strided=("logits",))
def token_logprobs_grad_op(
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logits: torch.Tensor,
    labels: torch.Tensor,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    entropy: torch.Tensor | None,
    options: LogitOptions,
) -> torch.Tensor:
    """dL/dlogp (N,) and dL/dentropy (N,) -> dL/dlogits (B, T, V), contiguous."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    stats = RowStats(logp, normalizer, entropy, None)
    write_logit_grads(
        _rows(logits), labels, stats, grad_logp, options, out=grad, entropy_grads=grad_entropy
    )
    return grad


@token_logprobs_grad_op.register_fake
def _(grad_logp, grad_entropy, logits, labels, logp, normalizer, entropy, options):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, given: Any, found: TokenResults) -> None:
    ctx.options = given.options  # and with it a Parallel, which lives until backward has run
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*constants_of(found, given.wanted))
    entropy = found.entropy if given.wanted.entropy_grad else None
    ctx.save_for_backward(given.logits, given.labels, found.logp, found.normalizer, entropy)


def _backward(
    ctx: Any,
    grad_logp: torch.Tensor | None,
    grad_normalizer: None,
    grad_entropy: torch.Tensor | None,
    *_: Any,
) -> tuple:
    if grad_logp is None and grad_entropy is None:
        return (None,)
    logits, labels, logp, normalizer, entropy = ctx.saved_tensors
    return (
        token_logprobs_grad_op(
            torch.zeros_like(logp) if grad_logp is None else grad_logp,
            grad_entropy,
            logits,
            labels,
            logp,
            normalizer,
            entropy,
            ctx.options,
        ),
    )


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
        wanted: Wanted,
    ) -> tuple[torch.Tensor, ...]:
        labels = labels.contiguous()  # backward hands them to the kernel, past any operator's door
        found = token_logprobs_op(logits, labels, options, wanted)
        given = SimpleNamespace(logits=logits, labels=labels, options=options, wanted=wanted)
        _save(ctx, given, found)
        remember_inputs(ctx, (logits,))
        ctx.overwritten = False
        return tuple(found)

    @staticmethod
    @refusing_second_derivatives
    def backward(
        ctx: Any,
        grad_logp: torch.Tensor | None,
        grad_normalizer: None,
        grad_entropy: torch.Tensor | None,
        *_: Any,
    ) -> tuple:
        if ctx.overwritten:
            raise RuntimeError(
                "The logits were overwritten by their gradient in an earlier backward pass"
                " (inplace_backward=True), so a second one cannot be computed. Call with"
                " inplace_backward=False to use retain_graph=True."
            )
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None
        if not all(is_plain(grad) for grad in (grad_logp, grad_entropy) if grad is not None):
            raise NotImplementedError(
                "inplace_backward=True has one place for one gradient, and several are asked for"
                " (vectorize=True, is_grads_batched=True). Call with inplace_backward=False."
            )
        logits, labels, logp, normalizer, entropy = ctx.saved_tensors
        write_logit_grads(
            logits,
            labels,
            RowStats(logp, normalizer, entropy, None),
            torch.zeros_like(logp) if grad_logp is None else grad_logp.contiguous(),
            ctx.options,
            out=logits,
            entropy_grads=None if grad_entropy is None else grad_entropy.contiguous(),
        )
        ctx.overwritten = True
        torch.autograd.graph.increment_version(logits)  # kernels write behind autograd's back
        return logits, None, None, None


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """With the columns next to each other; torch.compile may hand over other strides than it was
    traced with."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
