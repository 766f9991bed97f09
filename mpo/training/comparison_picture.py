"""The picture of a comparison: a line for each loss as in its table, a panel for each quantity, and
in it a mark for each language."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import chop_cells

from mpo.evaluation.gaps import ALL, GapRow
from mpo.training.comparison import BEFORE, Comparison
from mpo.training.drawing import CODE, LINE, Letters, as_number, legend, look_of, write_picture

WIDTH = 30
"""Columns of a line of a loss's name."""
WHOLE: dict[str, Any] = {"color": "black", "marker": "|", "markersize": 13, "markeredgewidth": 2}
"""How all rows together look, behind the interval of their mean."""


class Quantity(NamedTuple):
    """A panel over languages."""

    title: str
    unit: str
    of: Callable[[Comparison, str, str, GapRow], float]
    """Of a line and a language."""
    interval: Callable[[GapRow], tuple[float, float] | None]


QUANTITIES = (
    Quantity(
        "Target gap",
        "nats per token",
        lambda comparison, name, language, row: row.target_gap,
        lambda row: row.target_gap_interval,
    ),
    Quantity(
        "Distance to the dominant gap",
        "nats per token",
        lambda comparison, name, language, row: row.distance,
        lambda row: row.distance_interval,
    ),
    Quantity(
        "Sign accuracy",
        "% of the rows",
        lambda comparison, name, language, row: 100 * row.sign_accuracy,
        lambda row: None,
    ),
    Quantity(
        "Dominant gap moved",
        "nats per token",
        lambda comparison, name, language, row: comparison.moved(name, language),
        lambda row: None,
    ),
)
COSTS = (
    ("Optimizer steps", "seconds", "seconds"),
    ("Peak memory", "GiB", "peak_memory_gib"),
)


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the picture; its format is that of the name's ending.

    Raises:
        UserError: the ending is no format, or the file cannot be written.
    """
    write_picture(
        path,
        [*comparison.names, *comparison.languages],
        lambda letters: _figure(comparison, letters),
    )


def _figure(comparison: Comparison, letters: Letters) -> Any:
    """Four panels of what was achieved above two of what it cost, and the languages' names."""
    from matplotlib import pyplot as plt

    labels = [_label(name, letters) for name in comparison.names]
    languages = [name for name in comparison.languages if name != ALL]
    lines = 1 + max(label.count("\n") for label in labels)
    tall = 0.9 + len(labels) * max(0.32, min(0.06 * len(languages), 0.8), 0.12 + 0.16 * lines)
    columns = max(1, 100 // (8 + min(CODE, max(map(letters.width, languages), default=0))))
    below = 0.4 + 0.2 * math.ceil((len(languages) + 1) / columns)
    figure = plt.figure(figsize=(13, 3 * tall + below), layout="constrained")
    axes = figure.subplots(3, 2, sharey="row").flatten()
    for axis, quantity in zip(axes, QUANTITIES, strict=False):
        _draw_quantity(axis, comparison, quantity)
    for axis, cost in zip(axes[len(QUANTITIES) :], COSTS, strict=True):
        _draw_cost(axis, comparison, *cost)
    for axis in axes:
        axis.set_yticks(range(len(labels)), labels, parse_math=False)
        axis.set_ylim(len(labels) - 0.4, -0.6)  # the first at the top
        axis.grid(axis="y", color="#e5e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
        _name_failures(axis, comparison)
    _name_languages(figure, languages, letters, columns)
    if letters.note:
        figure.supxlabel(letters.note, fontsize=8)
    return figure


def _label(name: str, letters: Letters) -> str:
    """A loss's name in lines that end with a whole field where they can."""
    lines = [""]
    for part in re.split(r"(?<=,)", letters.of(name, LINE)):
        if lines[-1] and len(lines[-1] + part) > WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(piece for line in lines for piece in chop_cells(line, WIDTH))


def _name_failures(axis: Any, comparison: Comparison) -> None:
    for place, name in enumerate(comparison.names):
        if name in comparison.failures:
            at = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
            axis.text(0.01, place, "failed", color="#7d8794", **at)


def _draw_quantity(axis: Any, comparison: Comparison, quantity: Quantity) -> None:
    """A mark for each language of each line, a stroke for all rows; a dotted line where the model
    was before training, and for the gap a red one where its dominant gap was."""
    languages = [name for name in comparison.languages if name != ALL]
    for place, name in enumerate(comparison.names):
        for number, language in enumerate([*languages, ALL]):
            row = comparison.row(name, language)
            value = math.nan if row is None else quantity.of(comparison, name, language, row)
            if row is None or not math.isfinite(value):
                continue
            if language != ALL:
                # one below the other, so that none hides another
                below = 0.7 * ((number + 0.5) / len(languages) - 0.5)
                axis.plot(value, place + below, linestyle="", **_mark(number, len(languages)))
                continue
            axis.plot(value, place, linestyle="", **WHOLE)
            if (interval := quantity.interval(row)) is not None:
                axis.plot(interval, (place, place), color="black", linewidth=1.2)
    axis.set(xlabel=quantity.unit, title=quantity.title)
    before = comparison.row(BEFORE)
    if before is None:
        return
    axis.axvline(
        quantity.of(comparison, BEFORE, ALL, before), color="#7d8794", linestyle=":", zorder=0
    )
    if quantity is QUANTITIES[0]:
        axis.axvline(before.dominant_gap, color="#d62728", linestyle=":", zorder=0)


def _mark(place: int, of: int) -> dict[str, Any]:
    """How a language looks here, as in the other pictures."""
    look = look_of(place, of)
    return {**look, "marker": look["marker"] or "o", "markersize": 4}


def _draw_cost(axis: Any, comparison: Comparison, title: str, unit: str, field: str) -> None:
    """A bar for each finished run, with its number."""
    for place, name in enumerate(comparison.names):
        if name not in comparison.trainings:
            continue
        value = as_number(getattr(comparison.trainings[name], field))
        if math.isfinite(value):
            axis.barh(place, value, height=0.55, color="#1f77b4")
            axis.text(value, place, f" {value:.4g}", va="center", fontsize=8)
    axis.set(xlabel=unit, title=title, xlim=(0, axis.get_xlim()[1] * 1.12))


def _name_languages(figure: Any, languages: list[str], letters: Letters, columns: int) -> None:
    from matplotlib.lines import Line2D

    entries = {
        letters.of(language, CODE): Line2D([], [], linestyle="", **_mark(place, len(languages)))
        for place, language in enumerate(languages)
    }
    entries["all rows (95% interval)"] = Line2D([], [], linestyle="", **WHOLE)
    entries["before training"] = Line2D([], [], color="#7d8794", linestyle=":")
    entries["dominant gap before"] = Line2D([], [], color="#d62728", linestyle=":")
    legend(figure, entries, loc="outside lower center", ncol=columns)
