"""What is asked of a loss, and how it is found out.

- It gives one float per group, computed from `scores.logps`: looked at in every call.
- The loss of a group depends on that group alone. Each of its groups has the same loss alone, among
  the others of a chunk, and among all: a probe of values, since a detached mean of the batch leaves
  no trace in gradients.
- It reads nothing back to the host, which would wait for a GPU in the middle of the head's work.

The last two are looked at where data are there to be read: in every call on the CPU, and on a GPU
in a loss's first call with several groups, which waits once. `validate=True` always looks,
`validate=False` never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpo_kernels.fillers import weighted
from mpo_kernels.losses.base import Scores, SequenceLoss, handle_of

Loss = SequenceLoss | Callable[..., torch.Tensor]
"""`loss(scores, *constants) -> (P,)`. A bare function is one of pairs."""

_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "is_nonzero"),
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"),
        *("__contains__", "masked_select", "unique"),
    )
) | {torch.nonzero, torch.equal, torch.allclose, torch.is_nonzero, torch.masked_select}
_PROBED: set[int] = set()
"""Handles of losses that have been found right with several groups."""


def name_of(loss: Loss) -> str:
    """What errors call it."""
    return type(loss).__name__ if isinstance(loss, SequenceLoss) else "the loss"


def size_of(loss: Loss) -> int:
    """Sequences of a group."""
    return loss.sequences if isinstance(loss, SequenceLoss) else 2


def is_looked_at(loss: Loss, device: torch.device, validate: bool | None) -> bool:
    """Whether a call reads data for checks."""
    if validate is not None:
        return validate
    return device.type == "cpu" or handle_of(loss) not in _PROBED


def evaluate(loss: Loss, scores: Scores, constants: Sequence[torch.Tensor]) -> torch.Tensor:
    """The losses (P,) of a call.

    Raises:
        ValueError: they are no floats per group, or have no gradient where there is one.
    """
    values, count = loss(scores, *constants), scores.logps.shape[1]
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values)
        raise ValueError(
            f"{name_of(loss)} returned {shape}; needed is one loss per group, ({count},) for the"
            f" {count} that were computed together. Leave the mean to reduction."
        )
    if not values.is_floating_point() or (scores.logps.requires_grad and not values.requires_grad):
        raise ValueError(
            f"{name_of(loss)} returned {values.dtype} without a gradient; needed are floats that"
            " were computed from scores.logps."
        )
    return values.to(scores.logps.dtype)  # which a graph counts on


def coefficients(
    loss: Loss, scores: Scores, *constants: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (P,) and their derivatives dL/dS (k, P) by the sums of log-probabilities.

    It is plain autograd, and works where gradients are switched off around it.

    Raises:
        ValueError: the loss is none, or would train a tensor of its own.
    """
    # inference_mode(False) brings the keys of autograd back, which a registered operator is run
    # without
    with torch.inference_mode(False), torch.enable_grad():
        sums = scores.logps.detach().clone().requires_grad_()
        given = [constant.detach().clone() for constant in constants]
        losses = evaluate(loss, Scores(sums, scores.tokens.detach().clone()), given)
        _check_trains_nothing_else(loss, losses, sums)
        (gradient,) = torch.autograd.grad(losses.sum(), sums)
    return losses.detach(), gradient


def _check_trains_nothing_else(loss: Loss, losses: torch.Tensor, sums: torch.Tensor) -> None:
    """A parameter in the loss would silently get no gradient."""
    nodes, seen = [losses.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", sums) is not sums:
            raise ValueError(
                f"{name_of(loss)} holds a tensor that requires a gradient, which gets none here."
                " Detach it, or compute the whole loss from mpo_kernels.linear_token_logprobs."
            )
        nodes += [following for following, _ in node.next_functions]


def rehearse(loss: Loss, scores: Scores, constants: Sequence[torch.Tensor]) -> None:
    """Calls the loss with any numbers.

    Raises:
        ValueError: it is none, or reads the host.
    """
    with _Watched(name_of(loss)):
        coefficients(loss, scores, *constants)


def probe(
    loss: Loss,
    values: torch.Tensor,
    scores: Scores,
    constants: Sequence[torch.Tensor],
    weights: torch.Tensor | None = None,
) -> None:
    """Calls the loss again and compares with what it gave, `values` (P,).

    Raises:
        ValueError: it reads the host, is not finite where its scores are and its weight is not 0,
            or its groups depend on each other.
    """
    scores = Scores(*(part.detach() for part in scores))
    with torch.no_grad(), _Watched(name_of(loss)):
        together = evaluate(loss, scores, constants)
    finite = torch.stack([part.isfinite().all() for part in scores]).all()
    wrong = ~weighted(values, weights).isfinite()
    if bool(finite) and bool(wrong.any()):
        place = int(torch.nonzero(wrong)[0])
        raise ValueError(
            f"{name_of(loss)} is {float(values[place])} for group {place}, whose scores and"
            " constants are finite."
        )
    count = values.numel()
    for place in {0, count - 1}:
        with torch.no_grad():
            (alone,) = evaluate(
                loss,
                Scores(*(part[:, place : place + 1] for part in scores)),
                [constant[..., place : place + 1] for constant in constants],
            )
        _check_the_same(loss, place, alone, values[place])
        _check_the_same(loss, place, alone, together[place])
    if count > 1:
        _PROBED.add(handle_of(loss))


def _check_the_same(loss: Loss, place: int, alone: torch.Tensor, among: torch.Tensor) -> None:
    if not torch.allclose(alone, among, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"{name_of(loss)} makes groups depend on each other: group {place} alone has"
            f" {float(alone):.6g}, and {float(among):.6g} among the others. Is there a mean, a sort"
            " or a maximum over the groups in it, or a random number? Compute it beforehand and"
            " give it as a constant, or compute the whole loss from"
            " mpo_kernels.linear_token_logprobs."
        )


class _Watched(TorchFunctionMode):
    """Refuses what waits for the device."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _READS:
            raise ValueError(
                f"{self._name} reads a tensor on the host ({func.__name__}), as .item() and `if`"
                " do, which makes a GPU wait. Choose with torch.where, or give the number as a"
                " constant or a field."
            )
        return func(*args, **(kwargs or {}))
