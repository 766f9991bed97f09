"""From the rows of a step to what each forward pass of a rank computes, and to the batches that the
model takes.

Everything here is host-side integers, but for what the reference says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mpo.config import Config
from mpo.data.examples import Answers, Example, TokenizedResponse
from mpo.models.attention import shares_prompts
from mpo.models.packing import FILLER, Batch, pack, tokens_of
from mpo.training.objective import Group, Objective
from mpo.training.reference import ReferenceStore
from mpo.training.schedule import Schedule, order_of_rows


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes: the loss of groups, and L2 of dominant sequences, which need
    not be of the same rows."""

    groups: tuple[Group, ...] = ()
    dominant: tuple[tuple[TokenizedResponse, float], ...] = ()
    """Each with its weight: half the number of the step's examples that have it."""

    @property
    def examples(self) -> list[Example]:
        """Whose target side it computes."""
        return [group.example for group in self.groups if group.is_target]

    def scored(self) -> list[TokenizedResponse]:
        """In the order of the row: the first sequences of all groups, then the second ones."""
        sizes = {len(group.sequences) for group in self.groups}
        return [group.sequences[i] for i in range(max(sizes, default=0)) for group in self.groups]

    def only_pooled(self) -> list[TokenizedResponse]:
        """Dominant sequences that no group scores."""
        scored = {s for group in self.groups if not group.is_target for s in group.sequences}
        return [sequence for sequence, _ in self.dominant if sequence not in scored]

    def sequences(self) -> list[TokenizedResponse]:
        """In the order of the row."""
        return self.scored() + self.only_pooled()

    def reference_sequences(self, objective: Objective) -> list[TokenizedResponse]:
        """Whose reference values its batch takes."""
        of_rows = [s for group in self.groups for s in group.example.dominant]
        pooled = [sequence for sequence, _ in self.dominant]
        return (of_rows + pooled if objective.takes_dominant else []) + (
            self.scored() if objective.takes_logps else []
        )

    def tokens(self, share_prompts: bool) -> int:
        """Packed tokens."""
        return tokens_of(self.sequences(), share_prompts)


def in_micro_batches(
    examples: Sequence[Example],
    objective: Objective,
    *,
    pairs: int,
    tokens: int | None,
    share_prompts: bool,
) -> list[MicroBatch]:
    """Cuts the examples that one rank has in one step into micro-batches. A dominant pair that
    several have is computed in one of them.

    Without a budget of `tokens`: consecutive examples, `pairs` at a time, with the dominant pairs
    that did not come up before. With it: first fit, the longest first, of target pairs and dominant
    pairs alike; what is larger than the budget goes alone.
    """
    weights: dict[TokenizedResponse, float] = {}
    if objective.pools_dominant:
        for example in examples:
            for sequence in example.dominant:
                weights[sequence] = weights.get(sequence, 0.0) + 0.5
    once = _dominant_groups(examples, objective)
    chunks = (
        [examples[i : i + pairs] for i in range(0, len(examples), pairs)]
        if tokens is None
        else [[e] for e in examples]
    )
    parts: list[MicroBatch] = []
    for chunk in chunks:
        new = dict.fromkeys(s for e in chunk for s in e.dominant if s in weights)
        dominant = tuple((sequence, weights.pop(sequence)) for sequence in new)
        target = tuple(g for e in chunk for g in objective.groups(e) if g.is_target)
        also = tuple(g for e in chunk for g in once.pop(e.dominant, ()))
        if tokens is None:
            parts.append(MicroBatch(target + also, dominant))
        else:
            parts.append(MicroBatch(target))
            if also or dominant:
                parts.append(MicroBatch(also, dominant))
    return parts if tokens is None else _first_fit(parts, tokens, share_prompts)


def _dominant_groups(
    examples: Sequence[Example], objective: Objective
) -> dict[Answers, list[Group]]:
    """The groups of each dominant pair once, with the weights of all examples that have it."""
    once: dict[Answers, list[Group]] = {}
    for example in examples:
        mine = [group for group in objective.groups(example) if not group.is_target]
        before = once.get(example.dominant)
        once[example.dominant] = (
            mine
            if before is None
            else [
                replace(group, weight=group.weight + more.weight)
                for group, more in zip(before, mine, strict=True)
            ]
        )
    return once


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
                joined[place].groups + part.groups, joined[place].dominant + part.dominant
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


def make_batch(
    part: MicroBatch,
    objective: Objective,
    store: ReferenceStore,
    config: Config,
    of_step: Mapping[str, float],
) -> Batch:
    """Packs a micro-batch and adds the reference's numbers, which `store` holds, and those of the
    step. Without a group of its own it gets a filler of weight 0."""
    scored = part.scored() or [FILLER] * objective.size
    sequences = scored + part.only_pooled()
    # behind the targets: a target answer that equals a dominant one has a place of its own
    places = {sequence: place for place, sequence in enumerate(sequences)}
    return Batch(
        packed=pack(
            sequences,
            scored=range(len(scored)),
            pooled=[places[sequence] for sequence, _ in part.dominant],
            pool=config.loss.pool,
            share_prompts=shares_prompts(config.model.attention),
        ),
        constants=objective.constants(part.groups, store, of_step),
        weights=torch.tensor([group.weight for group in part.groups] or [0.0]),
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
        self.objective = Objective(config.loss)
        self._orders: dict[int, list[int]] = {}
        self.languages = sorted({e.language for e in examples})
        """Of all rows."""

    def micro_batches(self, step: int, rank: int, world: int) -> list[MicroBatch]:
        """The rank's micro-batches of a step."""
        train = self._config.train

        def cut(share: Sequence[int]) -> list[MicroBatch]:
            return in_micro_batches(
                [self._examples[self._row(p)] for p in share],
                self.objective,
                pairs=train.pairs_per_micro_batch,
                tokens=train.tokens_per_micro_batch,
                share_prompts=shares_prompts(self._config.model.attention),
            )

        return of_every_rank(self._schedule, step, rank, world, cut)

    def rows_of(self, step: int) -> list[int]:
        """All rows of a step, of every rank."""
        return [self._row(position) for position in self._schedule.positions(step)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self._examples))
        if epoch not in self._orders:
            train = self._config.train
            self._orders[epoch] = order_of_rows(
                self._examples, epoch, train.seed, train.group_by_dominant
            )
        return self._orders[epoch][place]
