"""From the rows of a step to what each forward pass of a rank computes, and to the batches that the
model takes.

Everything here is host-side integers, but for what the reference says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpo.config import Config
from mpo.data.examples import Example, TokenizedResponse
from mpo.models.attention import shares_prompts
from mpo.models.packing import FILLER, Batch, pack, tokens_of
from mpo.training.reference import ReferenceStore
from mpo.training.schedule import Schedule, order_of_rows


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

    def reference_sequences(self) -> list[TokenizedResponse]:
        """Whose reference values its batch takes."""
        return [s for e in self.examples for s in e.dominant] + [s for s, _ in self.dominant]

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
            parts.append(MicroBatch(tuple(chunk)))
            if dominant:
                parts.append(MicroBatch(dominant=dominant))
    return parts if tokens is None else _first_fit(parts, tokens, share_prompts)


def _first_fit(parts: Sequence[MicroBatch], budget: int, share_prompts: bool) -> list[MicroBatch]:
    """Joins parts where they fit the budget together, the longest first, each into the first that
    has room."""
    joined: list[MicroBatch] = []
    sizes: list[int] = []
    sized = [(part.tokens(share_prompts), part) for part in parts]
    for size, part in sorted(sized, key=lambda of: -of[0]):  # stable: alike on every rank
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


def make_batch(part: MicroBatch, store: ReferenceStore, config: Config) -> Batch:
    """Packs a micro-batch and adds the reference's numbers, which `store` holds. Without an example
    of its own it gets a filler pair of weight 0."""
    sequences = part.sequences() if part.examples else [FILLER, FILLER, *part.sequences()]
    scored = len(sequences) - len(part.dominant)
    return Batch(
        packed=pack(
            sequences,
            scored=range(scored),
            pooled=range(scored, len(sequences)),
            pool=config.loss.pool,
            share_prompts=shares_prompts(config.model.attention),
        ),
        reference_gap=torch.tensor([store.gap(e) for e in part.examples] or [0.0]),
        pair_weights=torch.tensor([1.0] * len(part.examples) or [0.0]),
        pooled_reference=(
            torch.stack([store.pooled(s) for s, _ in part.dominant])
            if part.dominant
            else torch.zeros(0, 0)
        ),
        pooled_weights=torch.tensor([weight for _, weight in part.dominant]),
    )


class Batches:
    """Which rows each forward pass of a run computes."""

    def __init__(self, examples: Sequence[Example], schedule: Schedule, config: Config) -> None:
        self._examples, self._schedule, self._config = examples, schedule, config
        self._orders: dict[int, list[int]] = {}
        self.languages = sorted({e.language for e in examples})
        """Of all rows."""

    def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        """The rank's micro-batches of a step."""
        train = self._config.train

        def cut(share: Sequence[int]) -> list[MicroBatch]:
            return in_micro_batches(
                [self._example(p) for p in share],
                pairs=train.pairs_per_micro_batch,
                tokens=train.tokens_per_micro_batch,
                share_prompts=shares_prompts(self._config.model.attention),
            )

        return of_every_rank(self._schedule, step, rank, world, cut)

    def _example(self, position: int) -> Example:
        epoch, place = divmod(position, len(self._examples))
        if epoch not in self._orders:
            train = self._config.train
            self._orders[epoch] = order_of_rows(
                self._examples, epoch, train.seed, train.group_by_dominant
            )
        return self._examples[self._orders[epoch][place]]
