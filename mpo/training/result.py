"""What a run achieved: a table per language, as numbers and as JSON. The picture is drawn by
`mpo.training.curves`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo.data.examples import Example
from mpo.models.scoring import Measurement, sign_accuracy
from mpo.runtime.errors import UserError
from mpo.runtime.files import read_object
from mpo.runtime.terminal import distinct_names, show_table
from mpo.training import curves as picture
from mpo.training.run_folder import OutputFolder, read_metrics


def summarise(
    examples: Sequence[Example], before: Measurement, after: Measurement, beta: float
) -> dict[str, Any]:
    """The result of a run on the measured rows.

    All gaps are in nats per token. Per language and over all rows (`all`):
        n                 rows
        target_gap        mean reward gap of the target pairs, before and after
        dominant_gap      mean reward gap of their dominant pairs, before and after
        distance          mean |beta * target gap - dominant gap before|, what L1 brings down, before and after
        sign_accuracy     share of target pairs whose chosen response is the likelier one, before and after
    `l2`: mean squared change of the dominant pooled hidden states; `l2_relative`: the same over
    their mean square before.
    """
    languages = sorted({e.language for e in examples})

    def row(places: list[int]) -> dict[str, Any]:
        def pair(of: Any) -> dict[str, float]:
            return {"before": float(of(before)), "after": float(of(after))}

        return {
            "n": len(places),
            "target_gap": pair(lambda g: g.target[places].mean()),
            "dominant_gap": pair(lambda g: g.dominant[places].mean()),
            "distance": pair(
                lambda g: (beta * g.target[places] - before.dominant[places]).abs().mean()
            ),
            "sign_accuracy": pair(lambda g: sign_accuracy(g.target[places])),
        }

    change = (after.pooled - before.pooled).square().mean()
    return {
        "beta": beta,
        "languages": {
            language: row([i for i, e in enumerate(examples) if e.language == language])
            for language in languages
        },
        "all": row(list(range(len(examples)))),
        "l2": float(change),
        "l2_relative": float(change / before.pooled.square().mean()),
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    """The result per language; every pair of numbers is before -> after."""
    table = Table(
        title=(
            "Reward gaps on the measured rows, before → after (nats per token, beta"
            f" {result['beta']:g})"
        )
    )
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
    console.print(
        f"Dominant representation: L2 {result['l2']:.2e}, {result['l2_relative']:.2%} of its mean"
        " square.",
        markup=False,
    )


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Writes a picture of one run or several: losses and gaps over the steps, and of finished ones
    the gaps before and after.

    Raises:
        UserError: a folder has no metrics, or damaged ones; `path` names no format, or cannot be
            written.
    """
    picture.check_target(path)
    different = list({os.path.realpath(folder): folder for folder in folders}.values())
    names = distinct_names([str(folder) for folder in different])
    picture.draw(
        [_run(name, OutputFolder(folder)) for name, folder in zip(names, different, strict=True)],
        path,
    )


def plot(metrics: Path, result: dict[str, Any], path: Path) -> None:
    """Writes a picture of a finished run, without its curves where `metrics` was lost."""
    picture.draw(
        [
            picture.Run(
                metrics.parent.name, read_metrics(metrics) if metrics.exists() else [], result
            )
        ],
        path,
    )


def _run(name: str, folder: OutputFolder) -> picture.Run:
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
    return picture.Run(name, rows, result)


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
