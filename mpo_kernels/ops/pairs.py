"""Autograd from log-probabilities of tokens to the losses of pairs: `mpo_kernels::pair_loss` and
`mpo_kernels::pair_loss_grad`.

With w_i = +1/|y_w| on chosen rows and -1/|y_l| on rejected rows, e = beta * RG - RG_ref and the
upstream gradient g of a pair's loss, loss = w * e^2 gives

    dL/dRG = 2 * beta * w * e * g        dL/dlogp_i = dL/dRG * w_i                               (8)
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.ops.once import differentiable_once
from mpo_kernels.ops.operator import operator
from mpo_kernels.parallel import Parallel, from_handle


def pair_losses(
    logp: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    beta: float | torch.Tensor,
    ignore_index: int,
    parallel: Parallel | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) log-probs -> means (2P,), scored counts (2P,), gaps (P,), losses (P,), dloss/dgap (P,);
    over all ranks of a context."""
    backend, sums = backend_for(logp), None
    if parallel is not None and parallel.context_group is not None:
        sums = parallel.add_sums(
            backend.sequence_sums(logp, labels, cu_seqlens, ignore_index=ignore_index)
        )
    return backend.pair_loss(
        logp, labels, cu_seqlens, reference_gap, pair_weights, beta=beta, ignore_index=ignore_index, sums=sums
    )  # fmt: skip


@operator(
    "mpo_kernels::pair_loss",
    schema=(
        "(Tensor logp, Tensor labels, Tensor cu_seqlens, Tensor reference_gap, Tensor?"
        " pair_weights, float beta, Tensor? beta_number, int ignore_index, int parallel) ->"
        " (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def pair_loss_op(
    logp, labels, cu_seqlens, reference_gap, pair_weights, beta, beta_number, ignore_index, parallel
):
    """logp (N,), labels (N,), cu_seqlens (2P + 1,), reference_gap (P,) -> losses (P,), means (2P,),
    gaps (P,), counts (2P,), dloss/dgap.
    `beta_number` () on the device takes the place of beta."""
    beta = beta if beta_number is None else beta_number
    means, counts, gap, loss, gap_grad = pair_losses(
        logp,
        labels,
        cu_seqlens,
        reference_gap,
        pair_weights,
        beta,
        ignore_index,
        from_handle(parallel),
    )
    return loss, means, gap, counts.contiguous(), gap_grad


@pair_loss_op.register_fake
def _(
    logp, labels, cu_seqlens, reference_gap, pair_weights, beta, beta_number, ignore_index, parallel
):
    pairs = reference_gap.numel()
    return tuple(logp.new_empty(n) for n in (pairs, 2 * pairs, pairs, 2 * pairs, pairs))


@operator(
    "mpo_kernels::pair_loss_grad",
    schema=(
        "(Tensor gap_grad, Tensor counts, Tensor labels, Tensor cu_seqlens, int ignore_index) ->"
        " Tensor"
    ),
)
def pair_loss_grad_op(gap_grad, counts, labels, cu_seqlens, ignore_index):
    """dL/dRG (P,) -> dL/dlogp (N,)."""
    return backend_for(gap_grad).row_grads(
        gap_grad, counts, labels, cu_seqlens, ignore_index=ignore_index
    )


@pair_loss_grad_op.register_fake
def _(gap_grad, counts, labels, cu_seqlens, ignore_index):
    return gap_grad.new_empty(labels.numel())


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, labels, cu_seqlens, *_, ctx.ignore_index, _ = inputs
    _, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    _, _, counts, gap_grad = others
    ctx.save_for_backward(labels, cu_seqlens, counts, gap_grad)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * 9
    labels, cu_seqlens, counts, gap_grad = ctx.saved_tensors
    return (
        pair_loss_grad_op(gap_grad * grad_loss, counts, labels, cu_seqlens, ctx.ignore_index),
        *(None,) * 8,
    )


differentiable_once(pair_loss_op, _backward, setup_context=_save)
