"""Autograd from one rank's rows of hidden states to the rows of all ranks of the vocabulary, as
sequence parallelism divides them.

Every rank's slice of the vocabulary contributes to the gradient of every row, so forward is an
all-gather, and backward a reduce-scatter of dH, (ranks - 1) / ranks of its bytes in and out: half
of what the all-reduce takes where each rank has all rows.
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.ops.operator import operator
from mpo_kernels.parallel import Parallel


@operator("mpo_kernels::gathered_rows")
def gathered_rows_op(hidden: torch.Tensor, parallel: Parallel | None) -> torch.Tensor:
    """(n, D) of this rank -> (ranks * n, D) in rank order."""
    assert parallel is not None
    return parallel.gather_rows(hidden)


@gathered_rows_op.register_fake
def _(hidden, parallel):
    return hidden.new_empty(hidden.shape[0] * parallel.vocab_ranks, hidden.shape[1])


@operator("mpo_kernels::gathered_rows_grad")
def gathered_rows_grad_op(grad: torch.Tensor, parallel: Parallel | None) -> torch.Tensor:
    """This rank's share of dL/dH (ranks * n, D) -> the sum of all shares on its own rows (n, D)."""
    assert parallel is not None
    return parallel.scatter_hidden_grads(grad)


@gathered_rows_grad_op.register_fake
def _(grad, parallel):
    return grad.new_empty(grad.shape[0] // parallel.vocab_ranks, grad.shape[1])


def _save(ctx: Any, given: Any, found: torch.Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.parallel = given.parallel  # which lives until backward has run


def _backward(ctx: Any, grad: torch.Tensor | None) -> tuple:
    return (None if grad is None else gathered_rows_grad_op(grad, ctx.parallel),)


gathered_rows_op.register_autograd(save=_save, backward=_backward)
