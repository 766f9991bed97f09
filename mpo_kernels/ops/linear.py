"""Autograd from hidden states through a linear head, z = H W^T + b, whose [tokens, vocab] logits never exist as a whole.

With G = onehot - softmax and the gradient c_i of row i's log-probability, row factors commute with both GEMMs:

    dH = diag(c) G W        dW = (diag(c) G)^T H        db = sum over rows of diag(c) G

c is known as soon as a pair's gap is, so a chunk of whole pairs does: logits GEMM, statistics, pair loss, gradient in the place of the
logits, dH GEMM, dW GEMM. Three GEMMs, nothing recomputed. The gradients are computed in the forward pass and only scaled in backward;
backward
needs neither the weight's data (ZeRO-3 may have partitioned it by then) nor the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mpo_kernels.backend import backend_for
from mpo_kernels.ops.token import HeadOptions
from mpo_kernels.planning import plan_pairs, rows_per_chunk, split_rows


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(n, D), (V, D) -> (1, n, V), in the dtype of `hidden`."""
    return torch.nn.functional.linear(hidden, weight, bias)[None]


class _HeadGradients:
    """Accumulates dH, dW and db chunk by chunk; what is not needed is not computed."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: tuple[bool, bool, bool]) -> None:
        self._weight, self._needs = weight, needs
        # Sums over many chunks in bf16 would lose most of what the later chunks add.
        self._precise = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight: torch.Tensor | None = None  # made by the first chunk, so that nothing is filled with zeros first
        self.bias = torch.zeros(weight.shape[0], dtype=self._precise, device=weight.device) if needs[2] else None

    def add(self, rows: slice, grad_logits: torch.Tensor, hidden: torch.Tensor, grad_hidden: torch.Tensor | None) -> None:
        """Takes in grad_logits (n, V) of hidden (n, D); their dH goes to `rows` of grad_hidden."""
        if grad_hidden is not None:
            torch.mm(grad_logits, self._weight, out=grad_hidden[rows])
        if self._needs[1]:
            if self.weight is None:
                self.weight = torch.mm(grad_logits.T, hidden).to(self._precise)
            elif self.weight.dtype == grad_logits.dtype:
                torch.addmm(self.weight, grad_logits.T, hidden, out=self.weight)
            else:
                self.weight.add_(grad_logits.T @ hidden)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))


def _scaled(grad: torch.Tensor | None, scale: torch.Tensor, like: tuple[torch.Size, torch.dtype] | None) -> torch.Tensor | None:
    """grad * scale in the dtype and shape of its input, without changing `grad` (so retain_graph is safe) and without a host sync."""
    if grad is None or like is None:
        return None
    shape, dtype = like
    return torch.mul(grad, scale, out=torch.empty(grad.shape, dtype=dtype, device=grad.device)).view(shape)


class LinearPairLoss(torch.autograd.Function):
    """Sum of the pairs' weighted losses (), sequence means (2P,), gaps (P,); differentiable in the loss.

    hidden (M, D) and labels (M,) hold scored rows only, chosen sequences first; `lengths` are the 2P sequences' row counts on the host.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        lengths: tuple[int, ...],
        reference_gap: torch.Tensor,
        pair_weights: torch.Tensor | None,
        beta: float,
        options: HeadOptions,
        chunk_bytes: int | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        backend, P = backend_for(hidden), len(lengths) // 2
        budget = rows_per_chunk(weight.shape[0], hidden.dtype.itemsize, chunk_bytes)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        gradients = _HeadGradients(hidden, weight, bias, needs)
        losses, chosen, rejected, gaps = [], [], [], []
        for chunk in plan_pairs(lengths, budget):
            # The chunk's chosen rows and its rejected rows are one slice each of the compacted rows.
            halves = [slice(starts[s + chunk.first], starts[s + chunk.last]) for s in (0, P)]
            counts = [*lengths[chunk.first : chunk.last], *lengths[P + chunk.first : P + chunk.last]]
            cu_seqlens = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(hidden.device, non_blocking=True)
            pairs = slice(chunk.first, chunk.last)
            chunk_labels = torch.cat([labels[half] for half in halves])
            chunk_hidden = torch.cat([hidden[half] for half in halves])
            weights = None if pair_weights is None else pair_weights[pairs]

            # A pair larger than the budget is scored piece by piece, and its pieces' logits are computed again for the gradient.
            pieces = split_rows(0, chunk.rows, max(budget, 1))
            stats = []
            for a, b in pieces:
                logits = _logits(chunk_hidden[a:b], weight, bias)
                stats.append(backend.logprob_stats(logits, chunk_labels[a:b], **options.as_kwargs()))
            means, scored, gap, loss, gap_grad = backend.pair_loss(
                torch.cat([logp for logp, _ in stats]),
                chunk_labels,
                cu_seqlens,
                reference_gap[pairs],
                weights,
                beta=beta,
                ignore_index=options.ignore_index,
            )
            losses.append(loss)
            gaps.append(gap)
            chosen.append(means[: len(gap)])
            rejected.append(means[len(gap) :])
            if not any(needs):
                continue
            row_grad = backend.row_grads(gap_grad, scored, chunk_labels, cu_seqlens, ignore_index=options.ignore_index)
            chunk_grad = torch.empty_like(chunk_hidden) if needs[0] else None
            for (a, b), (logp, normalizer) in zip(pieces, stats, strict=True):
                if len(pieces) > 1:
                    logits = _logits(chunk_hidden[a:b], weight, bias)
                backend.logprob_grad(logits, chunk_labels[a:b], logp, normalizer, row_grad[a:b], logits, **options.as_kwargs())
                gradients.add(slice(a, b), logits[0], chunk_hidden[a:b], chunk_grad)
            if chunk_grad is not None and gradients.hidden is not None:
                split = halves[0].stop - halves[0].start
                gradients.hidden[halves[0]], gradients.hidden[halves[1]] = chunk_grad[:split], chunk_grad[split:]
        ctx.gradients = (gradients.hidden, gradients.weight, gradients.bias)
        ctx.like = tuple(None if t is None else (t.shape, t.dtype) for t in (hidden, weight, bias))
        means, gap = torch.cat(chosen + rejected), torch.cat(gaps)
        ctx.mark_non_differentiable(means, gap)
        return torch.cat(losses).sum(), means, gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grads = (_scaled(grad, grad_loss, like) for grad, like in zip(ctx.gradients, ctx.like, strict=True))
        return *grads, *(None,) * 8


class LinearTokenLogprobs(torch.autograd.Function):
    """hidden (M, D), labels (M,) -> log-probabilities (M,). Keeps three numbers a row; backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: HeadOptions,
        chunk_bytes: int | None,
    ) -> torch.Tensor:
        backend = backend_for(hidden)
        budget = rows_per_chunk(weight.shape[0], hidden.dtype.itemsize, chunk_bytes)
        ctx.pieces = split_rows(0, hidden.shape[0], budget)
        stats = [backend.logprob_stats(_logits(hidden[a:b], weight, bias), labels[a:b], **options.as_kwargs()) for a, b in ctx.pieces]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.cat([hidden.new_empty(0, dtype=dtype), *(logp for logp, _ in stats)])
        normalizer = torch.cat([hidden.new_empty(0, 2, dtype=dtype), *(normalizer for _, normalizer in stats)])
        ctx.save_for_backward(hidden, weight, bias, labels, logp, normalizer)
        ctx.options = options
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, logp, normalizer = ctx.saved_tensors
        backend, row_grad = backend_for(hidden), grad_logp.contiguous()
        gradients = _HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for a, b in ctx.pieces:
            logits = _logits(hidden[a:b], weight, bias)
            backend.logprob_grad(logits, labels[a:b], logp[a:b], normalizer[a:b], row_grad[a:b], logits, **ctx.options.as_kwargs())
            gradients.add(slice(a, b), logits[0], hidden[a:b], gradients.hidden)
        weight_grad = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        bias_grad = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, weight_grad, bias_grad, None, None, None
