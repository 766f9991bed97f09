"""The picture of one run or several: curves over the steps, and for each finished run gaps and
distances before and after.

Names are shown as they are, whatever letters and signs they hold, and as far as the machine's fonts
have them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import cell_len, chop_cells

from mpo.runtime.errors import UserError
from mpo.runtime.files import new_file, read_object
from mpo.runtime.terminal import distinct_names
from mpo.training.run_folder import OutputFolder, read_metrics

LETTERS = "DejaVu Sans"
"""The font that comes with matplotlib."""
LINE, CODE = 140, 30
"""Columns of a line of a run's name, and of a language's."""
FEW = 3
"""A curve of so many points shows each of them: one point alone is no line."""
MARKERS = "os^DvPX*<>"
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


def check_target(path: Path) -> None:
    """Refuses a name that says no format, before anything is drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UserError(
            f"{path} names no format that can be drawn. Give the picture a name that ends with"
            " .png, .svg or .pdf."
        )


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes the picture of at least one run; its format is that of the name's ending.

    draw([Run("demo", read_metrics(Path("runs/demo/metrics.jsonl")), None)], Path("demo.svg"))

    Raises:
        UserError: the ending is no format, or the file cannot be written.
    """
    check_target(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    languages = sorted(
        {language for run in runs for row in run.rows for language in row["gap"]} | _measured(runs)
    )
    letters = _Letters([*(run.name for run in runs), *languages])
    with plt.style.context("default"), matplotlib.rc_context({"font.family": letters.fonts}):
        figure = _figure(runs, languages, letters)
        try:
            with new_file(path) as file:
                figure.savefig(file.buffer, dpi=130, format=path.suffix.removeprefix(".").lower())
        finally:
            plt.close(figure)


def _measured(runs: Sequence[Run]) -> set[str]:
    return {
        language for run in runs if run.result is not None for language in run.result["languages"]
    }


class _Letters:
    """Names as the machine's fonts can show them: letters that none has become a question mark, and
    names stay different."""

    def __init__(self, names: Iterable[str]) -> None:
        different = list(dict.fromkeys(names))
        self.fonts, missing = _fonts_with({character for name in different for character in name})
        shown = [
            "".join("?" if c in missing else c for c in " ".join(name.split()))
            for name in different
        ]
        numbered = [
            f"{text} [{place}]" if shown.count(text) > 1 else text
            for place, text in enumerate(shown, 1)
        ]
        self._shown = dict(zip(different, numbered, strict=True))
        self.note = (
            ""
            if not missing
            else "?: a letter that no font of this machine has; fonts such as Noto Sans have it"
        )

    def of(self, name: str, columns: int = LINE) -> str:
        """The name in lines of at most so many columns."""
        return "\n".join(chop_cells(self._shown[name], columns))

    def width(self, name: str) -> int:
        """Columns that the name takes in one line."""
        return cell_len(self._shown[name])


def _fonts_with(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font families that together have the characters, matplotlib's own first, and the characters
    that none has."""
    from matplotlib import font_manager, ft2font

    families, missing = [LETTERS], {c for c in characters if not c.isspace()}
    for path, family in [
        (font_manager.findfont(LETTERS), LETTERS),
        *((f.fname, f.name) for f in font_manager.fontManager.ttflist),
    ]:
        if not missing:
            break
        # it has a box for each
        if "last resort" in family.lower() or "lastresort" in family.lower():
            continue
        try:
            font = ft2font.FT2Font(path)
            found = {c for c in missing if font.get_char_index(ord(c))} if font.scalable else set()
        except (OSError, RuntimeError):  # listed, but gone or of a kind that cannot be drawn
            continue
        if found:
            missing -= found
            families += [family] if family not in families else []
    return families, missing


def _figure(runs: Sequence[Run], languages: Sequence[str], letters: _Letters) -> Any:
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
    part: Any, runs: Sequence[Run], languages: Sequence[str], letters: _Letters, columns: int
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
        _legend(part, of_runs, loc="outside upper center", ncol=1, handlelength=5)


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
    axis: Any, runs: Sequence[Run], languages: Sequence[str], letters: _Letters, columns: int
) -> None:
    """The reward gap of each language; after ten of them colours come again, with marks."""
    from matplotlib.lines import Line2D

    looks: dict[str, dict[str, Any]] = {}
    for number, language in enumerate(languages):
        mark = MARKERS[number // 10 % len(MARKERS)] if len(languages) > 10 else None
        looks[language] = {"color": f"C{number % 10}", "marker": mark}
    for place, run in enumerate(runs):
        for language, look in looks.items():
            points = [(row["step"], _number(row["gap"].get(language))) for row in run.rows]
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
    points = [(row["step"], _number(row.get(key))) for row in run.rows]
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


def _legend(where: Any, entries: dict[str, Any], **options: Any) -> None:
    """A legend whose texts are texts: no formula between two dollar signs, and none that is left
    out for beginning with an underscore."""
    legend = where.legend(
        list(entries.values()),
        [str(place) for place in range(len(entries))],
        fontsize=8,
        frameon=False,
        **options,
    )
    for text, name in zip(legend.get_texts(), entries, strict=True):
        text.set(text=name, parse_math=False)


def _legend_below(axis: Any, entries: dict[str, Any], columns: int) -> None:
    """A legend under an axis of steps, which are whole numbers."""
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5}
    _legend(axis, entries, ncol=columns, **place)


def _draw_result(part: Any, run: Run, letters: _Letters, named: bool) -> None:
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
        height = _number(result["all"]["dominant_gap"][moment])
        gaps.axhline(height, color="#d62728", linestyle=style, label=f"dominant {moment}")
    handles, labels = gaps.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncol": 4}
    part.legend(handles, labels, frameon=False, fontsize=8, **place)


def _bars(axis: Any, pairs: dict[str, dict[str, Any]], letters: _Letters) -> None:
    """Two bars for each language, whose names are turned where they would touch."""
    places = range(len(pairs))
    for shift, moment, colour in ((-0.2, "before", "#b8bfc9"), (0.2, "after", "#1f77b4")):
        heights = [_number(pair[moment]) for pair in pairs.values()]
        axis.bar([place + shift for place in places], heights, 0.4, label=moment, color=colour)
    longest = max(map(letters.width, pairs), default=0)
    turned: dict[str, Any] = {}
    if len(pairs) * (1 + longest) > 55:
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    labels = [letters.of(language, CODE) for language in pairs]
    axis.set_xticks(places, labels, parse_math=False, **turned)
    axis.set_xlim(-0.6, max(len(pairs), 3) - 0.4)


def _number(value: Any) -> float:
    """What is no number is not drawn: JSON has null for one that is not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
