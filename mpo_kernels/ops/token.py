"""Autograd from logits: log-probabilities of labels, and the loss of pairs from them.

Derivation. With w_i = +1/|y_w| on chosen rows and -1/|y_l| on rejected rows, e = beta * RG - RG_ref and the upstream gradient g of a pair's
loss, L1 = w * e^2 gives

    dL1/dRG = 2 * beta * w * e * g        dL1/dlogp_i = dL1/dRG * w_i        dL1/dz_i = dL1/dlogp_i * (onehot(label_i) - softmax(z_i))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mpo_kernels.backend import backend_for


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probabilities; see `token_logprobs`."""

    ignore_index: int
    logit_scale: float
    softcap: float | None

    def as_kwargs(self) -> dict[str, Any]:
        return asdict(self)


class TokenLogprobs(torch.autograd.Function):
    """logits (B, T, V) with a contiguous last dimension, labels (B * T,) -> log-probabilities (B * T,)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, options: HeadOptions, inplace_backward: bool) -> torch.Tensor:
        logp, normalizer = backend_for(logits).logprob_stats(logits, labels, **options.as_kwargs())
        ctx.save_for_backward(logits, labels, logp, normalizer)
        ctx.options, ctx.inplace_backward, ctx.overwritten = options, inplace_backward, False
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "The logits were overwritten by their gradient in an earlier backward pass (inplace_backward=True), so a second one "
                "cannot be computed. Call with inplace_backward=False to use retain_graph=True."
            )
        logits, labels, logp, normalizer = ctx.saved_tensors
        grad = logits if ctx.inplace_backward else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        backend_for(logits).logprob_grad(logits, labels, logp, normalizer, grad_logp.contiguous(), grad, **ctx.options.as_kwargs())
        if ctx.inplace_backward:
            ctx.overwritten = True
            torch.autograd.graph.increment_version(logits)  # kernels write behind autograd's back
        return grad, None, None, None


class PairLoss(torch.autograd.Function):
    """Log-probabilities (N,) -> weighted losses (P,), sequence means (2P,), gaps (P,); differentiable in the losses."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: torch.Tensor,
        labels: torch.Tensor,
        cu_seqlens: torch.Tensor,
        reference_gap: torch.Tensor,
        pair_weights: torch.Tensor | None,
        beta: float,
        ignore_index: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        means, counts, gap, loss, gap_grad = backend_for(logp).pair_loss(
            logp, labels, cu_seqlens, reference_gap, pair_weights, beta=beta, ignore_index=ignore_index
        )
        ctx.save_for_backward(labels, cu_seqlens, counts, gap_grad)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(means, gap)
        return loss, means, gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        labels, cu_seqlens, counts, gap_grad = ctx.saved_tensors
        grad = backend_for(gap_grad).row_grads(gap_grad * grad_loss, counts, labels, cu_seqlens, ignore_index=ctx.ignore_index)
        return grad, None, None, None, None, None, None
