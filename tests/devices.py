"""Devices that tests run on. Where a test's body does for any device, it runs on the CPU too, so
that the first GPU that it meets finds no mistake of the test's own."""

import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def needs(gpus: int) -> list[pytest.MarkDecorator]:
    """Marks of a test that takes so many GPUs."""
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(gpus > GPUS, reason=f"needs {gpus} GPU{'s' if gpus > 1 else ''}"),
    ]


A_GPU = needs(1)
EVERYWHERE = ("cpu", pytest.param("cuda", marks=A_GPU))
"""Values of a parameter `device`."""
