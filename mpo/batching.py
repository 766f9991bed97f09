"""From tokenised examples to one packed row, and from a step number to the rows that each rank computes.

Everything here is host-side integers: which positions are scored and pooled is known before the tensors reach the device, so the forward
pass never waits for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from mpo.tokenizing import Example, TokenizedResponse

Pool = Literal["response", "all"]


@dataclass(frozen=True)
class PackedSequences:
    """S sequences in one row of N tokens, M of which are scored.

    A scored token at position t is predicted by the hidden state at t - 1; that is its row in `scored_rows`.
    """

    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64, restart at 0 in each sequence: that is what isolates them
    lengths: tuple[int, ...]  # S token counts, sum N
    scored_rows: torch.Tensor  # (M,) int64 rows of the hidden states that predict a scored token
    labels: torch.Tensor  # (M,) int64 the tokens they predict
    scored_cu_seqlens: torch.Tensor  # (S' + 1,) int32 offsets of each scored sequence in `scored_rows`
    pooled_rows: torch.Tensor  # (K,) int64 rows of the hidden states that are pooled
    pooled_cu_seqlens: torch.Tensor  # (S'' + 1,) int32 offsets of each pooled sequence in `pooled_rows`

    def to(self, device: torch.device) -> PackedSequences:
        """On `device`, but for the labels and their offsets: the head plans its chunks from them, which must not wait for a GPU."""
        return replace(_to_device(self, device), labels=self.labels, scored_cu_seqlens=self.scored_cu_seqlens)


@dataclass(frozen=True)
class MPOBatch:
    """P weighted pairs in one packed row: target chosen, target rejected, then the distinct dominant sequences.

    Target sequences are scored, dominant ones pooled. Rows that share a dominant pair share its sequences, weighted by their count.
    """

    packed: PackedSequences
    reference_gap: torch.Tensor  # (P,) float32
    pair_weights: torch.Tensor  # (P,) float32, 0 for a filler
    pooled_reference: torch.Tensor  # (S'', D) float32
    pooled_weights: torch.Tensor  # (S'',) float32: share of each sequence in the pairs' L2, summed over pairs
    languages: tuple[str, ...]  # P

    def to(self, device: torch.device) -> MPOBatch:
        return _to_device(self, device)


def pack(
    sequences: Sequence[TokenizedResponse], *, scored: Sequence[int], pooled: Sequence[int], pool: Pool = "response"
) -> PackedSequences:
    """Packs `sequences` into one row.

    Args:
        sequences: in the order of the row.
        scored: indices of the sequences whose responses go to the LM head, in the order of `scored_cu_seqlens`.
        pooled: indices of the sequences whose hidden states are averaged, in the order of `pooled_cu_seqlens`.
        pool: average the response's positions, or all of the sequence's.
    """
    offsets = [0]
    for sequence in sequences:
        offsets.append(offsets[-1] + len(sequence.input_ids))
    scored_rows: list[int] = []
    labels: list[int] = []
    scored_cu = [0]
    for i in scored:
        start, end = sequences[i].response_start, len(sequences[i].input_ids)
        scored_rows.extend(range(offsets[i] + start - 1, offsets[i] + end - 1))
        labels.extend(sequences[i].input_ids[start:end])
        scored_cu.append(len(scored_rows))
    pooled_rows: list[int] = []
    pooled_cu = [0]
    for i in pooled:
        start = sequences[i].response_start if pool == "response" else 0
        pooled_rows.extend(range(offsets[i] + start, offsets[i + 1]))
        pooled_cu.append(len(pooled_rows))
    return PackedSequences(
        input_ids=torch.tensor([[token for s in sequences for token in s.input_ids]]),
        position_ids=torch.cat([torch.arange(len(s.input_ids)) for s in sequences])[None],
        lengths=tuple(len(s.input_ids) for s in sequences),
        scored_rows=torch.tensor(scored_rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        scored_cu_seqlens=torch.tensor(scored_cu, dtype=torch.int32),
        pooled_rows=torch.tensor(pooled_rows, dtype=torch.int64),
        pooled_cu_seqlens=torch.tensor(pooled_cu, dtype=torch.int32),
    )


def pack_for_scoring(sequences: Sequence[TokenizedResponse], pool: Pool) -> PackedSequences:
    """Packs sequences that are all scored and all pooled: for the reference store and for evaluation."""
    every = range(len(sequences))
    return pack(sequences, scored=every, pooled=every, pool=pool)


def order_of_rows(examples: Sequence[Example], epoch: int, seed: int, group_by_dominant: bool) -> list[int]:
    """The order in which one epoch visits the rows: a function of seed and epoch alone, so that any number of ranks sees the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def shuffled(items: list) -> list:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    if not group_by_dominant:
        return shuffled(list(range(len(examples))))
    groups: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.dominant_chosen, example.dominant_rejected), []).append(index)
    return [index for group in shuffled(list(groups.values())) for index in shuffled(group)]


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimizer step computes. The rows of a run are cut from the concatenated epochs, so a step may span two."""

    rows: int
    pairs_per_step: int
    epochs: float
    max_steps: int | None
    repeats_first_step: bool = False

    @property
    def steps(self) -> int:
        return self.max_steps or max(1, math.ceil(self.rows * self.epochs / self.pairs_per_step))

    @property
    def pairs(self) -> int:
        """Pairs of the whole run. Only the last step may be smaller, and only where `epochs` sets the end."""
        full = self.steps * self.pairs_per_step
        return full if self.max_steps else min(full, max(1, round(self.rows * self.epochs)))

    def positions(self, step: int) -> range:
        """Positions of the step's pairs in the concatenated epochs."""
        step = 0 if self.repeats_first_step else step
        return range(step * self.pairs_per_step, min((step + 1) * self.pairs_per_step, self.pairs))

    def share(self, step: int, rank: int, world: int) -> list[int]:
        """The rank's positions of a step. Ranks take contiguous shares, so that rows that the order keeps together stay together."""
        positions = self.positions(step)
        share = math.ceil(len(positions) / world)
        return list(positions[rank * share : (rank + 1) * share])


def in_micro_batches(positions: Sequence[int], pairs: int, tokens: int | None, size: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """Cuts positions into consecutive micro-batches of at most `pairs`; with a budget of `tokens` of as many as fit it, at least one.

    size(positions) is the number of packed tokens that they take together, shared dominant sequences counted once.
    """
    if tokens is None:
        return [list(positions[i : i + pairs]) for i in range(0, len(positions), pairs)]
    batches: list[list[int]] = []
    for position in positions:
        if batches and size([*batches[-1], position]) <= tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def of_every_rank(
    schedule: Schedule, step: int, rank: int, world: int, cut: Callable[[list[int]], list[list[int]]]
) -> list[list[int | None]]:
    """The rank's micro-batches of a step. Every rank gets the same number of them; None is a filler pair.

    cut: makes micro-batches of a rank's share; a function of the positions alone, so that every rank knows how many the others have.
    """
    batches = [cut(schedule.share(step, r, world)) for r in range(world)]
    mine: list[list[int | None]] = [list(batch) for batch in batches[rank]]
    return mine + [[None]] * (max(map(len, batches)) - len(mine))


def _to_device(batch, device: torch.device):
    """The same dataclass with every tensor on `device`."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, PackedSequences):
            moved[field.name] = value.to(device)
    return replace(batch, **moved)
