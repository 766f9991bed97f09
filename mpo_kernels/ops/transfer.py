"""Copies between devices, of labels, rows and offsets."""

from __future__ import annotations

import torch

from mpo_kernels.ops.once import has_data, is_wrapped


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there. From the host to a GPU by way of page-locked memory: before a copy from
    other memory the host may wait until the GPU has done all that it still has to do."""
    upload = device.type == "cuda" and tensor.device.type == "cpu"
    if upload and not (
        torch.compiler.is_compiling()
        or is_wrapped(tensor)
        or not has_data(tensor)
        # a graph copies again from where it copied first, which then belongs to others
        or torch.cuda.is_current_stream_capturing()
    ):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=upload)
