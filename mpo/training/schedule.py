"""Which rows each optimizer step computes, and in which order an epoch visits them.

Both follow from the configuration alone, so that any number of ranks sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpo.config import Config
from mpo.data.examples import Example
from mpo.runtime.settings import as_written


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


def schedule_of(config: Config, rows: int) -> Schedule:
    """The steps of a run over so many rows."""
    train = config.train
    return Schedule(rows, train.pairs_per_step, train.epochs, train.max_steps, train.overfit_batch)


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
