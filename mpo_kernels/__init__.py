"""Fused loss kernels for MPO, multilingual reward gap optimization (arXiv 2505.16869), and for any
loss of sums of log-probabilities (`mpo_kernels.losses`). Needs torch and triton only."""

from mpo_kernels.calls import TokenStatistics
from mpo_kernels.functional import (
    MPOLossOutput,
    linear_mpo_loss,
    linear_token_logprobs,
    linear_token_statistics,
    mpo_loss,
    token_logprobs,
    token_statistics,
)
from mpo_kernels.parallel import Parallel
from mpo_kernels.retention import mean_pool, retention_loss
from mpo_kernels.sequence_losses import SequenceLossOutput, linear_sequence_loss, sequence_loss

__all__ = [
    "MPOLossOutput",
    "Parallel",
    "SequenceLossOutput",
    "TokenStatistics",
    "linear_mpo_loss",
    "linear_sequence_loss",
    "linear_token_logprobs",
    "linear_token_statistics",
    "mean_pool",
    "mpo_loss",
    "retention_loss",
    "sequence_loss",
    "token_logprobs",
    "token_statistics",
]
