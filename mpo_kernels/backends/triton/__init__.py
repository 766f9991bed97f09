"""The Triton backend: one file per job. `backends.eager` offers the same functions in PyTorch."""

from mpo_kernels.backends.triton.logprob import (
    combine,
    logprob_grad,
    logprob_partials,
    logprob_stats,
)
from mpo_kernels.backends.triton.pool import pool, unpool
from mpo_kernels.backends.triton.sequences import pair_loss, row_grads, sequence_sums

__all__ = [
    "combine",
    "logprob_grad",
    "logprob_partials",
    "logprob_stats",
    "pair_loss",
    "pool",
    "row_grads",
    "sequence_sums",
    "unpool",
]
