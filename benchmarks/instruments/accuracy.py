"""How far a result is from the exact one."""

from __future__ import annotations

import torch


def relative_error(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """|found - exact| / |exact| in L2, computed in float64; exact agreement of two zero tensors is
    0.

    Raises:
        AssertionError: one of them is missing, or their shapes differ.
    """
    assert found is not None and exact is not None
    assert found.shape == exact.shape, f"{tuple(found.shape)} is compared with {tuple(exact.shape)}"
    difference = (found.double() - exact.double()).norm()
    return 0.0 if difference == 0 else float(difference / exact.double().norm().clamp_min(1e-30))
