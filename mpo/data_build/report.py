"""What a build did: rows in and out, what was dropped for each language and reason, and
examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo.runtime.terminal import show_table

EXAMPLES = 3
"""Dropped rows of each reason that the report shows."""


def make_report(
    rows_in: int,
    rows: Sequence[dict[str, Any]],
    dropped: Sequence[dict[str, Any]],
    languages: Sequence[str],
    work: dict[str, Any],
) -> dict[str, Any]:
    """The report as JSON: `rows_in`, `bad_input` (reason: rows), `languages` ({code: {rows,
    dropped: {reason: rows}}}), `examples`, and the fields of `work`.

    For each language rows_in = rows + the sum of what it dropped + the sum of bad_input.
    """
    examples: dict[str, list[dict[str, Any]]] = {}
    for row in dropped:
        shown = examples.setdefault(row["reason"], [])
        if len(shown) < EXAMPLES:
            shown.append(
                {name: row[name] for name in ("id", "source", "language", "detail") if name in row}
            )
    return {
        "rows_in": rows_in,
        "bad_input": _counted(row for row in dropped if "language" not in row),
        "languages": {
            language: {
                "rows": sum(row["language"] == language for row in rows),
                "dropped": _counted(row for row in dropped if row.get("language") == language),
            }
            for language in languages
        },
        "examples": examples,
        **work,
    }


def _counted(rows: Any) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in rows).most_common())


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table(title=f"{report['output']}: from {report['rows_in']} preference rows")
    table.add_column("language")
    for name in ("rows", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for language, row in report["languages"].items():
        why = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
        table.add_row(language, str(row["rows"]), str(sum(row["dropped"].values())), why)
    show_table(table, console)
    if report["bad_input"]:
        console.print(
            "Bad input: "
            + ", ".join(f"{count} {reason}" for reason, count in report["bad_input"].items()),
            markup=False,
        )
    for reason, examples in report["examples"].items():
        for row in examples:
            where = (
                " ".join(row[name] for name in ("id", "language") if name in row) or row["source"]
            )
            console.print(f"  {reason}: {where}: {row['detail']}", markup=False, soft_wrap=True)
    if report["trimmed"]:
        console.print(
            f"White space around answers was taken off in {report['trimmed']} rows of the input.",
            markup=False,
        )
    made, kept = report["translated"], report["translations_kept"]
    console.print(
        f"Texts translated: {made} now, {kept} before. Report and dropped rows lie beside the"
        " rows.",
        markup=False,
    )
