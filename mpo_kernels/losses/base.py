"""What a sequence loss is: a small function of the sums that a model gives to a group of sequences.

A group is one sequence (SFT, KTO) or a pair (DPO and its kin), and a batch has P groups. The loss
sees for each sequence the sum of its scored tokens' log-probabilities and their number. It knows
nothing of logits, of hidden states and of how a batch is laid out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from mpo_kernels.losses.handles import (
    handle_in_graph,
    handle_of_function,
    may_be_a_constant,
    new_handle,
)


class Scores(NamedTuple):
    """k sequences of each of P groups; of a pair, the chosen one comes first."""

    logps: torch.Tensor
    """(k, P) float: sum of the log-probabilities of the scored tokens, differentiable."""
    tokens: torch.Tensor
    """(k, P) of the same dtype: how many tokens are scored; at least 1."""

    def means(self) -> torch.Tensor:
        """(k, P): log-probability per scored token."""
        return self.logps / self.tokens


def log_ratios(scores: Scores, reference_logps: torch.Tensor) -> torch.Tensor:
    """r (k, P): what the model gives to each sequence, minus what the reference model gave.

    Raises:
        ValueError: `reference_logps` has another shape than the sums. A number per pair would
            cancel in the margin, and leave a loss without a reference.
    """
    if reference_logps.shape != scores.logps.shape:
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)} and the sums"
            f" {tuple(scores.logps.shape)}, where groups are computed together; needed are (k, P)"
            " sums, one per sequence of all P groups: of pairs, first those of the chosen ones."
        )
    return scores.logps - reference_logps


@dataclass(eq=False)
class SequenceLoss:
    """A loss per group: `loss(scores, *constants) -> (P,)`, in the dtype of `scores.logps`.

    A subclass is a dataclass whose fields are its hyper-parameters. Its `__call__` computes with P
    groups at once, and the loss of a group depends on that group alone. Constants are given by the
    caller, have the groups in their last dimension, and get no gradient. A hyper-parameter may be
    set while training goes on.

        loss = DPO(beta=0.1)
        scores = Scores(torch.tensor([[-9.0], [-12.0]]), torch.tensor([[6.0], [7.0]]))
        loss(scores, torch.tensor([[-10.0], [-10.0]]))  # log(1 + exp(-0.3)), one pair

    Raises:
        ValueError: a hyper-parameter is outside of what its field allows.
    """

    sequences: ClassVar[int] = 2
    """Sequences of a group."""
    handle: ClassVar[int]
    """Of the object; a copy has another one."""

    def __new__(cls, *_: Any, **__: Any) -> SequenceLoss:
        self = super().__new__(cls)
        object.__setattr__(self, "handle", new_handle(self))
        return self

    def __setstate__(self, state: Any) -> None:
        own, in_slots = state if isinstance(state, tuple) else (state, None)
        for name, value in {**(own or {}), **(in_slots or {})}.items():
            if name != "handle":
                object.__setattr__(self, name, value)

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants that a call needs, in their order."""
        return ()

    def __setattr__(self, name: str, value: Any) -> None:
        fields = {field.name: field for field in dataclasses.fields(self)}
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"{type(self).__name__} has no {name}; its fields are: {known}.")
        allowed = fields[name].metadata.get("allowed")
        if allowed is not None and not allowed.holds(value):
            raise ValueError(
                f"{type(self).__name__}: {name} is {value!r}; needed is {allowed.words}."
            )
        object.__setattr__(self, name, value)

    def __call__(self, scores: Scores, *constants: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Interval:
    """Which numbers a hyper-parameter may be, for checks and for the words of their errors."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = value >= self.low if self.includes_low else value > self.low
        return math.isfinite(value) and above and value < self.high


def any_number(default: float) -> Any:
    """A field that takes every finite number."""
    return _field(default, Interval("a finite number"))


def positive(default: float) -> Any:
    """A field that takes numbers above 0."""
    return _field(default, Interval("a number above 0", 0))


def not_negative(default: float) -> Any:
    """A field that takes 0 and numbers above it."""
    return _field(default, Interval("a number of at least 0", 0, includes_low=True))


def flip_rate(default: float) -> Any:
    """A field that takes the share of pairs whose answers are swapped by mistake: [0, 0.5)."""
    return _field(default, Interval("a number of at least 0 and below 0.5", 0, 0.5, True))


def positive_flip_rate(default: float) -> Any:
    """The same without 0."""
    return _field(default, Interval("a number above 0 and below 0.5", 0, 0.5))


@dataclass(frozen=True)
class Choice:
    """Which words a hyper-parameter may be."""

    of: tuple[str, ...]

    @property
    def words(self) -> str:
        return " or ".join(self.of)

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return isinstance(value, str) and value in self.of


def divided_per(default: str) -> Any:
    """A field that says what a negative log-likelihood is divided by: the tokens of its own
    "sequence", or the "tokens" of the whole batch, in which long answers weigh more."""
    return _field(default, Choice(("sequence", "tokens")), kw_only=True)


def _field(default: Any, allowed: Interval | Choice, *, kw_only: bool = False) -> Any:
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"allowed": allowed})


@dataclass(eq=False)
class LikelihoodLoss(SequenceLoss):
    """A loss that holds the negative log-likelihood of each group's first sequence.

    Per "sequence" it is -m; per "tokens" -s / mean_tokens. `mean_tokens` (P,) is the same number
    for all groups: the scored tokens of the whole batch's first sequences over how many they are.
    The mean over the batch is then that over its tokens, whatever micro-batches and ranks it is
    cut into.
    """

    per: str = divided_per("tokens")

    @property
    def constants(self) -> tuple[str, ...]:
        return ("mean_tokens",) if self.per == "tokens" else ()

    def likelihood(self, scores: Scores, *mean_tokens: torch.Tensor) -> torch.Tensor:
        """(P,) negative log-likelihoods."""
        return -scores.logps[0] / mean_tokens[0] if mean_tokens else -scores.means()[0]


class Custom(SequenceLoss):
    """A function as a loss: `function(scores, *constants) -> (P,)`.

    A bare function does as well, for pairs. This says how many sequences a group has and what its
    constants are called, and is one object to compiled graphs, whatever the function holds.

    Args:
        function: what computes.
        sequences: of each group.
        constants: names of what is given behind the scores, in their order.
    Raises:
        ValueError: `function` cannot be called, or a group has no sequence.

    Example:
        >>> loss = Custom(lambda scores: -scores.means()[0], sequences=1)
        >>> loss(Scores(torch.tensor([[-6.0]]), torch.tensor([[3.0]])))
        tensor([2.])
    """

    function: Callable[..., torch.Tensor]
    names: tuple[str, ...]

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        sequences: int = 2,
        constants: tuple[str, ...] = (),
    ) -> None:
        if not callable(function):
            raise ValueError(f"Custom takes a function; this is {function!r}.")
        if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
            raise ValueError(f"Custom: sequences is {sequences!r}; needed is an int above 0.")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "sequences", sequences)
        object.__setattr__(self, "names", tuple(constants))

    @property
    def constants(self) -> tuple[str, ...]:
        return self.names

    def __call__(self, scores: Scores, *constants: torch.Tensor) -> torch.Tensor:
        return self.function(scores, *constants)

    def __repr__(self) -> str:
        return f"Custom({self.function!r}, sequences={self.sequences})"


class Sum(SequenceLoss):
    """weight_1 loss_1 + weight_2 loss_2 + ...

    TRL's Mixed Preference Optimization (arXiv 2411.10442) is
    `Sum((0.8, DPO()), (0.2, BCO()), (1.0, SFT()))`. A loss of single sequences gets
    the chosen ones.

    Raises:
        ValueError: no losses, or a weight that is no finite number.
    """

    terms: tuple[tuple[float, SequenceLoss], ...]

    def __init__(self, *terms: tuple[float, SequenceLoss]) -> None:
        if not terms:
            raise ValueError("Sum needs pairs of a weight and a loss, such as (0.8, DPO()).")
        for weight, loss in terms:
            if not Interval("", low=-math.inf).holds(weight) or not isinstance(loss, SequenceLoss):
                raise ValueError(
                    f"Sum takes pairs of a finite number and a loss; one is ({weight!r}, {loss!r})."
                )
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "sequences", max(loss.sequences for _, loss in terms))

    @property
    def constants(self) -> tuple[str, ...]:
        """Those of all terms; what two of them need is given once."""
        return tuple(dict.fromkeys(name for _, loss in self.terms for name in loss.constants))

    def __call__(self, scores: Scores, *constants: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.constants, constants, strict=True))
        total = torch.zeros_like(scores.logps[0])
        for weight, loss in self.terms:
            part = Scores(*(each[: loss.sequences] for each in scores))
            wanted = (given[name] for name in loss.constants)
            total = total + weight * loss(
                part, *(each[: loss.sequences] if each.ndim == 2 else each for each in wanted)
            )
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} {loss!r}" for weight, loss in self.terms)


def is_called_at_run_time(loss: SequenceLoss | Callable) -> bool:
    """Whether a compiled graph calls the loss by its number. Other functions, which hold something
    that a number does not tell, are traced into the graph."""
    return isinstance(loss, SequenceLoss) or may_be_a_constant(loss)


def handle_of(loss: SequenceLoss | Callable) -> int:
    """The number by which operators know a loss."""
    if isinstance(loss, SequenceLoss):
        return loss.handle
    if torch.compiler.is_compiling():
        return handle_in_graph(loss)
    return handle_of_function(loss)
