"""How kernels are made and launched: what Triton may specialise them on, and the device that they
run on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

COUNTS = ("N", "P", "T", "splits", "parts", "vocab", "blocks", "ignore_index")
"""Integers of kernels that are always numbers at run time. Triton makes another program where an
integer is 1, with that integer as a constant of Python, and another one where 16 divides it. Only
columns and strides gain by it. `ignore_index` is always labels.IGNORED: as a constant of the
kernels it costs some of them registers."""

kernel = triton.jit(do_not_specialize=COUNTS)
"""The decorator of every kernel that is launched."""


def launch(function: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs `programs` programs of a kernel on its tensors' device, which need not be the current
    one.

    Programs are counted on axis 0, the only one that holds more than 65,535.

    Raises:
        ValueError: the tensors are on several devices.
    """
    devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
    if len(devices) != 1:
        raise ValueError(
            f"{function.__name__} got tensors on {', '.join(sorted(map(str, devices)))}; a kernel"
            " runs on one device."
        )
    with _current(devices.pop()):
        function[(programs,)](*arguments, **options)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it the device is the current one. Triton launches there, and on that device's current
    stream."""
    # CPU tensors come here under the interpreter and the emulator alone.
    return (
        contextlib.nullcontext()
        if device.type in ("cpu", "meta")
        else torch.get_device_module(device).device(device)
    )
