"""Which rows of hidden states a linear head computes, and which of them at once: scored rows only,
known on the host, in chunks of whole pairs under a byte budget."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpo_kernels import checks
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.parallel import Parallel, refused_together, whole_vocab

DEFAULT_CHUNK_BYTES = 512 << 20
"""Logits that exist at once. Each chunk streams the weight and its gradient once more, so small
chunks are slow; more than this gains nothing."""

ROW_MULTIPLE = 128
"""Rows of a full chunk are a multiple of this, which GEMM tiles divide."""


@dataclass(frozen=True)
class Targets:
    """What rows of hidden states are to predict, as operators take it; on any device."""

    labels: torch.Tensor
    """(M,) as the caller has them."""
    rows: torch.Tensor | None
    """(M,) which rows of the hidden states they are of; None where they are of all, in order."""
    ignore_index: int


@dataclass(frozen=True)
class ScoredRows:
    """Host tensors about the n scored ones among M labels, in their order."""

    labels: torch.Tensor
    """(n,) int64."""
    indices: torch.Tensor
    """(n,) int64 where they are among the M labels."""
    rows: torch.Tensor
    """(n,) int64 where they are among the hidden states."""
    bounds: torch.Tensor
    """(S + 1,) int64 offsets of the sequences among the scored rows; (0, n) without sequences."""

    @property
    def lengths(self) -> torch.Tensor:
        """(S,) scored rows of each sequence."""
        return self.bounds.diff()


@dataclass(frozen=True)
class Chunk:
    """Pairs that are computed together, on the device: n rows, the chosen sequences first, then the
    rejected ones."""

    pairs: range
    labels: torch.Tensor
    """(n,) int64."""
    indices: torch.Tensor
    """(n,) int64 among the M labels."""
    rows: torch.Tensor
    """(n,) int64 among the hidden states."""
    cu_seqlens: torch.Tensor
    """(2 * pairs + 1,) int32."""
    pieces: list[slice]
    """The n rows in parts that fit the budget: more than one for a pair that is larger alone."""


def scored_rows(
    targets: Targets,
    cu_seqlens: torch.Tensor | None,
    *,
    hidden_rows: int,
    columns: int,
    parallel: Parallel | None,
) -> ScoredRows:
    """Reads labels, rows and cu_seqlens (S + 1,) back to the host - a sync only if they are not
    there - and checks their values.

    Args:
        hidden_rows: rows of the hidden states.
        columns: tokens of the vocabulary that are here.
    Raises:
        ValueError: a label outside the vocabulary, a row outside the hidden states, offsets that do
            not fit, or a sequence without a scored row (in any rank of a context).
    """
    labels = targets.labels.cpu().long()
    rows = None if targets.rows is None else targets.rows.cpu()
    offsets = None if cu_seqlens is None else cu_seqlens.cpu().long()
    # Without sequences the ranks of a context need not call together.
    with contextlib.nullcontext() if offsets is None else refused_together(parallel):
        checks.check_label_values(labels, whole_vocab(columns, parallel), targets.ignore_index)
        if rows is not None:
            checks.check_row_values(rows, hidden_rows)
        if offsets is not None:
            checks.check_cu_seqlens_values(offsets, labels.numel())
    scored = labels != targets.ignore_index
    indices = torch.nonzero(scored)[:, 0]
    bounds = torch.tensor([0, indices.numel()])
    if offsets is not None:
        running = torch.cat([torch.zeros(1, dtype=torch.int64), scored.long().cumsum(0)])
        bounds = running[offsets]
    found = ScoredRows(labels[indices], indices, indices if rows is None else rows[indices], bounds)
    if offsets is not None:
        lengths = found.lengths
        checks.check_no_empty_sequence(
            lengths if parallel is None else parallel.total(lengths), pairs=True
        )
    return found


def rows_per_chunk(vocab: int, itemsize: int, chunk_bytes: int | None = None) -> int:
    """Rows of logits that fit the budget: a multiple of 128, at least 128.

    Never a function of the hidden size or of vocab / hidden: that collapses to a few rows at large
    vocabularies.
    """
    fit = (DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (vocab * itemsize)
    return max(ROW_MULTIPLE, fit // ROW_MULTIPLE * ROW_MULTIPLE)


def pair_lengths(lengths: Sequence[int]) -> list[int]:
    """Rows of P pairs, from those of 2P sequences: chosen first, then rejected in that order."""
    pairs = len(lengths) // 2
    return [a + b for a, b in zip(lengths[:pairs], lengths[pairs:], strict=True)]


def plan_pairs(lengths: Sequence[int], budget: int) -> list[range]:
    """Packs pairs of `lengths` rows into groups of at most `budget` rows, in their order. A pair
    that is larger is a group of its own."""
    groups: list[range] = []
    rows = 0
    for pair, length in enumerate(lengths):
        if groups and rows + length <= budget:
            groups[-1], rows = range(groups[-1].start, pair + 1), rows + length
        else:
            groups.append(range(pair, pair + 1))
            rows = length
    return groups


def split_rows(rows: int, budget: int) -> list[slice]:
    """Consecutive parts of at most `budget` rows each."""
    return [slice(a, min(a + budget, rows)) for a in range(0, rows, budget)]


def chunks_of(
    scored: ScoredRows, groups: Sequence[range], budget: int, device: torch.device
) -> list[Chunk]:
    """The rows of each group of pairs; one transfer each for all labels, indices and offsets."""
    pairs = scored.lengths.numel() // 2
    bounds, lengths = scored.bounds.tolist(), scored.lengths
    order = torch.cat(
        [
            torch.arange(bounds[side + group.start], bounds[side + group.stop])
            for group in groups
            for side in (0, pairs)
        ]
    )
    counts = [
        torch.cat(
            [torch.zeros(1, dtype=torch.int64)]
            + [lengths[side + group.start : side + group.stop] for side in (0, pairs)]
        )
        for group in groups
    ]
    sizes = [int(count.sum()) for count in counts]
    offsets = torch.cat([count.cumsum(0) for count in counts]).int()
    labels, indices, rows = (
        on_device(host[order], device).split(sizes)
        for host in (scored.labels, scored.indices, scored.rows)
    )
    parts = zip(
        labels,
        indices,
        rows,
        on_device(offsets, device).split([count.numel() for count in counts]),
        [split_rows(size, budget) or [slice(0, 0)] for size in sizes],
        strict=True,
    )
    return [Chunk(group, *part) for group, part in zip(groups, parts, strict=True)]
