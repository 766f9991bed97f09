"""How the public functions lay their tensors out for the operators: logits as (B, T, V), sequences
as offsets."""

from __future__ import annotations

import torch

from mpo_kernels.ops.once import has_data
from mpo_kernels.ops.transfer import on_device


def offsets_of(
    cu_seqlens: torch.Tensor | None,
    sequences: int,
    rows: int,
    like: torch.Tensor,
    device: torch.device | None = None,
) -> torch.Tensor:
    """int32 (S + 1,) offsets of the sequences on `device`, by default that of `like`; of the kind
    of `like` where that has no data."""
    device = device or like.device
    if cu_seqlens is None and not has_data(like):
        return (
            like.new_ones(sequences + 1, dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1
        ) * (rows // sequences)
    if cu_seqlens is None:
        return torch.arange(sequences + 1, dtype=torch.int32, device=device) * (rows // sequences)
    return on_device(cu_seqlens, device)


def counts_in(counted: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """bool (N,) -> int64 (S,), how many in each sequence."""
    running = torch.cat([offsets.new_zeros(1, dtype=torch.int64), counted.long().cumsum(0)])
    return running[offsets.long()].diff()


def three_dimensional(logits: torch.Tensor) -> torch.Tensor:
    """(..., V) -> (B, T, V) without a copy where strides allow: a dense pair of outer dimensions
    keeps its two strides."""
    view = (
        logits
        if logits.ndim == 3
        else logits.unsqueeze(0)
        if logits.ndim == 2
        else logits.flatten(0, -2).unsqueeze(0)
    )
    return view if view.stride(-1) == 1 or view.shape[-1] == 1 else view.contiguous()


def overwritable(logits: torch.Tensor) -> torch.Tensor:
    """`three_dimensional` of logits whose memory backward may overwrite: no leaf's, and none that
    several logits share.

    Raises:
        ValueError: it may not.
    """
    memory = logits if logits._base is None else logits._base
    if memory.is_leaf and memory.requires_grad and torch.is_grad_enabled():
        given = "are a leaf" if memory is logits else "are a view of a leaf"
        raise ValueError(
            f"inplace_backward=True would overwrite logits that {given} (a parameter or an input"
            " you hold) with their gradient. Use it on the output of a head, or pass"
            " inplace_backward=False."
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "inplace_backward=True needs logits whose last stride is 1; theirs are"
            f" {logits.stride()}."
        )
    if _may_overlap(logits):
        raise ValueError(
            "inplace_backward=True needs memory of its own for each logit; these have shape"
            f" {tuple(logits.shape)} and strides {logits.stride()}, so that several share one"
            " (expand, as_strided). Pass inplace_backward=False."
        )
    return three_dimensional(logits)


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements may share their memory: some stride is no larger than what the smaller
    ones reach together."""
    reach = 0
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
