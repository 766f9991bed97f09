"""Which implementation computes: Triton where it drives the tensor's device, else PyTorch."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from mpo_kernels.backends import eager

TRITON_DEVICES = ("cuda", "xpu")
"""Device types that Triton drives; ROCm tensors are of type `cuda` too."""


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The module of device functions for this tensor: `mpo_kernels.backends.triton` (Triton) or
    `mpo_kernels.backends.eager` (PyTorch).

    The environment variable MPO_KERNELS_BACKEND = auto | triton | torch forces one. It is read at
    every call.

    Raises:
        ValueError: the variable has another value, or triton is forced for float64 or where it is
            not installed.
    """
    choice = os.environ.get("MPO_KERNELS_BACKEND", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"MPO_KERNELS_BACKEND is {choice!r}; it can be auto, triton or torch.")
    is_double, is_installed = (
        tensor.dtype == torch.float64,
        importlib.util.find_spec("triton") is not None,
    )
    if choice == "triton" and (is_double or not is_installed):
        why = "the kernels do not compute in float64" if is_double else "triton is not installed"
        raise ValueError(f"MPO_KERNELS_BACKEND is triton, but {why}. Set it to auto or torch.")
    if choice == "torch" or is_double:
        return eager
    if choice == "triton" or (tensor.device.type in TRITON_DEVICES and is_installed):
        from mpo_kernels.backends import (
            triton,  # not at the top: triton is not there on every platform
        )

        return triton
    return eager
