"""Any loss of a group's sums in the loop over chunks: `mpo_kernels::linear_sequence_loss`.

S_i = sum over the rows t of sequence i of w_t logp_t, with row weights w that are known beforehand
(1 unless given). The head is told one number per sequence:

    c_i = dL/dS_i        dL/dlogp_t = c_i w_t

c comes from autograd of the loss right after a chunk's statistics (`mpo_kernels.ops.groups`).
"""

from __future__ import annotations

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.fillers import weighted
from mpo_kernels.ops.chunks import Chunk, Targets
from mpo_kernels.ops.groups import GroupLoss
from mpo_kernels.ops.linear_groups import (
    LinearLosses,
    backward,
    fake_losses,
    linear_losses,
    plan_of,
    save,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.projection import Head, Needs
from mpo_kernels.options import LogitOptions, statistics_dtype
from mpo_kernels.parallel import Parallel


@operator("mpo_kernels::linear_sequence_loss", strided=("hidden", "weight"))
def linear_sequence_loss_op(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    cu_seqlens: torch.Tensor,
    row_weights: torch.Tensor | None,
    groups: GroupLoss,
    options: LogitOptions,
    needs: Needs,
    token_outputs: bool,
) -> LinearLosses:
    """hidden (N, D), targets of M labels and cu_seqlens (kP + 1,) on any device, row_weights (M,)
    -> losses, sums and numbers of tokens (kP, 2), and gradients."""
    plan = plan_of(
        hidden,
        head,
        targets,
        cu_seqlens,
        options,
        size=groups.size,
        pairs=False,
        may_keep_chunk=False,
    )
    sequences, dtype = cu_seqlens.numel() - 1, statistics_dtype(hidden)
    loss = _Groups(
        groups, row_weights, hidden.new_empty(sequences, 2, dtype=dtype), options.parallel, needs
    )
    return linear_losses(hidden, head, plan, loss, options, needs, token_outputs)


class _Groups:
    """A `ChunkedLoss`. A unit is a sequence."""

    def __init__(
        self,
        groups: GroupLoss,
        row_weights: torch.Tensor | None,
        sequences: torch.Tensor,
        parallel: Parallel | None,
        needs: Needs,
    ) -> None:
        """`sequences` (kP, 2): memory for sums and numbers of tokens."""
        self._groups, self._row_weights, self._parallel = groups, row_weights, parallel
        self._sequences, self._needs_grad = sequences, needs.any
        self._losses = sequences.new_empty(len(sequences) // groups.size)

    def units(self, chunk: Chunk) -> list[int]:
        return chunk.lengths

    def shares(self, chunk: Chunk) -> torch.Tensor:
        if self._row_weights is None:
            return self._losses.new_ones(chunk.labels.numel())
        return self._row_weights.index_select(0, chunk.indices)

    def add(self, chunk: Chunk, logp: torch.Tensor) -> torch.Tensor:
        if self._row_weights is not None:
            logp = weighted(logp, self.shares(chunk))
        both = backend_for(logp).sequence_sums(logp, chunk.labels, chunk.cu_seqlens)
        if self._parallel is not None:
            both = self._parallel.add_sums(both)
        groups, here = self._groups.of(chunk.groups), slice(chunk.groups.start, chunk.groups.stop)
        scores = groups.scores(*both.T.contiguous())
        if self._needs_grad:
            losses, coefficients = groups.coefficients(scores)
        else:
            losses, coefficients = groups.losses(scores), logp
        self._losses[here] = losses
        size = groups.size
        self._sequences.view(size, -1, 2)[:, here] = both.view(size, -1, 2)
        return coefficients

    def factors(self, found: torch.Tensor) -> torch.Tensor:
        return found

    def row_grads(self, chunk: Chunk, found: torch.Tensor) -> torch.Tensor:
        lengths = chunk.cu_seqlens.diff().to(torch.int64)
        of_rows = torch.repeat_interleave(found, lengths, output_size=chunk.labels.numel())
        return of_rows if self._row_weights is None else weighted(of_rows, self.shares(chunk))

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._groups.scores(*self._sequences.T.contiguous())
        self._groups.probe(self._losses, scores)
        return self._groups.weighted(self._losses).sum(), self._sequences


@linear_sequence_loss_op.register_fake
def _(hidden, head, targets, cu_seqlens, row_weights, groups, options, needs, token_outputs):
    sequences = hidden.new_empty(cu_seqlens.shape[0] - 1, 2, dtype=statistics_dtype(hidden))
    return fake_losses(
        hidden,
        head,
        targets.labels.shape[0],
        sequences,
        needs,
        may_keep_chunk=False,
        token_outputs=token_outputs,
    )


linear_sequence_loss_op.register_autograd(save=save, backward=backward)
