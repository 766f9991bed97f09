"""What the functions of both backends return."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
    moments: torch.Tensor | None = None
    """(N, 2) log of the sum of squared probabilities, and mean final logit, where asked for."""


class RowDirections(RowStats):
    """Statistics of rows whose logits were overwritten by the directions of their gradients: what
    these are but for a factor of each row."""


class PairLosses(NamedTuple):
    """The losses of P pairs and what they were computed from; equations (1), (2) and (8)."""

    losses: torch.Tensor
    """(P,) weighted squared errors."""
    means: torch.Tensor
    """(2P,) log-probability of each sequence divided by its number of scored rows."""
    gaps: torch.Tensor
    """(P,) mean of the chosen sequence minus that of the rejected one."""
    counts: torch.Tensor
    """(2P,) scored rows of each sequence."""
    gap_grads: torch.Tensor
    """(P,) dloss/dgap."""
