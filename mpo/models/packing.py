"""From tokenised examples to one packed row, and from a step number to the rows that each rank
computes.

Everything here is host-side integers: which positions are scored and pooled is known before the
tensors reach the device, so the forward pass never waits for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from mpo.data.examples import Example, TokenizedResponse
from mpo.models.attention import Document
from mpo.runtime.settings import as_written

Pool = Literal["response", "all"]

FILLER = TokenizedResponse((0, 0), 1)
"""Both answers of a pair with weight 0, for a forward pass that has no pair of its own but must
make the same calls as the other ranks'."""


@dataclass(frozen=True)
class PackedSequences:
    """S sequences in one row of N tokens, M of which are scored.

    A scored token is predicted by the hidden state of the token before it in its sequence; that is
    its row in `scored_rows`. Where responses share a prompt, the prompt lies in the row once, and
    its last row predicts the first token of each of them.
    """

    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64, each token's place in its own sequence
    # tokens of each prompt and of its responses, in the order of the row; sum N
    documents: tuple[Document, ...]
    scored_rows: torch.Tensor  # (M,) int64 rows of the hidden states that predict a scored token
    labels: torch.Tensor  # (M,) int64 the tokens they predict
    # (S' + 1,) int32 offsets of each scored sequence in `scored_rows`
    scored_cu_seqlens: torch.Tensor
    pooled_rows: torch.Tensor  # (K,) int64 rows of the hidden states that are pooled
    # (S'' + 1,) int32 offsets of each pooled sequence in `pooled_rows`
    pooled_cu_seqlens: torch.Tensor

    def padded_tokens(self) -> int:
        """Tokens of the same sequences as a rectangle: each with its own prompt, all as long as the
        longest."""
        lengths = [
            prompt + response for prompt, *responses in self.documents for response in responses
        ]
        return max(lengths) * len(lengths)

    def to(self, device: torch.device) -> PackedSequences:
        """On `device`, but for the labels and their offsets: the head plans its chunks from them,
        which must not wait for a GPU."""
        return replace(
            _to_device(self, device), labels=self.labels, scored_cu_seqlens=self.scored_cu_seqlens
        )


@dataclass(frozen=True)
class MPOBatch:
    """P weighted pairs in one packed row: target chosen, target rejected, then distinct dominant
    sequences.

    Target sequences are scored, dominant ones pooled. A dominant sequence that rows of the step
    share is in one batch of the step only.
    """

    packed: PackedSequences
    reference_gap: torch.Tensor  # (P,) float32
    pair_weights: torch.Tensor  # (P,) float32, 0 for a filler
    pooled_reference: torch.Tensor  # (S'', D) float32
    # (S'',) float32: share of each sequence in the pairs' L2, summed over pairs
    pooled_weights: torch.Tensor
    languages: tuple[str, ...]  # P

    def to(self, device: torch.device) -> MPOBatch:
        return _to_device(self, device)


def pack(
    sequences: Sequence[TokenizedResponse],
    *,
    scored: Sequence[int],
    pooled: Sequence[int],
    pool: Pool = "response",
    share_prompts: bool,
) -> PackedSequences:
    """Packs `sequences` into one row.

    Args:
        scored: indices of the sequences whose responses go to the LM head, in the order of
            `scored_cu_seqlens`.
        pooled: indices of the sequences whose hidden states are averaged, in the order of
            `pooled_cu_seqlens`.
        pool: average the response's positions, or all of the sequence's.
        share_prompts: put a prompt that two sequences have into the row once; needs packed
            attention.
    """
    ids: list[int] = []
    positions: list[int] = []
    documents: list[Document] = []
    rows: dict[int, list[int]] = {}  # of each sequence: where its tokens lie in the row
    for document in _documents(sequences, share_prompts):
        first = sequences[document[0]]
        start = len(ids)
        prompt = list(range(start, start + first.response_start))
        ids += first.input_ids[: first.response_start]
        positions += range(first.response_start)
        for i in document:
            response = sequences[i].input_ids[first.response_start :]
            rows[i] = prompt + list(range(len(ids), len(ids) + len(response)))
            ids += response
            positions += range(first.response_start, len(sequences[i].input_ids))
        documents.append(
            (
                first.response_start,
                *(len(sequences[i].input_ids) - first.response_start for i in document),
            )
        )
    predicting = [rows[i][sequences[i].response_start - 1 : -1] for i in scored]
    averaged = [rows[i][sequences[i].response_start if pool == "response" else 0 :] for i in pooled]
    return PackedSequences(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        documents=tuple(documents),
        scored_rows=_concatenated(predicting),
        labels=_concatenated(
            [sequences[i].input_ids[sequences[i].response_start :] for i in scored]
        ),
        scored_cu_seqlens=_offsets(predicting),
        pooled_rows=_concatenated(averaged),
        pooled_cu_seqlens=_offsets(averaged),
    )


def _documents(sequences: Sequence[TokenizedResponse], share_prompts: bool) -> list[list[int]]:
    """Indices of the sequences that lie behind one prompt.

    Two at most: a hidden state that three sequences read gets three gradients, whose sum depends on
    the order in which threads add them.
    """
    if not share_prompts:
        return [[i] for i in range(len(sequences))]
    documents: list[list[int]] = []
    waiting: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        prompt = sequence.input_ids[: sequence.response_start]
        if prompt in waiting:
            waiting.pop(prompt).append(i)
        else:
            documents.append([i])
            waiting[prompt] = documents[-1]
    return documents


def _concatenated(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=torch.int64)


def _offsets(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    offsets = [0]
    for values in lists:
        offsets.append(offsets[-1] + len(values))
    return torch.tensor(offsets, dtype=torch.int32)


def tokens_of(sequences: Sequence[TokenizedResponse], share_prompts: bool) -> int:
    """Tokens that `pack` makes of the sequences."""
    total = 0
    for first, *others in _documents(sequences, share_prompts):
        total += len(sequences[first].input_ids) + sum(
            len(sequences[i].input_ids) - sequences[i].response_start for i in others
        )
    return total


def pack_for_scoring(
    sequences: Sequence[TokenizedResponse], pool: Pool, share_prompts: bool
) -> PackedSequences:
    """Packs sequences that are all scored and all pooled: for the reference store and for
    evaluation."""
    every = range(len(sequences))
    return pack(sequences, scored=every, pooled=every, pool=pool, share_prompts=share_prompts)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes: L1 of the examples, and L2 of dominant sequences, which need
    not be theirs."""

    examples: tuple[Example, ...] = ()
    dominant: tuple[tuple[TokenizedResponse, float], ...] = ()
    """Each with its weight: half the number of the step's examples that have it."""

    def sequences(self) -> list[TokenizedResponse]:
        """In the order of the row: target chosen, target rejected, dominant."""
        examples = self.examples
        return (
            [e.target.chosen for e in examples]
            + [e.target.rejected for e in examples]
            + [sequence for sequence, _ in self.dominant]
        )

    def tokens(self, share_prompts: bool) -> int:
        """Packed tokens."""
        return tokens_of(self.sequences(), share_prompts)


def in_micro_batches(
    examples: Sequence[Example], *, pairs: int, tokens: int | None, share_prompts: bool
) -> list[MicroBatch]:
    """Cuts the examples that one rank has in one step into micro-batches. A dominant pair that
    several have is computed in one of them.

    Without a budget of `tokens`: consecutive examples, `pairs` at a time, with the dominant pairs
    that did not come up before. With it: first fit, the longest first, of target pairs and dominant
    pairs alike; what is larger than the budget goes alone.
    """
    weights: dict[TokenizedResponse, float] = {}
    for example in examples:
        for sequence in example.dominant:
            weights[sequence] = weights.get(sequence, 0.0) + 0.5
    chunks = (
        [examples[i : i + pairs] for i in range(0, len(examples), pairs)]
        if tokens is None
        else [[e] for e in examples]
    )
    parts: list[MicroBatch] = []
    for chunk in chunks:
        new = dict.fromkeys(s for e in chunk for s in e.dominant if s in weights)
        dominant = tuple((sequence, weights.pop(sequence)) for sequence in new)
        if tokens is None:
            parts.append(MicroBatch(tuple(chunk), dominant))
        else:
            parts += [
                MicroBatch(tuple(chunk)),
                *([MicroBatch(dominant=dominant)] if dominant else []),
            ]
    return parts if tokens is None else _first_fit(parts, tokens, share_prompts)


def _first_fit(parts: Sequence[MicroBatch], budget: int, share_prompts: bool) -> list[MicroBatch]:
    """Joins parts where they fit the budget together, the longest first, each into the first that
    has room."""
    joined: list[MicroBatch] = []
    sizes: list[int] = []
    for size, part in sorted(
        ((part.tokens(share_prompts), part) for part in parts), key=lambda of: -of[0]
    ):  # stable: alike on every rank
        place = next((i for i, other in enumerate(sizes) if other + size <= budget), None)
        if place is None:
            joined.append(part)
            sizes.append(size)
        else:
            joined[place] = MicroBatch(
                joined[place].examples + part.examples, joined[place].dominant + part.dominant
            )
            sizes[place] += size
    return joined


def order_of_rows(
    examples: Sequence[Example], epoch: int, seed: int, group_by_dominant: bool
) -> list[int]:
    """The order in which one epoch visits the rows: a function of seed and epoch alone, so that any
    number of ranks sees the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def shuffled(items: list) -> list:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    if not group_by_dominant:
        return shuffled(list(range(len(examples))))
    groups: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.dominant, []).append(index)
    return [index for group in shuffled(list(groups.values())) for index in shuffled(group)]


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimizer step computes. The rows of a run are cut from the concatenated
    epochs, so a step may span two."""

    rows: int
    pairs_per_step: int
    epochs: float
    max_steps: int | None
    repeats_first_step: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of the run, from which all else follows: `max_steps` full steps, or `epochs` passes
        to the nearest row, at least one."""
        if self.max_steps is not None:
            return self.max_steps * self.pairs_per_step
        return max(1, round(self.rows * as_written(self.epochs)))

    @property
    def steps(self) -> int:
        """Only the last one may have fewer than `pairs_per_step`, and only where `epochs` sets the
        end; none is empty."""
        return -(-self.pairs // self.pairs_per_step)

    def positions(self, step: int) -> range:
        """Positions of the step's pairs in the concatenated epochs."""
        step = 0 if self.repeats_first_step else step
        return range(step * self.pairs_per_step, min((step + 1) * self.pairs_per_step, self.pairs))

    def share(self, step: int, rank: int, world: int) -> list[int]:
        """The rank's positions of a step. Ranks take contiguous shares, so that rows that the order
        keeps together stay together."""
        positions = self.positions(step)
        share = math.ceil(len(positions) / world)
        return list(positions[rank * share : (rank + 1) * share])


def of_every_rank(
    schedule: Schedule,
    step: int,
    rank: int,
    world: int,
    cut: Callable[[list[int]], list[MicroBatch]],
) -> list[MicroBatch]:
    """The rank's micro-batches of a step. Every rank gets the same number of them; an empty one
    runs on a filler pair.

    cut: makes micro-batches of a rank's share; a function of the positions alone, so that every
    rank knows how many the others have.
    """
    batches = [cut(schedule.share(step, r, world)) for r in range(world)]
    return batches[rank] + [MicroBatch()] * (max(map(len, batches)) - len(batches[rank]))


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
