"""What a run achieved on the measured rows, as `result.json` and as a table. Its gaps are those of
two models, before and after; the picture is drawn by `mpo.training.curves`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo.data.examples import Example
from mpo.evaluation.gaps import ALL, GapTable
from mpo.models.scoring import Measurement
from mpo.runtime.terminal import show_table

QUANTITIES = {
    "target_gap": ("target gap", "+.3f"),
    "dominant_gap": ("dominant gap", "+.3f"),
    "distance": ("distance", ".3f"),
    "sign_accuracy": ("sign accuracy", ".0%"),
}
"""What `result.json` holds before and after: its heading and its form in the table."""


@dataclass(frozen=True)
class RunResult:
    """Gaps before and after, and how far the dominant representation moved."""

    loss: str
    """Name of what it was trained with."""
    gaps: GapTable
    """Of the models `before` and `after`; each distance is from the dominant gap before."""
    l2: float
    """Mean squared change of the dominant pooled hidden states."""
    l2_relative: float
    """The same over their mean square before."""

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        before: Measurement,
        after: Measurement,
        gap_scale: float,
        loss: str,
    ) -> RunResult:
        """The result of a run on R measured examples.

        RunResult.of(examples, before, after, 1.0, "mpo").as_dict()["all"]["distance"]["after"]
        """
        change = (after.pooled - before.pooled).square().mean()
        return cls(
            loss,
            GapTable.of(examples, {"before": before, "after": after}, gap_scale),
            float(change),
            float(change / before.pooled.square().mean()),
        )

    def as_dict(self) -> dict[str, Any]:
        """As `result.json` has it: each quantity of a language as a pair, before and after."""
        rows = {language: self._row(language) for language in self.gaps.languages}
        return {
            "loss": self.loss,
            "gap_scale": self.gaps.gap_scale,
            "languages": {name: row for name, row in rows.items() if name != ALL},
            ALL: rows[ALL],
            "l2": self.l2,
            "l2_relative": self.l2_relative,
        }

    def _row(self, language: str) -> dict[str, Any]:
        return {"n": self.gaps.models["before"][language].n} | {
            quantity: self._pair(language, quantity) for quantity in QUANTITIES
        }

    def _pair(self, language: str, quantity: str) -> dict[str, float]:
        return {
            moment: getattr(rows[language], quantity) for moment, rows in self.gaps.models.items()
        }

    def show(self, console: Console) -> None:
        """A line for each language; every pair of numbers is before → after."""
        table = Table(
            title=(
                f"Reward gaps on the measured rows, before → after {self.loss} (nats per"
                f" token{self.gaps.scale_in_words})"
            )
        )
        table.add_column("language")
        for heading in ("rows", *(heading for heading, _ in QUANTITIES.values())):
            table.add_column(heading, justify="right")
        languages = self.gaps.languages
        for place, language in enumerate(languages):
            cells = [
                " → ".join(f"{value:{form}}" for value in self._pair(language, quantity).values())
                for quantity, (_, form) in QUANTITIES.items()
            ]
            rows = str(self.gaps.models["before"][language].n)
            table.add_row(language, rows, *cells, end_section=place == len(languages) - 2)
        show_table(table, console)
        console.print(
            f"Dominant representation: L2 {self.l2:.2e}, {self.l2_relative:.2%} of its mean"
            " square.",
            markup=False,
        )
