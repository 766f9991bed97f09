"""Autograd from log-probabilities of tokens to their sums over sequences:
`mpo_kernels::sequence_sums` and its transpose.

S_i = sum over the scored rows of sequence i of logp        dL/dlogp = dL/dS_i on each of them
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.labels import IGNORED
from mpo_kernels.ops.operator import operator
from mpo_kernels.parallel import Parallel


class SequenceSums(NamedTuple):
    """Of S sequences, over all ranks of a context."""

    sums: torch.Tensor
    """(S,) of the scored rows' log-probabilities; differentiable."""
    counts: torch.Tensor
    """(S,) scored rows."""


@operator("mpo_kernels::sequence_sums")
def sequence_sums_op(
    logp: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor, parallel: Parallel | None
) -> SequenceSums:
    """logp (N,), labels (N,), cu_seqlens (S + 1,) -> sums and counts."""
    both = backend_for(logp).sequence_sums(logp, labels, cu_seqlens)
    if parallel is not None:
        both = parallel.add_sums(both)
    # clones: of a single sequence both columns are contiguous as they are, and in one storage
    sums, counts = (column.clone() for column in both.unbind(1))
    return SequenceSums(sums, counts)


@sequence_sums_op.register_fake
def _(logp, labels, cu_seqlens, parallel):
    sequences = cu_seqlens.shape[0] - 1
    return SequenceSums(logp.new_empty(sequences), logp.new_empty(sequences))


@operator("mpo_kernels::sequence_sums_grad")
def sequence_sums_grad_op(
    grad_sums: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """dL/dS (S,) -> dL/dlogp (N,)."""
    lengths = cu_seqlens.diff().to(torch.int64)
    of_rows = torch.repeat_interleave(grad_sums, lengths, output_size=labels.numel())
    return of_rows.where(labels != IGNORED, 0)


@sequence_sums_grad_op.register_fake
def _(grad_sums, labels, cu_seqlens):
    return grad_sums.new_empty(labels.numel())


def _save(ctx: Any, given: Any, found: SequenceSums) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.counts)
    ctx.save_for_backward(given.labels, given.cu_seqlens)


def _backward(ctx: Any, grad_sums: torch.Tensor | None, *_: Any) -> tuple:
    return (None if grad_sums is None else sequence_sums_grad_op(grad_sums, *ctx.saved_tensors),)


sequence_sums_op.register_autograd(save=_save, backward=_backward)
