"""Groups, pairs, sequences and rows of weight 0: they count nothing, whatever they hold. 0 times
what is not finite would be NaN, in values and in gradients."""

from __future__ import annotations

import torch


def weighted(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """values (..., P) * weights (P,); 0 where the weight is."""
    return values if weights is None else (values * weights).where(weights != 0, 0)


def without_fillers(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The same values (..., P), of which those of weight 0 get the gradient 0: what is computed
    from them may have a derivative that is not finite."""
    return values if weights is None else values.where(weights != 0, values.detach())
