"""What torch.utils.flop_counter counts for the linear operators, into which it cannot look: 2 x
rows x D x V for each of their products.

Rows are the scored ones; of tensors without data, all.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mpo_kernels.ops.chunks import Targets, group_lengths, pieces_of
from mpo_kernels.ops.gradients import HeadGrads
from mpo_kernels.ops.linear_groups import LinearLosses, early_units
from mpo_kernels.ops.linear_pairs import linear_pair_loss_op
from mpo_kernels.ops.linear_sequences import linear_sequence_loss_op
from mpo_kernels.ops.linear_tokens import (
    LinearTokenResults,
    linear_token_logprobs_grad_op,
    linear_token_logprobs_op,
)


def tell_counters() -> None:
    """Tells torch's counter the formulas: for counters to come, and those that count this call and
    took their copy before.

    Not on import, which would import triton with the counter, and warn where there is none.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:  # nobody counts
        return
    operators = torch.ops.mpo_kernels
    formulas = {
        operators.linear_pair_loss: linear_pair_loss_op.counted(_pair_loss),
        operators.linear_sequence_loss: linear_sequence_loss_op.counted(_sequence_loss),
        operators.linear_token_logprobs: linear_token_logprobs_op.counted(_token_logprobs),
        operators.linear_token_logprobs_grad: linear_token_logprobs_grad_op.counted(
            _token_logprobs_grad
        ),
    }
    module.flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            mode.counter.flop_registry.update(formulas)


def _pair_loss(given: Any, found: LinearLosses) -> int:
    return _group_losses(given, found, size=2, is_one_unit=True)


def _sequence_loss(given: Any, found: LinearLosses) -> int:
    return _group_losses(given, found, size=given.groups.size, is_one_unit=False)


def _group_losses(given: Any, found: LinearLosses, *, size: int, is_one_unit: bool) -> int:
    """`is_one_unit`: the sequences of a group lack one factor while its loss is not known."""
    labels, weight, needs = given.targets.labels, given.head.weight, given.needs
    if not _has_data(labels):
        return _products(labels.numel(), weight, 1 + needs.hidden_grad + needs.weight_grad)
    is_scored = labels != given.targets.ignore_index
    counted = torch.cat([labels.new_zeros(1), is_scored.cumsum(0)]).cpu()
    lengths = counted[given.cu_seqlens.cpu().long()].diff().tolist()
    # else the weight's product is made in backward, where it is seen
    is_made = needs.weight_grad and not found.kept_grads.shape[0]
    budget = given.head.rows_per_chunk(given.hidden, given.options.parallel)
    computed_again, weight_is_empty = 0, True
    for group, rows in enumerate(group_lengths(lengths, size)):
        if needs.any and rows > budget:
            units = [rows] if is_one_unit else lengths[group :: len(lengths) // size]
            early = early_units(len(units), needs, weight_is_empty)
            computed_again += sum(
                piece.stop - piece.start for piece in pieces_of(units, budget, early).again
            )
            weight_is_empty = False
    return _products(sum(lengths), weight, 1 + needs.hidden_grad + is_made) + _products(
        computed_again, weight, 1
    )


def _token_logprobs(given: Any, found: LinearTokenResults) -> int:
    return _products(_scored(given.targets), given.head.weight, 1 + given.keep_hidden_grad)


def _token_logprobs_grad(given: Any, found: HeadGrads) -> int:
    is_computed_again = not given.kept_logits.shape[0]
    count = is_computed_again + given.needs.hidden_grad + given.needs.weight_grad
    return _products(_scored(given.targets), given.head.weight, count)


def _products(rows: int, weight: torch.Tensor, count: int) -> int:
    return 2 * rows * weight.numel() * count


def _scored(targets: Targets) -> int:
    labels = targets.labels
    return int((labels != targets.ignore_index).sum()) if _has_data(labels) else labels.numel()


def _has_data(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"
