"""Modules that hold the options of a loss, for people who configure their losses as modules. They
have no parameters."""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels import checks
from mpo_kernels.functional import MPOLossOutput, Number, linear_mpo_loss, mpo_loss
from mpo_kernels.parallel import Parallel


class _Options(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        logit_scale, softcap, beta = (options[name] for name in ("logit_scale", "softcap", "beta"))
        like = next(
            (number for number in (logit_scale, softcap, beta) if isinstance(number, torch.Tensor)),
            None,
        )  # any device, so far
        checks.check_options(logit_scale, softcap, beta, options["reduction"], like=like)
        checks.check_integers(options["ignore_index"], options.get("chunk_bytes"))
        checks.check_parallel(options["parallel"])
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MPOLoss(_Options):
    """`mpo_kernels.mpo_loss` with fixed options, which are checked here.

    Raises:
        ValueError: an option cannot be.
    """

    def __init__(
        self,
        beta: Number = 1.0,
        *,
        ignore_index: int = -100,
        logit_scale: Number = 1.0,
        softcap: Number | None = None,
        reduction: str = "mean",
        inplace_backward: bool = False,
        token_outputs: bool = False,
        parallel: Parallel | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            beta=beta,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            reduction=reduction,
            inplace_backward=inplace_backward,
            token_outputs=token_outputs,
            parallel=parallel,
            validate=validate,
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
        return mpo_loss(
            logits,
            labels,
            reference_gap,
            pair_weights=pair_weights,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearMPOLoss(_Options):
    """`mpo_kernels.linear_mpo_loss` with fixed options, which are checked here.

    Raises:
        ValueError: an option cannot be.
    """

    def __init__(
        self,
        beta: Number = 1.0,
        *,
        ignore_index: int = -100,
        logit_scale: Number = 1.0,
        softcap: Number | None = None,
        reduction: str = "mean",
        chunk_bytes: int | None = None,
        token_outputs: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        super().__init__(
            beta=beta,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            reduction=reduction,
            chunk_bytes=chunk_bytes,
            token_outputs=token_outputs,
            parallel=parallel,
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
            hidden,
            weight,
            labels,
            reference_gap,
            bias=bias,
            pair_weights=pair_weights,
            cu_seqlens=cu_seqlens,
            **self.options,
        )
