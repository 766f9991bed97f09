"""What a run achieved: a table per language, as numbers, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mpo.errors import UserError
from mpo.files import read_json
from mpo.output_folder import read_metrics
from mpo.scoring import Gaps
from mpo.terminal import show_table
from mpo.tokenizing import Example


def summarise(examples: Sequence[Example], before: Gaps, after: Gaps, beta: float) -> dict[str, Any]:
    """The result of a run on the measured rows.

    All gaps are in nats per token. Per language and over all rows (`all`):
        n                 rows
        target_gap        mean reward gap of the target pairs, before and after
        dominant_gap      mean reward gap of their dominant pairs, before and after
        distance          mean |beta * target gap - dominant gap before|, what L1 brings down, before and after
        sign_accuracy     share of target pairs whose chosen response is the likelier one, before and after
    `l2`: mean squared change of the dominant pooled hidden states; `l2_relative`: the same over their mean square before.
    """
    languages = sorted({e.language for e in examples})

    def row(places: list[int]) -> dict[str, Any]:
        def pair(of: Any) -> dict[str, float]:
            return {"before": float(of(before)), "after": float(of(after))}

        return {
            "n": len(places),
            "target_gap": pair(lambda g: g.target[places].mean()),
            "dominant_gap": pair(lambda g: g.dominant[places].mean()),
            "distance": pair(lambda g: (beta * g.target[places] - before.dominant[places]).abs().mean()),
            "sign_accuracy": pair(lambda g: (g.target[places] > 0).float().mean()),
        }

    change = (after.pooled - before.pooled).square().mean()
    return {
        "beta": beta,
        "languages": {language: row([i for i, e in enumerate(examples) if e.language == language]) for language in languages},
        "all": row(list(range(len(examples)))),
        "l2": float(change),
        "l2_relative": float(change / before.pooled.square().mean()),
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    """The result per language; every pair of numbers is before -> after."""
    table = Table(title=f"Reward gaps on the measured rows, before → after (nats per token, beta {result['beta']:g})")
    table.add_column("language")
    for name in ("rows", "target gap", "dominant gap", "distance", "sign accuracy"):
        table.add_column(name, justify="right")

    def pair(values: dict[str, float], style: str) -> str:
        return f"{values['before']:{style}} → {values['after']:{style}}"

    rows = [*result["languages"].items(), ("all", result["all"])]
    for place, (language, row) in enumerate(rows):
        table.add_row(
            language,
            str(row["n"]),
            pair(row["target_gap"], "+.3f"),
            pair(row["dominant_gap"], "+.3f"),
            pair(row["distance"], ".3f"),
            pair(row["sign_accuracy"], ".0%"),
            end_section=place == len(rows) - 2,
        )
    show_table(table, console)
    console.print(f"Dominant representation: L2 {result['l2']:.2e}, {result['l2_relative']:.2%} of its mean square.", markup=False)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """As much of the end of each path as tells it from the others: `a/model` and `b/model`."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Writes a PNG of one run or several: losses and gaps over the steps, and of finished ones the gaps before and after.

    Raises:
        UserError: a folder has no metrics.
    """
    runs = {}
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} has no metrics.jsonl: it is no run's folder, or its first step is not done.")
        result = folder / "result.json"
        runs[folder.name] = read_metrics(folder / "metrics.jsonl"), read_json(result) if result.is_file() else None
    _draw(runs, path)


def plot(metrics: Path, result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of a finished run."""
    _draw({metrics.parent.name: (read_metrics(metrics), result)}, path)


def _draw(runs: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]], path: Path) -> None:
    """Loss curves, gaps per language over the steps, and for each finished run gaps and distances per language before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    finished = {name: result for name, (_, result) in runs.items() if result is not None}
    figure, axes = plt.subplots(1 + len(finished), 2, figsize=(12, 4.2 * (1 + len(finished))), layout="constrained", squeeze=False)
    curves, languages_axis = axes[0]
    styles = ("-", "--", ":", "-.")
    languages = sorted({language for rows, _ in runs.values() for row in rows for language in row["gap"]})
    for place, (name, (rows, _)) in enumerate(runs.items()):
        style, prefix = styles[place % len(styles)], f"{name}: " if len(runs) > 1 else ""
        steps = [row["step"] for row in rows]
        for colour, (key, label) in enumerate((("loss", "loss"), ("l1", "L1 (gap)"), ("l2", "L2 (retention)"))):
            values = [row[key] or math.nan for row in rows]
            curves.plot(steps, values, style, color=f"C{colour}", label=prefix + label, linewidth=2 if key == "loss" else 1.2)
        for colour, language in enumerate(languages):
            points = [(row["step"], row["gap"][language]) for row in rows if language in row["gap"]]
            if points:
                languages_axis.plot(*zip(*points, strict=True), style, color=f"C{colour}", label=prefix + language, linewidth=1.2)
    curves.set(xlabel="optimizer step", ylabel="loss", title="Training loss", yscale="log")
    languages_axis.set(xlabel="optimizer step", ylabel="nats per token", title="Reward gap of each step's rows")
    for axis in (curves, languages_axis):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, ncol=2)
    for (gaps, distances), (name, result) in zip(axes[1:], finished.items(), strict=True):
        _draw_result(gaps, distances, result, f" ({name})" if len(finished) > 1 else "")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_result(gaps: Any, distances: Any, result: dict[str, Any], suffix: str) -> None:
    languages = list(result["languages"])
    places = torch.arange(len(languages)).numpy()
    colours = {"before": "#b8bfc9", "after": "#1f77b4"}
    for axis, quantity, title in (
        (gaps, "target_gap", "Reward gap per language"),
        (distances, "distance", "Distance to the dominant gap"),
    ):
        for shift, moment in ((-0.2, "before"), (0.2, "after")):
            heights = [result["languages"][language][quantity][moment] for language in languages]
            axis.bar(places + shift, heights, 0.4, label=moment, color=colours[moment])
        axis.set_xticks(places, languages)
        axis.set(ylabel="nats per token", title=title + suffix)
        axis.axhline(0, color="black", linewidth=0.8)
    for moment, style in (("before", ":"), ("after", "-")):
        gaps.axhline(result["all"]["dominant_gap"][moment], color="#d62728", linestyle=style, label=f"dominant {moment}")
    for axis in (gaps, distances):
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=4, frameon=False, fontsize=8)
