"""Which rows of hidden states make a chunk of logits: whole pairs, in order, under a byte budget.
Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_CHUNK_BYTES = 512 << 20
"""Logits that exist at once. Each chunk streams the weight and its gradient once more, so small
chunks are slow; more than this gains nothing."""

ROW_MULTIPLE = 128
"""Rows of a full chunk are a multiple of this, which GEMM tiles divide."""


@dataclass(frozen=True)
class Chunk:
    """Pairs [first, last) computed together. `rows` exceeds the budget only for a single pair that
    is larger than it."""

    first: int
    last: int
    rows: int


def rows_per_chunk(vocab: int, itemsize: int, chunk_bytes: int | None = None) -> int:
    """Rows of logits that fit the budget: a multiple of 128, at least 128.

    Never a function of the hidden size or of vocab / hidden: that collapses to a few rows at large
    vocabularies.
    """
    fit = (DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (vocab * itemsize)
    return max(ROW_MULTIPLE, fit // ROW_MULTIPLE * ROW_MULTIPLE)


def plan_pairs(lengths: Sequence[int], budget: int) -> list[Chunk]:
    """Packs pairs into chunks in their order.

    Args:
        lengths: scored rows of 2P sequences, chosen first, then rejected in the same order.
        budget: rows per chunk.
    """
    pairs = len(lengths) // 2
    chunks: list[Chunk] = []
    for pair in range(pairs):
        rows = lengths[pair] + lengths[pairs + pair]
        if chunks and chunks[-1].rows + rows <= budget:
            chunks[-1] = Chunk(chunks[-1].first, pair + 1, chunks[-1].rows + rows)
        else:
            chunks.append(Chunk(pair, pair + 1, rows))
    return chunks


def split_rows(first: int, last: int, budget: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `budget` rows that cover [first, last)."""
    return [(a, min(a + budget, last)) for a in range(first, last, budget)]
