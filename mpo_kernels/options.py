"""Options of a call, checked once by the public functions and handed on as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpo_kernels import checks
from mpo_kernels.ops.once import is_plain
from mpo_kernels.parallel import Parallel

Number = float | torch.Tensor
"""A Python number, or a tensor of shape () without gradient on the CPU or the device of the others,
where it is not read back. Under torch.compile it may change from call to call without a new
graph."""


@dataclass(frozen=True)
class LogitOptions:
    """How logits become log-probabilities (equation 6), and where the rest of the vocabulary is."""

    logit_scale: float
    softcap: float | None
    numbers: torch.Tensor | None
    """(2,) on the device: takes the place of the other two, but for whether there is a softcap."""
    parallel: Parallel | None

    @classmethod
    def checked(
        cls,
        like: torch.Tensor,
        logit_scale: Number,
        softcap: Number | None,
        parallel: Parallel | None,
    ) -> LogitOptions:
        """Of a call whose main tensor is `like`.

        Raises:
            ValueError: an option cannot be.
        """
        checks.check_number("logit_scale", logit_scale, like)
        checks.check_number("softcap", softcap, like)
        checks.check_parallel(parallel)
        (scale, cap), numbers = stored(like, logit_scale, softcap)
        return cls(1.0 if scale is None else scale, cap, numbers, parallel)

    @property
    def transform(self) -> dict[str, Any]:
        """`logit_scale` and `softcap` as keywords of the backends: numbers, or () on the device."""
        return {"logit_scale": self.scale, "softcap": self._cap}

    @property
    def scale(self) -> Number:
        """What logits are multiplied by."""
        return self.logit_scale if self.numbers is None else self.numbers[0]

    @property
    def _cap(self) -> Number | None:
        return self.softcap if self.numbers is None or self.softcap is None else self.numbers[1]


@dataclass(frozen=True)
class Wanted:
    """What is asked about each token beside its log-probability."""

    token_outputs: bool
    """Entropy and arg-max."""
    moments: bool = False
    """Log of the sum of squared probabilities, and mean logit."""
    entropy_grad: bool = False
    """The entropy is differentiable."""


def stored(
    like: torch.Tensor, *numbers: Number | None
) -> tuple[tuple[float | None, ...], torch.Tensor | None]:
    """`numbers` as operators take them: each a float or None, and then None, or all of them (n,) on
    the device of `like` instead.

    The latter where one is a tensor there or a variable of torch.compile, which makes a graph for
    each value of an operator's float, or keeps the first. Neither reads the device. Tensors on the
    CPU are floats, but to a compiler.
    """
    if not torch.compiler.is_compiling():
        numbers = tuple(
            (
                n.item()
                if isinstance(n, torch.Tensor) and n.device.type == "cpu" and is_plain(n)
                else n
            )
            for n in numbers
        )
    if not any(map(_is_stored, numbers)):
        return tuple(None if n is None else float(n) for n in numbers), None
    one = torch.ones((), dtype=statistics_dtype(like), device=like.device)
    on_device = torch.stack([one if n is None else (one * n).to(one.dtype) for n in numbers])
    return tuple(None if n is None else 1.0 for n in numbers), on_device


def _is_stored(number: Number | None) -> bool:
    """Whether it is a tensor, or a float of which a compiler does not know the value."""
    if number is None or isinstance(number, torch.Tensor) or not torch.compiler.is_compiling():
        return isinstance(number, torch.Tensor)
    # where compilers are, with sympy: not for everyone who imports this
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which everything about rows of `tensor` is computed: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
