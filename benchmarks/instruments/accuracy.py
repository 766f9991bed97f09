"""How far a result is from the exact one."""

from __future__ import annotations

import torch

AT_ONCE = 1 << 26
"""Elements."""


def relative_error(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """|found - exact| / |exact| in L2, computed in float64; exact agreement of two zero tensors is
    0.

    Raises:
        AssertionError: one of them is missing, or their shapes differ.
    """
    assert found is not None and exact is not None
    assert found.shape == exact.shape, f"{tuple(found.shape)} is compared with {tuple(exact.shape)}"
    differences, sizes = [], []
    # some elements at a time: the float64 of both is a multiple of what they take
    for part, of_exact in zip(
        found.reshape(-1).split(AT_ONCE), exact.reshape(-1).split(AT_ONCE), strict=True
    ):
        differences.append((part.double() - of_exact.double()).norm())
        sizes.append(of_exact.double().norm())
    difference, size = torch.stack(differences).norm(), torch.stack(sizes).norm()
    return 0.0 if difference == 0 else float(difference / size.clamp_min(1e-30))
