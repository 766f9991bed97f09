"""The MPO loss of pairs in the loop over chunks: `mpo_kernels::linear_pair_loss`. Its sums and its
gradients have kernels of their own (`mpo_kernels.ops.pairs`).

w_i = +1/|y_w| on chosen and -1/|y_l| on rejected rows is known from the labels, and dL/dRG is one
factor for both sequences of a pair (equation 8).
"""

from __future__ import annotations

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.backends.results import PairLosses
from mpo_kernels.ops.chunks import Chunk, Targets
from mpo_kernels.ops.linear_groups import (
    LinearLosses,
    Plan,
    backward,
    fake_losses,
    linear_losses,
    plan_of,
    save,
)
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.pairs import PairConstants, pair_losses
from mpo_kernels.ops.projection import Head, Needs
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions
from mpo_kernels.parallel import Parallel


@operator("mpo_kernels::linear_pair_loss", strided=("hidden", "weight"))
def linear_pair_loss_op(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    cu_seqlens: torch.Tensor,
    constants: PairConstants,
    options: LogitOptions,
    needs: Needs,
    may_keep_chunk: bool,
    token_outputs: bool,
) -> LinearLosses:
    """hidden (N, D), targets of M labels and cu_seqlens (2P + 1,) on any device -> losses, means
    (2P,) and gradients.

    `may_keep_chunk` makes shapes depend on the labels, which no compiler likes.
    """
    plan = plan_of(
        hidden,
        head,
        targets,
        cu_seqlens,
        options,
        size=2,
        pairs=True,
        may_keep_chunk=may_keep_chunk and needs.weight_grad,
    )
    loss = _Pairs(plan, constants, options.parallel)
    return linear_losses(hidden, head, plan, loss, options, needs, token_outputs)


class _Pairs:
    """A `ChunkedLoss`. A unit is a pair."""

    def __init__(self, plan: Plan, constants: PairConstants, parallel: Parallel | None) -> None:
        self._counts, self._constants, self._parallel = plan.counts, constants, parallel
        like, pairs = constants.reference_gap, constants.reference_gap.numel()
        self._backend, self._losses = backend_for(like), like.new_empty(pairs)
        self._means = like.new_empty(2, pairs)  # chosen and rejected

    def units(self, chunk: Chunk) -> list[int]:
        return [sum(chunk.lengths)]

    def shares(self, chunk: Chunk) -> torch.Tensor:
        like = self._losses
        counts = self._counts.view(2, -1)[:, chunk.groups.start].to(like.dtype)
        counts = on_device(counts, like.device)
        return self._backend.row_grads(like.new_ones(1), counts, chunk.labels, chunk.cu_seqlens)

    def add(self, chunk: Chunk, logp: torch.Tensor) -> PairLosses:
        found = pair_losses(
            logp,
            chunk.labels,
            chunk.cu_seqlens,
            self._constants.of(chunk.groups),
            self._parallel,
        )
        here = slice(chunk.groups.start, chunk.groups.stop)
        self._losses[here], self._means[:, here] = found.losses, found.means.view(2, -1)
        return found

    def factors(self, found: PairLosses) -> torch.Tensor:
        return found.gap_grads

    def row_grads(self, chunk: Chunk, found: PairLosses) -> torch.Tensor:
        return self._backend.row_grads(
            found.gap_grads, found.counts, chunk.labels, chunk.cu_seqlens
        )

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._losses.sum(), self._means.view(-1)


@linear_pair_loss_op.register_fake
def _(hidden, head, targets, cu_seqlens, constants, options, needs, may_keep_chunk, token_outputs):
    means = constants.reference_gap.new_empty(2 * constants.reference_gap.shape[0])
    return fake_losses(
        hidden,
        head,
        targets.labels.shape[0],
        means,
        needs,
        may_keep_chunk=may_keep_chunk,
        token_outputs=token_outputs,
    )


linear_pair_loss_op.register_autograd(save=save, backward=backward)
