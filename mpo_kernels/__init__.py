"""Fused loss kernels for MPO, multilingual reward gap optimization (arXiv 2505.16869). Needs torch
and triton only."""

from mpo_kernels.functional import (
    MPOLossOutput,
    TokenStatistics,
    linear_mpo_loss,
    linear_token_logprobs,
    linear_token_statistics,
    mpo_loss,
    token_logprobs,
    token_statistics,
)
from mpo_kernels.parallel import Parallel
from mpo_kernels.retention import mean_pool, retention_loss

__all__ = [
    "MPOLossOutput",
    "Parallel",
    "TokenStatistics",
    "linear_mpo_loss",
    "linear_token_logprobs",
    "linear_token_statistics",
    "mean_pool",
    "mpo_loss",
    "retention_loss",
    "token_logprobs",
    "token_statistics",
]
