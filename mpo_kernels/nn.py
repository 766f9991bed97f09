"""Modules that hold the options of a loss, for people who configure their losses as modules. They have no parameters."""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.functional import MPOLossOutput, linear_mpo_loss, mpo_loss


class _Options(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MPOLoss(_Options):
    """`mpo_kernels.mpo_loss` with fixed options."""

    def __init__(
        self,
        beta: float = 1.0,
        *,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            beta=beta,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            reduction=reduction,
            inplace_backward=inplace_backward,
        )

    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        reference_gap: torch.Tensor,
        *,
        pair_weights: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> MPOLossOutput:
        """See `mpo_kernels.mpo_loss`."""
        return mpo_loss(logits, labels, reference_gap, pair_weights=pair_weights, cu_seqlens=cu_seqlens, **self.options)


class LinearMPOLoss(_Options):
    """`mpo_kernels.linear_mpo_loss` with fixed options."""

    def __init__(
        self,
        beta: float = 1.0,
        *,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__(
            beta=beta,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            reduction=reduction,
            chunk_bytes=chunk_bytes,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        reference_gap: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        pair_weights: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> MPOLossOutput:
        """See `mpo_kernels.linear_mpo_loss`."""
        return linear_mpo_loss(
            hidden, weight, labels, reference_gap, bias=bias, pair_weights=pair_weights, cu_seqlens=cu_seqlens, **self.options
        )
