"""Statistics of rows of logits, and their gradients, on one rank or over slices of a vocabulary."""

from __future__ import annotations

import torch

from mpo_kernels.backends import backend_for
from mpo_kernels.backends.results import RowStats
from mpo_kernels.labels import IGNORED
from mpo_kernels.options import LogitOptions


def row_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: LogitOptions,
    *,
    token_outputs: bool = False,
) -> RowStats:
    """Statistics of logits (B, T, V), or of this rank's slice of them, labels (N,) counted over the
    whole vocabulary."""
    backend, parallel = backend_for(logits), options.parallel
    if parallel is None or parallel.vocab_group is None:
        return backend.logprob_stats(
            logits, labels, **options.transform, token_outputs=token_outputs
        )
    partials = backend.logprob_partials(
        logits, parallel.local_labels(labels), **options.transform, token_outputs=token_outputs
    )
    gathered = parallel.gather_partials(partials)
    unknown = (labels != IGNORED) & ((labels < 0) | (labels >= parallel.vocab))
    # as one rank marks it: value and gradient are NaN
    gathered[0, :, 3].masked_fill_(unknown, float("nan"))
    return backend.combine(gathered, labels, token_outputs=token_outputs)


def write_logit_grads(
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: RowStats,
    row_grads: torch.Tensor,
    options: LogitOptions,
    *,
    out: torch.Tensor,
) -> None:
    """Writes dL/dlogits of this rank's logits (B, T, V) into `out`, which may be `logits`;
    `row_grads` (N,) are dL/dlogp, `stats` what `row_stats` said of these rows."""
    parallel = options.parallel
    local = labels if parallel is None else parallel.local_labels(labels)
    backend_for(logits).logprob_grad(
        logits, local, stats.logp, stats.normalizer, row_grads, out, **options.transform
    )
