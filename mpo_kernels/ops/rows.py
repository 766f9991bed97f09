"""Which rows of hidden states a linear head computes: the scored ones, known on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpo_kernels import checks
from mpo_kernels.parallel import Parallel, refused_together


@dataclass(frozen=True)
class ScoredRows:
    """Host tensors. Compacted, the scored rows keep their order."""

    labels: torch.Tensor
    """(M,) int64 labels of the scored rows."""
    places: torch.Tensor
    """(M,) int64 where they are among all N rows."""
    bounds: torch.Tensor
    """(S + 1,) int64 compacted offsets of the sequences; (0, M) without sequences."""

    @property
    def lengths(self) -> torch.Tensor:
        """(S,) scored rows of each sequence."""
        return self.bounds.diff()


def scored_rows(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    ignore_index: int,
    vocab: int,
    parallel: Parallel | None,
) -> ScoredRows:
    """Reads labels (N,) and cu_seqlens (S + 1,) back to the host - a sync only if they are not
    there - and checks their values.

    Raises:
        ValueError: a label outside the vocabulary, offsets that do not fit, or a sequence without a
            scored row (in any rank of a context).
    """
    host = labels.cpu().long()
    offsets = None if cu_seqlens is None else cu_seqlens.cpu().long()
    # Without sequences the ranks of a context need not call together.
    with contextlib.nullcontext() if offsets is None else refused_together(parallel):
        checks.check_label_values(
            host,
            vocab if parallel is None or parallel.vocab_group is None else parallel.vocab,
            ignore_index,
        )
        if offsets is not None:
            checks.check_cu_seqlens_values(offsets, host.numel())
    scored = host != ignore_index
    places = torch.nonzero(scored)[:, 0]
    if offsets is None:
        return ScoredRows(host[places], places, torch.tensor([0, places.numel()]))
    running = torch.cat([torch.zeros(1, dtype=torch.int64), scored.long().cumsum(0)])
    rows = ScoredRows(host[places], places, running[offsets])
    checks.check_no_empty_sequence(
        rows.lengths if parallel is None else parallel.total(rows.lengths), pairs=True
    )
    return rows


@dataclass(frozen=True)
class ChunkRows:
    """One chunk of pairs [first, last), on the device: n rows, the chunk's chosen sequences first,
    then its rejected ones."""

    first: int
    last: int
    places: torch.Tensor
    """(n,) int64 among all N rows."""
    labels: torch.Tensor
    """(n,) int64."""
    cu_seqlens: torch.Tensor
    """(2 * pairs + 1,) int32."""


def rows_of_chunks(
    rows: ScoredRows, chunks: Sequence[tuple[int, int]], device: torch.device
) -> list[ChunkRows]:
    """The rows of each chunk of pairs; one transfer each for all places, labels and offsets."""
    pairs = rows.lengths.numel() // 2
    bounds, lengths = rows.bounds.tolist(), rows.lengths
    spans = [
        torch.arange(bounds[s + first], bounds[s + last])
        for first, last in chunks
        for s in (0, pairs)
    ]
    order = torch.cat(spans)
    counts = [
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths[a:b], lengths[pairs + a : pairs + b]])
        for a, b in chunks
    ]
    places = rows.places[order].to(device, non_blocking=True)
    labels = rows.labels[order].to(device, non_blocking=True)
    offsets = torch.cat([c.cumsum(0) for c in counts]).int().to(device, non_blocking=True)
    sizes = [int(c.sum()) for c in counts]
    return [
        ChunkRows(a, b, *parts)
        for (a, b), *parts in zip(
            chunks,
            places.split(sizes),
            labels.split(sizes),
            offsets.split([c.numel() for c in counts]),
            strict=True,
        )
    ]
