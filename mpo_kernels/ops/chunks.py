"""Which rows of hidden states a linear head computes, and which of them at once: scored rows only,
known on the host, in chunks of whole groups under a byte budget."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """Groups of k sequences that are computed together, on the device: n rows, the first sequences
    of all groups first, then the second ones."""

    groups: range
    labels: torch.Tensor
    """(n,) int64."""
    indices: torch.Tensor
    """(n,) int64 among the M labels."""
    rows: torch.Tensor
    """(n,) int64 among the hidden states."""
    cu_seqlens: torch.Tensor
    """(k * groups + 1,) int32."""
    lengths: list[int]
    """Rows of each sequence, on the host."""


class Pieces(NamedTuple):
    """The rows of a chunk in parts whose logits fit the budget, by when their gradient is made."""

    early: list[slice]
    """Right after their statistics, before the loss is known."""
    kept: slice | None
    """When it is, from logits that are still there."""
    again: list[slice]
    """When it is, from logits that are computed again."""


def scored_rows(
    targets: Targets,
    cu_seqlens: torch.Tensor | None,
    *,
    hidden_rows: int,
    columns: int,
    parallel: Parallel | None,
    pairs: bool = False,
) -> ScoredRows:
    """Reads labels, rows and cu_seqlens (S + 1,) back to the host - a sync only if they are not
    there - and checks their values.

    Args:
        hidden_rows: rows of the hidden states.
        columns: tokens of the vocabulary that are here.
        pairs: whether the sequences are pairs, for the words of errors.
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
            lengths if parallel is None else parallel.total(lengths), pairs=pairs
        )
    return found


def rows_per_chunk(vocab: int, itemsize: int, chunk_bytes: int | None = None) -> int:
    """Rows of logits that fit the budget: a multiple of 128, at least 128.

    Never a function of the hidden size or of vocab / hidden: that collapses to a few rows at large
    vocabularies.
    """
    fit = (DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (vocab * itemsize)
    return max(ROW_MULTIPLE, fit // ROW_MULTIPLE * ROW_MULTIPLE)


def group_lengths(lengths: Sequence[int], size: int) -> list[int]:
    """Rows of P groups, from those of size * P sequences: the first ones of all groups first."""
    groups = len(lengths) // size
    return [sum(lengths[group::groups]) for group in range(groups)]


def plan_groups(lengths: Sequence[int], budget: int) -> list[range]:
    """Packs groups of `lengths` rows into chunks of at most `budget` rows, in their order. A group
    that is larger is a chunk of its own."""
    chunks: list[range] = []
    rows = 0
    for group, length in enumerate(lengths):
        if chunks and rows + length <= budget:
            chunks[-1], rows = range(chunks[-1].start, group + 1), rows + length
        else:
            chunks.append(range(group, group + 1))
            rows = length
    return chunks


def pieces_of(units: Sequence[int], budget: int, early: int) -> Pieces:
    """A chunk's rows in pieces: one, where they fit the budget.

    Args:
        units: rows of consecutive units, within which rows lack the same factor before the loss is
            known.
        early: units whose gradient may be made without their factor. All, none, or one, which is
            then the longest.
    """
    rows = sum(units)
    if rows <= budget:
        return Pieces([], slice(0, rows), [])
    longest = max(range(len(units)), key=units.__getitem__)
    start = sum(units[:longest])
    stop = start + units[longest]
    before, inside, after = (
        split_rows(a, b, budget) for a, b in ((0, start), (start, stop), (stop, rows))
    )
    if early >= len(units):
        return Pieces([*before, *inside, *after], None, [])
    late = [*before, *after] if early else [*before, *inside, *after]
    kept = max(late, key=lambda piece: piece.stop - piece.start, default=None)
    return Pieces(inside if early else [], kept, [piece for piece in late if piece is not kept])


def split_rows(start: int, stop: int, budget: int) -> list[slice]:
    """Consecutive parts of at most `budget` rows each."""
    return [slice(a, min(a + budget, stop)) for a in range(start, stop, budget)]


def chunks_of(
    scored: ScoredRows, plan: Sequence[range], size: int, device: torch.device
) -> list[Chunk]:
    """The rows of each chunk of groups of `size` sequences; one transfer each for all labels,
    indices and offsets."""
    bounds, lengths = scored.bounds.tolist(), scored.lengths.tolist()
    count = len(lengths) // size
    firsts = range(0, size * count, count)  # sequence of the first group
    order = torch.cat(
        [
            torch.arange(bounds[first + groups.start], bounds[first + groups.stop])
            for groups in plan
            for first in firsts
        ]
    )
    of_chunks = [
        [n for first in firsts for n in lengths[first + groups.start : first + groups.stop]]
        for groups in plan
    ]
    offsets = torch.cat([torch.tensor([0, *each]).cumsum(0) for each in of_chunks]).int()
    labels, indices, rows = (
        on_device(host[order], device).split([sum(each) for each in of_chunks])
        for host in (scored.labels, scored.indices, scored.rows)
    )
    parts = zip(
        labels,
        indices,
        rows,
        on_device(offsets, device).split([len(each) + 1 for each in of_chunks]),
        of_chunks,
        strict=True,
    )
    return [Chunk(groups, *part) for groups, part in zip(plan, parts, strict=True)]
