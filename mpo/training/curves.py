"""The picture of one run or several: curves over the steps, and for each finished run gaps and
distances before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpo.runtime.errors import UserError
from mpo.runtime.files import read_object
from mpo.runtime.terminal import distinct_names
from mpo.training.drawing import (
    CODE,
    Letters,
    as_number,
    check_target,
    legend,
    look_of,
    write_picture,
)
from mpo.training.run_folder import OutputFolder, read_metrics

FEW = 3
"""A curve of so many points shows each of them: one point alone is no line."""
DASHES: tuple[Any, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (8, 4)),
    (0, (3, 1, 1, 4)),
)


class Run(NamedTuple):
    """What is drawn of one run."""

    name: str
    rows: Sequence[dict[str, Any]]
    """Of metrics.jsonl."""
    result: dict[str, Any] | None
    """Of result.json, where the run is finished."""

    @property
    def loss(self) -> str:
        """Name of what it makes small."""
        return str(self.rows[-1].get("loss_name", "mpo")) if self.rows else "mpo"


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Writes a picture of one run or several: losses and gaps over the steps, and of finished ones
    the gaps before and after.

    plot_runs([Path("runs/demo"), Path("runs/second")], Path("compare.png"))

    Raises:
        UserError: a folder has no metrics, or damaged ones; `path` names no format, or cannot be
            written.
    """
    check_target(path)
    different = list({os.path.realpath(folder): folder for folder in folders}.values())
    names = distinct_names([str(folder) for folder in different])
    runs = [_run(name, OutputFolder(folder)) for name, folder in zip(names, different, strict=True)]
    if len({run.loss for run in runs}) > 1:
        runs = [run._replace(name=f"{run.name} ({run.loss})") for run in runs]
    draw(runs, path)


def plot_run(metrics: Path, result: dict[str, Any], path: Path) -> None:
    """Writes a picture of a finished run, without its curves where `metrics` was lost."""
    draw(
        [Run(metrics.parent.name, read_metrics(metrics) if metrics.exists() else [], result)],
        path,
    )


def _run(name: str, folder: OutputFolder) -> Run:
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    if not rows:
        raise UserError(
            f"{folder.root} has no metrics.jsonl: it is no run's folder, or its first step is not"
            " done."
        )
    result = read_object(folder.result) if folder.result.is_file() else None
    if result is not None and not _is_result(result):
        raise UserError(
            f"{folder.result} holds no result of a run. Restore the file, or delete it: the run's"
            " curves are drawn without it."
        )
    return Run(name, rows, result)


def _is_result(value: dict[str, Any]) -> bool:
    try:
        pairs = [
            of[quantity]
            for of in value["languages"].values()
            for quantity in ("target_gap", "distance")
        ]
        numbers = [
            pair[moment]
            for pair in (*pairs, value["all"]["dominant_gap"])
            for moment in ("before", "after")
        ]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(number is None or isinstance(number, int | float) for number in numbers)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the picture of at least one run; its format is that of the name's ending.

    draw([Run("demo", read_metrics(Path("runs/demo/metrics.jsonl")), None)], Path("demo.svg"))

    Raises:
        UserError: the ending is no format, or the file cannot be written.
    """
    languages = sorted(
        {language for run in runs for row in run.rows for language in row["gap"]} | _measured(runs)
    )
    write_picture(
        path,
        [*(run.name for run in runs), *languages],
        lambda letters: _figure(runs, languages, letters),
    )


def _measured(runs: Sequence[Run]) -> set[str]:
    return {
        language for run in runs if run.result is not None for language in run.result["languages"]
    }


def _figure(runs: Sequence[Run], languages: Sequence[str], letters: Letters) -> Any:
    """All panels: the curves of all runs, then a row for each finished one."""
    from matplotlib import pyplot as plt

    finished = [run for run in runs if run.result is not None]
    longest = min(CODE, max((letters.width(language) for language in languages), default=0))
    columns = max(1, min(8, 70 // (longest + 8)))
    several = len(runs) > 1
    names = 0.2 * sum(letters.of(run.name).count("\n") + 1 for run in runs) if several else 0
    heights = [
        4.2 + names + 0.17 * math.ceil(len(languages) / columns),
        *[4.2 + 0.08 * longest] * len(finished),
    ]
    figure = plt.figure(
        figsize=(max(12, 4 + 0.5 * len(languages)), sum(heights)), layout="constrained"
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_curves(parts[0], runs, languages, letters, columns)
    for part, run in zip(parts[1:], finished, strict=True):
        _draw_result(part, run, letters, named=several)
    if letters.note:
        figure.supxlabel(letters.note, fontsize=8)
    return figure


def _draw_curves(
    part: Any, runs: Sequence[Run], languages: Sequence[str], letters: Letters, columns: int
) -> None:
    """Losses, and gaps per language, of each step: a colour for each quantity or language, a line
    style for each run."""
    from matplotlib.lines import Line2D

    losses, gaps = part.subplots(1, 2)
    _draw_losses(losses, runs)
    _draw_gaps(gaps, runs, languages, letters, columns)
    if len(runs) > 1:
        of_runs = {
            letters.of(run.name): Line2D([], [], color="black", **_style(place))
            for place, run in enumerate(runs)
        }
        legend(part, of_runs, loc="outside upper center", ncol=1, handlelength=5)


def _draw_losses(axis: Any, runs: Sequence[Run]) -> None:
    """The loss and, where it has two parts, both; on a logarithmic axis unless a loss that is no
    MPO's goes below 0."""
    from matplotlib.lines import Line2D

    is_log = not any(
        value <= 0 for run in runs if run.loss != "mpo" for _, value in _points(run, "loss")
    )
    points, curves = _above_0 if is_log else _points, _curves_of(runs)
    entries = {}
    for colour, (key, label) in enumerate(curves):
        seen = any(points(run, key) for run in runs)
        name = label if seen else f"{label}: never above 0"
        entries[name] = Line2D([], [], color=f"C{colour}")
    for place, run in enumerate(runs):
        for colour, (key, _) in enumerate(curves):
            width = 2 if key == "loss" else 1.2
            _curve(axis, points(run, key), place, color=f"C{colour}", width=width)
    if axis.get_lines() and is_log:
        axis.set_yscale("log")
    names = ", ".join(dict.fromkeys(run.loss for run in runs))
    title = "Training loss" if names == "mpo" else f"Training loss: {names}"
    axis.set(xlabel="optimizer step", ylabel="loss")
    axis.set_title(title, parse_math=False)
    _legend_below(axis, entries, columns=3)


def _curves_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Keys of metrics and what they are called: the loss alone where it has no second part."""
    names = dict.fromkeys(run.loss for run in runs)
    if "mpo" not in names and all(row.get("l2") is None for run in runs for row in run.rows):
        return [("loss", "loss")]
    own = ", ".join("L1 (gap)" if name == "mpo" else name for name in names)
    return [("loss", "loss"), ("l1", own), ("l2", "L2 (retention)")]


def _draw_gaps(
    axis: Any, runs: Sequence[Run], languages: Sequence[str], letters: Letters, columns: int
) -> None:
    """The reward gap of each language; after ten of them colours come again, with marks."""
    from matplotlib.lines import Line2D

    looks = {language: look_of(i, len(languages)) for i, language in enumerate(languages)}
    for place, run in enumerate(runs):
        for language, look in looks.items():
            points = [(row["step"], as_number(row["gap"].get(language))) for row in run.rows]
            _curve(axis, points, place, **look)
    entries = {
        letters.of(language, CODE): Line2D([], [], markersize=4, **look)
        for language, look in looks.items()
    }
    title = "Reward gap of each step's rows"
    axis.set(xlabel="optimizer step", ylabel="nats per token", title=title)
    _legend_below(axis, entries, columns)


def _above_0(run: Run, key: str) -> list[tuple[int, float]]:
    """What a logarithmic axis can show of a quantity."""
    return [(step, value) for step, value in _points(run, key) if value > 0]


def _points(run: Run, key: str) -> list[tuple[int, float]]:
    """The finite numbers of a quantity."""
    points = [(row["step"], as_number(row.get(key))) for row in run.rows]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _style(run: int) -> dict[str, Any]:
    """A line style for each run; after the last they come again, thicker."""
    return {"linestyle": DASHES[run % len(DASHES)], "linewidth": 1.2 + 1.4 * (run // len(DASHES))}


def _curve(
    axis: Any,
    points: Sequence[tuple[int, float]],
    run: int,
    *,
    color: str,
    marker: str | None = None,
    width: float = 0,
) -> None:
    """A line through the points that are numbers; with marks where they are few, or where colours
    alone would not tell lines apart."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return
    style = _style(run)
    style["linewidth"] = max(width, style["linewidth"])
    few = len(points) <= FEW
    axis.plot(
        *zip(*points, strict=True),
        color=color,
        marker=marker or ("o" if few else None),
        markersize=4 * max(width, 1),  # the loss is seen behind the L1 that it equals
        markevery=1 if few else max(1, len(points) // 20),
        **style,
    )


def _legend_below(axis: Any, entries: dict[str, Any], columns: int) -> None:
    """A legend under an axis of steps, which are whole numbers."""
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5}
    legend(axis, entries, ncol=columns, **place)


def _draw_result(part: Any, run: Run, letters: Letters, named: bool) -> None:
    """Bars of one finished run, before and after."""
    result = run.result
    assert result is not None
    if named:
        part.suptitle(letters.of(run.name), fontsize=10, parse_math=False)
    gaps, distances = part.subplots(1, 2)
    for axis, quantity, title in (
        (gaps, "target_gap", "Reward gap per language"),
        (distances, "distance", "Distance to the dominant gap"),
    ):
        pairs = {language: row[quantity] for language, row in result["languages"].items()}
        _bars(axis, pairs, letters)
        axis.set(ylabel="nats per token", title=title)
        axis.axhline(0, color="black", linewidth=0.8)
    for moment, style in (("before", ":"), ("after", "-")):
        height = as_number(result["all"]["dominant_gap"][moment])
        gaps.axhline(height, color="#d62728", linestyle=style, label=f"dominant {moment}")
    handles, labels = gaps.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncol": 4}
    part.legend(handles, labels, frameon=False, fontsize=8, **place)


def _bars(axis: Any, pairs: dict[str, dict[str, Any]], letters: Letters) -> None:
    """Two bars for each language, whose names are turned where they would touch."""
    places = range(len(pairs))
    for shift, moment, colour in ((-0.2, "before", "#b8bfc9"), (0.2, "after", "#1f77b4")):
        heights = [as_number(pair[moment]) for pair in pairs.values()]
        axis.bar([place + shift for place in places], heights, 0.4, label=moment, color=colour)
    longest = max(map(letters.width, pairs), default=0)
    turned: dict[str, Any] = {}
    if len(pairs) * (1 + longest) > 55:
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    labels = [letters.of(language, CODE) for language in pairs]
    axis.set_xticks(places, labels, parse_math=False, **turned)
    axis.set_xlim(-0.6, max(len(pairs), 3) - 0.4)
