"""The oracle: the plain definition of every quantity, exact in float64 and never tuned. Tests
compare everything with this file.

Notation (arXiv 2505.16869): z are the final logits of a position, y its label, |y| the number of
scored positions of a response.

    logp(y | x) = sum over scored positions of log softmax(z)[y]          avg = logp / |y|
    RG          = avg(chosen) - avg(rejected)                             (1) the reward gap
    L1          = sum over pairs of pair_weight * (beta * RG - RG_ref)^2  (2) over P for "mean"
    L2          = mean over sequences and hidden units of (pool(h) - pool_ref)^2   (3)

Equations (4) to (12), derived from these, stand in docs/mathematics.md and where the kernels
compute them.

Functions take the layouts of `mpo_kernels` (dense [2P, T, ...] or packed [N, ...] with cu_seqlens)
and are differentiable by autograd.
"""

from __future__ import annotations

from itertools import pairwise

import torch


def final_logits(
    logits: torch.Tensor, logit_scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """z = cap * tanh(scale * u / cap), or scale * u without a cap."""
    z = logits * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_logprobs(logits, labels, *, ignore_index=-100, logit_scale=1.0, softcap=None):
    """log softmax(z)[label], 0 at ignored positions. (..., V), (...) -> (...)"""
    scored = labels != ignore_index
    log_probs = final_logits(logits, logit_scale, softcap).log_softmax(-1)
    picked = log_probs.gather(-1, labels.where(scored, 0)[..., None])[..., 0]
    return picked.where(scored, 0)


def token_entropy(logits, labels, *, ignore_index=-100, logit_scale=1.0, softcap=None):
    """-sum of p log p in nats, 0 at ignored positions. (..., V), (...) -> (...)"""
    log_probs = final_logits(logits, logit_scale, softcap).log_softmax(-1)
    # masked before the product too: 0 log 0 is 0, and so is its derivative
    log_probs = log_probs.masked_fill(log_probs == float("-inf"), -1e30)
    return -(log_probs.exp() * log_probs).sum(-1).where(labels != ignore_index, 0)


def token_moments(logits, labels, *, ignore_index=-100, logit_scale=1.0, softcap=None):
    """(log of the sum of squared probabilities, mean of z over the vocabulary), 0 at ignored
    positions. (..., V), (...) -> (...), (...)"""
    scored = labels != ignore_index
    z = final_logits(logits, logit_scale, softcap)
    return (
        (2 * z.log_softmax(-1)).logsumexp(-1).where(scored, 0),
        z.mean(-1).where(scored, 0),
    )


def token_is_argmax(logits, labels, *, ignore_index=-100, logit_scale=1.0, softcap=None):
    """No token has a larger final logit than the label; False at ignored positions. (..., V), (...)
    -> (...)"""
    scored = labels != ignore_index
    z = final_logits(logits, logit_scale, softcap)
    return (z.gather(-1, labels.where(scored, 0)[..., None])[..., 0] >= z.amax(-1)) & scored


def sequence_means(token_logps, labels, *, cu_seqlens=None, ignore_index=-100):
    """avg of each sequence. (S, T) or packed (N,) -> (S,)"""
    scored = labels != ignore_index
    if cu_seqlens is None:
        return token_logps.sum(1) / scored.sum(1)
    bounds = cu_seqlens.tolist()
    return torch.stack([token_logps[a:b].sum() / scored[a:b].sum() for a, b in pairwise(bounds)])


def mpo_loss(
    logits,
    labels,
    reference_gap,
    *,
    beta=1.0,
    pair_weights=None,
    cu_seqlens=None,
    ignore_index=-100,
    logit_scale=1.0,
    softcap=None,
    reduction="mean",
):
    """Equations (1) and (2). Returns (loss, chosen avg (P,), rejected avg (P,), RG (P,))."""
    logps = token_logprobs(
        logits, labels, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap
    )
    means = sequence_means(logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    chosen, rejected = means.chunk(2)
    gap = chosen - rejected
    loss = (beta * gap - reference_gap) ** 2
    if pair_weights is not None:
        loss = torch.where(pair_weights == 0, 0, loss * pair_weights)
    loss = {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]
    return loss, chosen, rejected, gap


def linear_mpo_loss(hidden, weight, labels, reference_gap, *, bias=None, **options):
    """`mpo_loss` of the logits of a linear head."""
    return mpo_loss(
        torch.nn.functional.linear(hidden, weight, bias), labels, reference_gap, **options
    )


def linear_token_logprobs(hidden, weight, labels, *, bias=None, **options):
    """`token_logprobs` of the logits of a linear head."""
    return token_logprobs(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def mean_pool(hidden, *, mask=None, cu_seqlens=None):
    """Mean over the pooled positions of each sequence. (S, T, D) or packed (N, D) -> (S, D)"""
    if cu_seqlens is None:
        sequences = list(hidden)
        masks = [None] * len(sequences) if mask is None else list(mask)
    else:
        bounds = cu_seqlens.tolist()
        slices = [slice(a, b) for a, b in pairwise(bounds)]
        sequences = [hidden[s] for s in slices]
        masks = [None if mask is None else mask[s] for s in slices]
    return torch.stack(
        [h.mean(0) if m is None else h[m].mean(0) for h, m in zip(sequences, masks, strict=True)]
    )


def retention_loss(
    hidden, reference, *, mask=None, cu_seqlens=None, sequence_weights=None, reduction="mean"
):
    """Equation (3)."""
    per_sequence = (
        (mean_pool(hidden, mask=mask, cu_seqlens=cu_seqlens) - reference).square().mean(-1)
    )
    if sequence_weights is not None:
        per_sequence = per_sequence * sequence_weights
    return {"none": per_sequence, "sum": per_sequence.sum(), "mean": per_sequence.mean()}[reduction]
