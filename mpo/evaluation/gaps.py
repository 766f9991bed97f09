"""The table of reward gaps per language, of any models side by side. The only place that computes
it.

Knows measurements and no model: `mpo gaps` compares models of any kind, and to a run *before* and
*after* are names of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.cells import chop_cells
from rich.console import Console
from rich.table import Table

from mpo.data.examples import Example
from mpo.models.scoring import Measurement, sign_accuracy
from mpo.runtime.terminal import distinct_names, show_table

RESAMPLES = 2000
INTERVAL = 0.95
ALL = "all"
"""The row over all languages."""
DRAWN_AT_ONCE = 1 << 24
"""Draws that resampling holds in memory, about."""


@dataclass(frozen=True)
class GapRow:
    """One model on the rows of one language, in nats per token of the model itself."""

    n: int
    """Rows."""
    target_gap: float
    """Mean reward gap of the target pairs."""
    target_gap_interval: tuple[float, float]
    dominant_gap: float
    """Mean reward gap of their dominant pairs."""
    distance: float
    """Mean |gap_scale * target gap - dominant gap of the first model|: what L1 brings down."""
    distance_interval: tuple[float, float]
    sign_accuracy: float
    """Share of target pairs whose chosen answer is the likelier one."""

    @classmethod
    def of(
        cls, target: torch.Tensor, dominant: torch.Tensor, anchor: torch.Tensor, gap_scale: float
    ) -> GapRow:
        """Means over rows of reward gaps, (n,) each; `anchor` is what L1 pulls the target to."""
        distance = (gap_scale * target - anchor).abs()
        return cls(
            n=target.numel(),
            target_gap=float(target.mean()),
            target_gap_interval=bootstrap_interval(target),
            dominant_gap=float(dominant.mean()),
            distance=float(distance.mean()),
            distance_interval=bootstrap_interval(distance),
            sign_accuracy=sign_accuracy(target),
        )


@dataclass(frozen=True)
class GapTable:
    """Rows of any models, per language and over all.

    table = GapTable.of(examples, {"before": before, "after": after}, gap_scale=1.0)
    table.models["after"]["sw"].target_gap
    """

    gap_scale: float
    """What a target gap is multiplied with where its distance is told: beta of a run of mpo, 1 of
    any other."""
    models: dict[str, dict[str, GapRow]]
    """By model, then by language in the order of the alphabet, `all` last."""

    @classmethod
    def of(
        cls, examples: Sequence[Example], measured: dict[str, Measurement], gap_scale: float
    ) -> GapTable:
        """The table of what each model measured on the examples.

        Args:
            examples: R measured rows.
            measured: gaps (R,) by the model's name. The first model's dominant gap is what every
                distance is from.
            gap_scale: `LossConfig.gap_scale`.
        """
        places = {
            language: [i for i, e in enumerate(examples) if e.language == language]
            for language in sorted({e.language for e in examples})
        }
        places[ALL] = list(range(len(examples)))
        anchor = next(iter(measured.values())).dominant
        return cls(
            gap_scale,
            {
                name: {
                    key: GapRow.of(gaps.target[of], gaps.dominant[of], anchor[of], gap_scale)
                    for key, of in places.items()
                }
                for name, gaps in measured.items()
            },
        )

    @property
    def languages(self) -> list[str]:
        """The languages, and `all`."""
        return list(next(iter(self.models.values())))

    @property
    def scale_in_words(self) -> str:
        """For a title: what distances are of, unless it is the gaps as they are."""
        return "" if self.gap_scale == 1 else f", distances of {self.gap_scale:g} x target gap"

    def as_dict(self) -> dict[str, Any]:
        """As `mpo gaps --json` prints it."""
        return asdict(self)

    def show(self, console: Console) -> None:
        """One line per language and model, whose names are as long as it takes to tell them
        apart."""
        table = Table(
            title=(
                f"Reward gaps (nats per token{self.scale_in_words}; in brackets {INTERVAL:.0%}"
                " bootstrap intervals)"
            )
        )
        table.add_column("language")
        table.add_column("model", no_wrap=True)
        for heading in ("rows", "target gap", "dominant gap", "distance", "sign accuracy"):
            table.add_column(heading, justify="right")
        names = distinct_names(list(self.models))
        for language in self.languages:
            for place, (name, rows) in enumerate(zip(names, self.models.values(), strict=True)):
                first, last = place == 0, place == len(names) - 1
                table.add_row(*_cells(language, name, rows[language], first), end_section=last)
        show_table(table, console)
        for name, path in zip(names, self.models, strict=True):
            if name != path:
                console.print(f"{name}: {path}", soft_wrap=True, markup=False)


def _cells(language: str, name: str, row: GapRow, first: bool) -> Iterator[str]:
    """A line of the table; language and rows are said once."""
    low, high = row.target_gap_interval
    near, far = row.distance_interval
    yield language if first else ""
    yield "\n".join(chop_cells(name, 40))
    yield str(row.n) if first else ""
    yield f"{row.target_gap:+.3f} [{low:+.3f}, {high:+.3f}]"
    yield f"{row.dominant_gap:+.3f}"
    yield f"{row.distance:.3f} [{near:.3f}, {far:.3f}]"
    yield f"{row.sign_accuracy:.0%}"


def bootstrap_interval(values: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) values: percentiles of means over resampled rows, with
    the same draws at every call.

    >>> bootstrap_interval(torch.tensor([0.25]))
    (0.25, 0.25)
    """
    generator = torch.Generator().manual_seed(seed)
    n, means = values.numel(), list[torch.Tensor]()
    together = max(1, DRAWN_AT_ONCE // n)
    for first in range(0, RESAMPLES, together):
        count = min(together, RESAMPLES - first)
        picks = torch.randint(0, n, (count, n), generator=generator)
        means.append(values[picks].double().mean(1))
    edges = torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(edges).tolist()
    return low, high
