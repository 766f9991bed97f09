"""Autograd from log-probabilities of tokens to the losses of pairs: `mpo_kernels::pair_loss` and
`mpo_kernels::pair_loss_grad`.

With w_i = +1/|y_w| on chosen rows and -1/|y_l| on rejected rows, e = beta * RG - RG_ref and the
upstream gradient g of a pair's loss, loss = w * e^2 gives

    dL/dRG = 2 * beta * w * e * g        dL/dlogp_i = dL/dRG * w_i                               (8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.backends.results import PairLosses
from mpo_kernels.ops.operator import operator
from mpo_kernels.options import Number
from mpo_kernels.parallel import Parallel


@dataclass(frozen=True)
class PairConstants:
    """What the loss of P pairs takes besides log-probabilities."""

    reference_gap: torch.Tensor
    """(P,)"""
    pair_weights: torch.Tensor | None
    """(P,)"""
    beta: float
    beta_number: torch.Tensor | None
    """() on the device: takes the place of beta."""

    @property
    def scale(self) -> Number:
        """What gaps are multiplied by."""
        return self.beta if self.beta_number is None else self.beta_number

    def of(self, pairs: range) -> PairConstants:
        """Those of some of the pairs."""
        here = slice(pairs.start, pairs.stop)
        weights = None if self.pair_weights is None else self.pair_weights[here]
        return PairConstants(self.reference_gap[here], weights, self.beta, self.beta_number)


def pair_losses(
    logp: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    constants: PairConstants,
    parallel: Parallel | None,
) -> PairLosses:
    """(N,) log-probs, (N,) labels, (2P + 1,) offsets -> losses, over all ranks of a context."""
    backend, sums = backend_for(logp), None
    if parallel is not None and parallel.context_group is not None:
        sums = parallel.add_sums(backend.sequence_sums(logp, labels, cu_seqlens))
    return backend.pair_loss(
        logp,
        labels,
        cu_seqlens,
        constants.reference_gap,
        constants.pair_weights,
        beta=constants.scale,
        sums=sums,
    )


@operator("mpo_kernels::pair_loss")
def pair_loss_op(
    logp: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    constants: PairConstants,
    parallel: Parallel | None,
) -> PairLosses:
    """`pair_losses`, of which `losses` are differentiable."""
    found = pair_losses(logp, labels, cu_seqlens, constants, parallel)
    return found._replace(counts=found.counts.contiguous())


@pair_loss_op.register_fake
def _(logp, labels, cu_seqlens, constants, parallel):
    pairs = constants.reference_gap.numel()
    return PairLosses(*(logp.new_empty(n) for n in (pairs, 2 * pairs, pairs, 2 * pairs, pairs)))


@operator("mpo_kernels::pair_loss_grad")
def pair_loss_grad_op(
    gap_grads: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """dL/dRG (P,) -> dL/dlogp (N,)."""
    return backend_for(gap_grads).row_grads(gap_grads, counts, labels, cu_seqlens)


@pair_loss_grad_op.register_fake
def _(gap_grads, counts, labels, cu_seqlens):
    return gap_grads.new_empty(labels.numel())


def _save(ctx: Any, given: Any, found: PairLosses) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.means, found.gaps, found.counts, found.gap_grads)
    ctx.save_for_backward(given.labels, given.cu_seqlens, found.counts, found.gap_grads)


def _backward(ctx: Any, grad_losses: torch.Tensor | None, *_: Any) -> tuple:
    if grad_losses is None:
        return (None,)
    labels, cu_seqlens, counts, gap_grads = ctx.saved_tensors
    return (pair_loss_grad_op(gap_grads * grad_losses, counts, labels, cu_seqlens),)


pair_loss_op.register_autograd(save=_save, backward=_backward)
