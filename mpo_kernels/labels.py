"""What stands for labels that are not scored, or not here. The door brings whatever the caller
ignores to one number, so that nothing behind it is told which."""

from __future__ import annotations

import torch

IGNORED = -100
"""A position that is not scored."""

UNKNOWN = -1
"""A label that no vocabulary, or not this rank's slice of it, has."""


def with_one_ignored(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels in which IGNORED stands where `ignore_index` stood, and nowhere else; `labels`
    themselves where that is what the caller uses."""
    if ignore_index == IGNORED:
        return labels
    known = labels.masked_fill(labels == IGNORED, UNKNOWN)
    return known.masked_fill(labels == ignore_index, IGNORED)
