"""Statistics of rows of logits, and their gradients, on one rank or over slices of a vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.backends import backend_for, eager
from mpo_kernels.backends.results import RowDirections, RowStats
from mpo_kernels.labels import IGNORED
from mpo_kernels.options import LogitOptions, Wanted, statistics_dtype


def row_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: LogitOptions,
    *,
    token_outputs: bool = False,
    overwrite: bool = False,
    moments: bool = False,
) -> RowStats:
    """Statistics of logits (B, T, V), or of this rank's slice of them, labels (N,) counted over the
    whole vocabulary.

    `overwrite`: all rows are scored, and the logits serve nothing but `write_logit_grads` any more;
    they are then overwritten where `leaves_directions`.
    """
    backend, parallel = backend_for(logits), options.parallel
    if overwrite and not (token_outputs or moments) and leaves_directions(logits, options):
        return eager.logprob_directions(logits, labels, logit_scale=options.scale)
    wanted = {"token_outputs": token_outputs, "moments": moments}
    if parallel is None or parallel.vocab_group is None:
        return backend.logprob_stats(logits, labels, **options.transform, **wanted)
    partials = backend.logprob_partials(
        logits, parallel.local_labels(labels), **options.transform, **wanted
    )
    gathered = parallel.gather_partials(partials)
    unknown = (labels != IGNORED) & ((labels < 0) | (labels >= parallel.vocab))
    # as one rank marks it: value and gradient are NaN
    gathered[0, :, 3].masked_fill_(unknown, float("nan"))
    return backend.combine(gathered, labels, parallel.vocab, **wanted)


def leaves_directions(logits: torch.Tensor, options: LogitOptions) -> bool:
    """Whether logits can be overwritten by the directions of their gradients: by the backend that
    keeps what it computes, without rounding it. A soft-cap's slope needs the logits themselves, and
    the others of a slice are not all here."""
    is_whole = options.parallel is None or options.parallel.vocab_group is None
    is_precise = statistics_dtype(logits) == logits.dtype
    return backend_for(logits) is eager and is_precise and options.softcap is None and is_whole


def write_logit_grads(
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: RowStats,
    row_grads: torch.Tensor,
    options: LogitOptions,
    *,
    out: torch.Tensor,
    entropy_grads: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes dL/dlogits of this rank's logits (B, T, V) into `out`, which may be `logits`;
    `row_grads` (N,) are dL/dlogp, `entropy_grads` (N,) dL/dentropy, `stats` what `row_stats` said
    of these rows.

    Returns (N,) by what the rows are still to be multiplied, if by anything: directions are left as
    they are.
    """
    parallel = options.parallel
    if isinstance(stats, RowDirections):
        return eager.direction_factors(
            logits, labels, stats.logp, row_grads, logit_scale=options.scale
        )
    local = labels if parallel is None else parallel.local_labels(labels)
    backend_for(logits).logprob_grad(
        logits, local, stats, row_grads, out, entropy_grad=entropy_grads, **options.transform
    )
    return None


def constants_of(found: Any, wanted: Wanted) -> list[torch.Tensor]:
    """The results of tokens, of whatever operator, that have no gradient."""
    trained = ("logp", "entropy") if wanted.entropy_grad else ("logp",)
    return [result for name, result in found._asdict().items() if name not in trained]
