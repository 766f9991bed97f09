"""What several losses achieved on the same measured rows and what they cost: one table, as JSON, on
a terminal and as Markdown. Its picture is drawn by `mpo.training.comparison_picture`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo.evaluation.gaps import ALL, GapRow, GapTable
from mpo.runtime.terminal import show_table

BEFORE = "before"
HEADINGS = (
    "loss",
    "target gap",
    "distance",
    "sign accuracy",
    "dominant gap moved",
    "seconds",
    "peak memory",
)


@dataclass(frozen=True)
class Training:
    """One finished run beside its gaps."""

    folder: str
    settings: dict[str, Any]
    """The sections `loss` and `train` of its configuration, which tell it from the others."""
    steps: int
    seconds: float
    """Of its optimizer steps alone; NaN where its metrics are lost."""
    peak_memory_gib: float
    """Of rank 0 until its last step; NaN likewise."""

    @classmethod
    def of(
        cls, folder: str, settings: dict[str, Any], steps: int, rows: list[dict[str, Any]]
    ) -> Training:
        """From the lines of its metrics.jsonl. Steps without a line (log_every) count as the mean
        of the others."""
        seconds = [float(row["seconds"]) for row in rows]
        peaks = [float(row["peak_memory_gib"]) for row in rows]
        mean = sum(seconds) / len(seconds) if seconds else math.nan
        return cls(folder, settings, steps, steps * mean, max(peaks, default=math.nan))


@dataclass(frozen=True)
class Comparison:
    """Losses side by side, after the model before training.

    comparison.gaps.models["dpo"]["sw"].distance, comparison.trainings["dpo"].seconds
    """

    losses: tuple[str, ...]
    """In the order in which they were asked for."""
    gaps: GapTable | None
    """Of the model `before` and of each finished run; None where none is."""
    trainings: dict[str, Training]
    """The finished ones."""
    failures: dict[str, str]
    """Why the others are not."""

    @property
    def names(self) -> list[str]:
        """The lines of the table."""
        return [*([BEFORE] if self.gaps is not None else []), *self.losses]

    @property
    def languages(self) -> list[str]:
        """The languages, and `all`."""
        return [] if self.gaps is None else self.gaps.languages

    def row(self, name: str, language: str = ALL) -> GapRow | None:
        """The gaps of a line; None where its run is not finished."""
        return None if self.gaps is None else self.gaps.models.get(name, {}).get(language)

    def moved(self, name: str, language: str = ALL) -> float:
        """How far the dominant gap of a finished run went from where it was before training."""
        row, before = self.row(name, language), self.row(BEFORE, language)
        assert row is not None and before is not None
        return row.dominant_gap - before.dominant_gap

    def as_dict(self) -> dict[str, Any]:
        """As `compare.json` has it."""
        return {
            "gap_scale": None if self.gaps is None else self.gaps.gap_scale,
            BEFORE: None if self.gaps is None else self._gaps_of(BEFORE),
            "losses": {name: self._loss_as_dict(name) for name in self.losses},
        }

    def _loss_as_dict(self, name: str) -> dict[str, Any]:
        if name in self.failures:
            return {"status": "failed", "error": self.failures[name]}
        training = asdict(self.trainings[name])
        return {"status": "finished", **training.pop("settings"), **training, **self._gaps_of(name)}

    def _gaps_of(self, name: str) -> dict[str, Any]:
        assert self.gaps is not None
        rows = {
            language: {**asdict(row), "dominant_gap_moved": self.moved(name, language)}
            for language, row in self.gaps.models[name].items()
        }
        return {
            "languages": {name: row for name, row in rows.items() if name != ALL},
            ALL: rows[ALL],
        }

    def show(self, console: Console) -> None:
        """One line per loss, and below it why a run failed."""
        table = Table(title=self._title())
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "loss" else "right")
        for name in self.names:
            table.add_row(*self._cells(name), end_section=name == BEFORE)
        show_table(table, console)
        for line in self._notes():
            console.print(line, soft_wrap=True, markup=False)

    def as_markdown(self, picture: str) -> str:
        """The same as a page, with its picture below."""
        lines = [
            f"{self._title()}.\n",
            f"| {' | '.join(HEADINGS)} |",
            f"|{'---|' * len(HEADINGS)}",
            *(f"| {' | '.join(self._cells(name))} |" for name in self.names),
            *(f"\n{line}" for line in self._notes()),
            f"\n![Gaps, distances and cost of each loss, per language]({picture})",
        ]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        if self.gaps is None:
            return "Losses compared: no run is finished"
        rows = self.gaps.models[BEFORE][ALL].n
        scale = self.gaps.scale_in_words
        return f"Losses compared on {rows} measured rows (nats per token{scale})"

    def _cells(self, name: str) -> Iterator[str]:
        row = self.row(name)
        yield name
        if row is None:
            yield from ("failed", *[""] * 5)
            return
        yield f"{row.target_gap:+.3f}"
        yield f"{row.distance:.3f}"
        yield f"{row.sign_accuracy:.0%}"
        if name == BEFORE:
            yield from [""] * 3
            return
        training = self.trainings[name]
        yield f"{self.moved(name):+.3f}"
        yield "?" if math.isnan(training.seconds) else f"{training.seconds:.1f}"
        peak = training.peak_memory_gib
        yield "?" if math.isnan(peak) else f"{peak:.2f} GiB"

    def _notes(self) -> Iterator[str]:
        if self.gaps is not None:
            scale = "" if self.gaps.gap_scale == 1 else f"{self.gaps.gap_scale:g} x "
            yield (
                f"Distance: mean |{scale}target gap - dominant gap before training|. Seconds: of"
                " the optimizer steps alone. Peak memory: of rank 0 until the last step."
            )
        for name, why in self.failures.items():
            yield f"{name} failed: {why}"
