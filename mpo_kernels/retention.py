"""The retention loss of MPO, and the pool that it compares. Shapes: S sequences, T positions, N
rows, D hidden."""

from __future__ import annotations

import torch

from mpo_kernels import checks
from mpo_kernels.calls import reads_data, reduced
from mpo_kernels.fillers import weighted, without_fillers
from mpo_kernels.layouts import counts_in, offsets_of
from mpo_kernels.ops.once import check_mode
from mpo_kernels.ops.pool import mean_pool_op


def mean_pool(
    hidden: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    validate: bool | None = None,
) -> torch.Tensor:
    """Mean over the pooled positions of each sequence, summed in fp32 whatever the input's dtype.
    Differentiable.

    Args:
        hidden: dense (S, T, D), or packed (N, D) with cu_seqlens int32 (S + 1,).
        mask: bool (S, T) or (N,), True where a position is pooled; None pools all. Other positions
            are not read.
        validate: see `token_logprobs`; refuses a sequence without a pooled position, which
            otherwise gives NaN.
    Returns:
        (S, D) float32.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> mean_pool(hidden, mask=mask)
        tensor([[2.]])
    """
    checks.check_tensors(hidden=hidden, mask=mask, cu_seqlens=cu_seqlens)
    checks.check_float("hidden", hidden)
    check_mode(hidden)
    sequences = checks.check_layout(hidden, cu_seqlens, "hidden", pairs=False)
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != hidden.shape[:-1] or mask.device != hidden.device
    ):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; needed is bool"
            f" {tuple(hidden.shape[:-1])} on {hidden.device}."
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    offsets = offsets_of(cu_seqlens, sequences, rows.shape[0], hidden)
    if reads_data(validate, hidden, mask, cu_seqlens):
        checks.check_cu_seqlens_values(offsets, rows.shape[0])
        kept = (
            torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
            if mask is None
            else mask.reshape(-1)
        )
        checks.check_no_empty_sequence(counts_in(kept, offsets), kind="pooled")
    return mean_pool_op(rows, None if mask is None else mask.reshape(-1), offsets).means


def retention_loss(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sequence_weights: torch.Tensor | None = None,
    reduction: str = "mean",
    validate: bool | None = None,
) -> torch.Tensor:
    """L2 of MPO: mean over sequences and hidden units of (mean_pool(hidden) - reference)^2
    (equations 3 and 9; arXiv 2505.16869).

    Padding never enters the pool, and the pool is fp32: in bf16 the difference of two means
    vanishes in rounding.

    Args:
        hidden, mask, cu_seqlens, validate: see `mean_pool`.
        reference: (S, D) float32, the reference model's pooled hidden states.
        sequence_weights: (S,) float, multiplies each sequence's mean squared difference; one of
            weight 0 counts 0 even where that is not finite.
        reduction: "mean" (the sum over S, whatever the weights), "sum" or "none" (S,).
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0]]])
        >>> retention_loss(hidden, reference=torch.tensor([[5.0]]))  # (2 - 5)^2
        tensor(9.)
    """
    checks.check_reduction(reduction)
    checks.check_tensors(hidden=hidden, reference=reference, sequence_weights=sequence_weights)
    pooled = mean_pool(hidden, mask=mask, cu_seqlens=cu_seqlens, validate=validate)
    if (
        reference.shape != pooled.shape
        or reference.dtype not in (torch.float32, torch.float64)
        or reference.device != pooled.device
    ):
        raise ValueError(
            f"reference is {reference.dtype} {tuple(reference.shape)} on {reference.device}; needed"
            f" is float32 {tuple(pooled.shape)} on {pooled.device}."
        )
    if sequence_weights is not None:
        checks.check_per(
            "sequence_weights", sequence_weights, pooled.shape[0], "sequence", pooled.device
        )
        sequence_weights = sequence_weights.to(pooled.dtype)
        pooled = without_fillers(pooled, sequence_weights[:, None])
    per_sequence = (pooled - reference.to(pooled.dtype)).square().mean(-1)  # (S,)
    return reduced(weighted(per_sequence, sequence_weights), reduction)
