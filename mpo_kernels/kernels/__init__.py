"""The Triton backend: one file per job. `mpo_kernels.twin` offers the same functions in PyTorch."""

from mpo_kernels.kernels.logprob import combine, logprob_grad, logprob_partials, logprob_stats
from mpo_kernels.kernels.pair import pair_loss, row_grads, sequence_sums
from mpo_kernels.kernels.pool import pool, unpool

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
