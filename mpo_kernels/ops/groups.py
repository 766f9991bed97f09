"""Autograd from sums of log-probabilities to the losses of groups: `mpo_kernels::group_losses`, by
which a compiled graph calls a loss without looking into it.

    L = sum over groups of w loss(S_1 ... S_k)        c_i = dL/dS_i

c is found where the losses are, by autograd of the loss itself. Backward multiplies it by the
upstream gradient of its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mpo_kernels.fillers import weighted, without_fillers
from mpo_kernels.losses import contract
from mpo_kernels.losses.base import Scores
from mpo_kernels.losses.contract import Loss
from mpo_kernels.ops.operator import operator


@dataclass(frozen=True)
class GroupLoss:
    """The loss of P groups, and what it takes besides their scores."""

    loss: Loss
    size: int
    """k, sequences of a group."""
    constants: torch.Tensor
    """(R, P): those of the loss, one below the other."""
    constant_rows: list[int]
    """Of each of them: k of one that is (k, P), 0 of one that is (P,)."""
    weights: torch.Tensor | None
    """(P,)"""
    validate: bool | None

    def of(self, groups: range) -> GroupLoss:
        """That of some of the groups."""
        here = slice(groups.start, groups.stop)
        return GroupLoss(
            self.loss,
            self.size,
            self.constants[:, here],
            self.constant_rows,
            None if self.weights is None else self.weights[here],
            self.validate,
        )

    def given(self) -> list[torch.Tensor]:
        """The constants as the loss takes them."""
        parts = self.constants.split([rows or 1 for rows in self.constant_rows])
        return [
            part if rows else part[0] for part, rows in zip(parts, self.constant_rows, strict=True)
        ]

    def scores(self, sums: torch.Tensor, counts: torch.Tensor) -> Scores:
        """(kP,) each -> (k, P)."""
        return Scores(sums.view(self.size, -1), counts.view(self.size, -1))

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (P,), or derivatives (k, P), times the weights."""
        return weighted(losses, self.weights)

    def coefficients(self, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (P,) without their weights, and dL/dS (kP,)."""
        losses, grads = contract.coefficients(self.loss, scores, *self.given())
        return losses, self.weighted(grads).reshape(-1).contiguous()

    def losses(self, scores: Scores) -> torch.Tensor:
        """(P,) without their weights; fillers get no gradient."""
        logps = without_fillers(scores.logps, self.weights)
        return contract.evaluate(self.loss, Scores(logps, scores.tokens), self.given())

    def rehearse(self, like: torch.Tensor) -> None:
        """Calls the loss with sums that nothing was computed for, so that what is wrong with it is
        said before the head has worked."""
        ones = like.new_ones(self.size, self.constants.shape[1], dtype=self.constants.dtype)
        if contract.is_looked_at(self.loss, ones.device, self.validate):
            contract.rehearse(self.loss, Scores(-ones, ones), self.given())

    def probe(self, losses: torch.Tensor, scores: Scores) -> None:
        """Refuses a loss that keeps no contract, where that may be looked at. `losses` (P,) are
        without their weights."""
        if contract.is_looked_at(self.loss, losses.device, self.validate):
            contract.probe(self.loss, losses, scores, self.given(), self.weights)


class GroupLosses(NamedTuple):
    """Of P groups."""

    losses: torch.Tensor
    """(P,) weighted; differentiable."""
    coefficients: torch.Tensor
    """(kP,) dL/dS of each sequence, or (0,) where not needed."""


@operator("mpo_kernels::group_losses")
def group_losses_op(
    sums: torch.Tensor, counts: torch.Tensor, groups: GroupLoss, needs_grad: bool
) -> GroupLosses:
    """sums (kP,) of log-probabilities and numbers of tokens (kP,) -> losses."""
    scores = groups.scores(sums, counts)
    if needs_grad:
        losses, grads = groups.coefficients(scores)
    else:
        losses, grads = groups.losses(scores), sums.new_empty(0)
    groups.probe(losses, scores)
    # of its own: a loss may return a view of what it was given
    return GroupLosses(groups.weighted(losses).clone(), grads)


@group_losses_op.register_fake
def _(sums, counts, groups, needs_grad):
    return GroupLosses(
        sums.new_empty(sums.shape[0] // groups.size),
        sums.new_empty(sums.shape[0] if needs_grad else 0),
    )


def _save(ctx: Any, given: Any, found: GroupLosses) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.coefficients)
    ctx.save_for_backward(found.coefficients)
    ctx.size = given.groups.size


def _backward(ctx: Any, grad_losses: torch.Tensor | None, *_: Any) -> tuple:
    if grad_losses is None:
        return (None,)
    (coefficients,) = ctx.saved_tensors
    return (grad_losses.repeat(ctx.size) * coefficients,)


group_losses_op.register_autograd(save=_save, backward=_backward)
