"""What all operators share: the options of a head, and the statistics of its rows on one rank or
over slices of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.ops.once import is_plain
from mpo_kernels.parallel import Parallel


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probabilities; see `token_logprobs`."""

    ignore_index: int
    logit_scale: float | torch.Tensor
    softcap: float | torch.Tensor | None

    @classmethod
    def of(
        cls,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
        numbers: torch.Tensor | None,
    ) -> HeadOptions:
        """As operators get them: `numbers` (2,) on the device takes the place of the other two, but
        for whether there is a softcap."""
        if numbers is not None:
            return cls(ignore_index, numbers[0], None if softcap is None else numbers[1])
        return cls(ignore_index, logit_scale, softcap)

    @property
    def kwargs(self) -> dict:
        """As keywords of the backends' functions."""
        return {
            "ignore_index": self.ignore_index,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }


def as_arguments(like: torch.Tensor, *numbers: float | torch.Tensor | None) -> tuple:
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
        return *(None if n is None else float(n) for n in numbers), None
    one = torch.ones((), dtype=statistics_dtype(like), device=like.device)
    stored = torch.stack([one if n is None else (one * n).to(one.dtype) for n in numbers])
    return *(None if n is None else 1.0 for n in numbers), stored


def _is_stored(number: float | torch.Tensor | None) -> bool:
    """Whether it is a tensor, or a float of which a compiler does not know the value."""
    if number is None or isinstance(number, torch.Tensor) or not torch.compiler.is_compiling():
        return isinstance(number, torch.Tensor)
    # where compilers are, with sympy: not for everyone who imports this
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


class RowStats(NamedTuple):
    """Statistics of N rows, in float32 (float64 for float64 logits). Rows that are not scored hold
    0, False and an arbitrary normalizer."""

    logp: torch.Tensor
    """(N,) log-probability of the label, NaN for a label outside the vocabulary."""
    normalizer: torch.Tensor
    """(N, 2): peak and total, softmax = exp(z - peak) / total."""
    entropy: torch.Tensor | None
    """(N,) in nats, where it was asked for."""
    is_argmax: torch.Tensor | None
    """(N,) bool, where it was asked for."""


def row_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: HeadOptions,
    parallel: Parallel | None,
    *,
    token_outputs: bool = False,
) -> RowStats:
    """Statistics of logits (B, T, V), or of this rank's slice of them, labels (N,) counted over the
    whole vocabulary."""
    backend = backend_for(logits)
    if parallel is None or parallel.vocab_group is None:
        return RowStats(
            *backend.logprob_stats(logits, labels, **options.kwargs, token_outputs=token_outputs)
        )
    local, local_options = _local(labels, options, parallel)
    partials = backend.logprob_partials(
        logits, local, **local_options.kwargs, token_outputs=token_outputs
    )
    gathered = parallel.gather_partials(partials)
    unknown = (labels != options.ignore_index) & ((labels < 0) | (labels >= parallel.vocab))
    # as one rank marks it: value and gradient are NaN
    gathered[0, :, 3].masked_fill_(unknown, float("nan"))
    return RowStats(
        *backend.combine(
            gathered, labels, ignore_index=options.ignore_index, token_outputs=token_outputs
        )
    )


def write_logit_grads(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logp: torch.Tensor,
    normalizer: torch.Tensor,
    row_grad: torch.Tensor,
    out: torch.Tensor,
    options: HeadOptions,
    parallel: Parallel | None,
) -> None:
    """Writes dL/dlogits of this rank's logits (B, T, V) into `out`, which may be `logits`; row_grad
    (N,) is dL/dlogp."""
    local, options = _local(labels, options, parallel)
    backend_for(logits).logprob_grad(
        logits, local, logp, normalizer, row_grad, out, **options.kwargs
    )


def _local(
    labels: torch.Tensor, options: HeadOptions, parallel: Parallel | None
) -> tuple[torch.Tensor, HeadOptions]:
    """Labels as this rank's slice of the vocabulary counts them, and the options that go with
    them."""
    if parallel is None:
        return labels, options
    local, ignore_index = parallel.local_labels(labels, options.ignore_index)
    return local, replace(options, ignore_index=ignore_index)


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
