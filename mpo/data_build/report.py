"""What a build did: rows in and out, what was dropped for each language and reason, and
examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo.data.rows import Finding, Pair
from mpo.runtime.terminal import show_table

EXAMPLES = 3
"""Dropped rows of each reason that the report shows."""


@dataclass(frozen=True)
class Dropped:
    """A row that is left out in one language."""

    id: str
    language: str
    finding: Finding
    dominant: Pair
    target: Pair | None
    """None where there is no translation."""

    def as_dict(self) -> dict[str, Any]:
        """As it is written beside the rows."""
        return {
            "id": self.id,
            "source": self.finding.source,
            "language": self.language,
            "reason": self.finding.reason,
            "detail": self.finding.detail,
            "dominant": self.dominant.model_dump(),
            "target": None if self.target is None else self.target.model_dump(),
        }


@dataclass(frozen=True)
class LanguageCounts:
    """What became of the rows in one language."""

    rows: int
    dropped: dict[str, int]
    """How many for each reason."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    For each language rows_in = rows + the sum of what it dropped + the sum of bad_input.
    """

    rows_in: int
    bad_input: dict[str, int]
    """How many rows of the input could not be used, for each reason."""
    languages: dict[str, LanguageCounts]
    examples: dict[str, list[dict[str, str]]]
    """Some left-out rows of each reason."""
    output: str
    translated: int
    """Texts translated now."""
    translations_kept: int
    """Texts that the journal had."""
    trimmed: int
    """Rows of the input that lost white space around an answer."""
    build: dict[str, Any]
    """What makes it this build."""

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it and the file beside the rows has it."""
        return asdict(self)


def counts_of(
    languages: Sequence[str], rows: Sequence[dict[str, Any]], dropped: Sequence[Dropped]
) -> dict[str, LanguageCounts]:
    """What became of the rows in each language."""
    return {
        language: LanguageCounts(
            sum(row["language"] == language for row in rows),
            counted(row.finding for row in dropped if row.language == language),
        )
        for language in languages
    }


def examples_of(
    bad: Sequence[Finding], dropped: Sequence[Dropped]
) -> dict[str, list[dict[str, str]]]:
    """The first rows of each reason."""
    shown = [(f.reason, {"source": f.source, "detail": f.detail}) for f in bad]
    for row in dropped:
        found = row.finding
        place = {"id": row.id, "source": found.source, "language": row.language}
        shown.append((found.reason, {**place, "detail": found.detail}))
    examples: dict[str, list[dict[str, str]]] = {}
    for reason, row_shown in shown:
        of_reason = examples.setdefault(reason, [])
        if len(of_reason) < EXAMPLES:
            of_reason.append(row_shown)
    return examples


def counted(findings: Iterable[Finding]) -> dict[str, int]:
    """How many for each reason, the most frequent first."""
    return dict(Counter(finding.reason for finding in findings).most_common())


def show(report: BuildReport, console: Console) -> None:
    """The report for people."""
    table = Table(title=f"{report.output}: from {report.rows_in} preference rows")
    table.add_column("language")
    for name in ("rows", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for language, of in report.languages.items():
        dropped = sum(of.dropped.values())
        table.add_row(language, str(of.rows), str(dropped), _in_words(of.dropped))
    show_table(table, console)
    if report.bad_input:
        console.print(f"Bad input: {_in_words(report.bad_input)}", markup=False)
    for reason, examples in report.examples.items():
        for row in examples:
            where = f"{row['id']} {row['language']}" if "id" in row else row["source"]
            console.print(f"  {reason}: {where}: {row['detail']}", markup=False, soft_wrap=True)
    if report.trimmed:
        console.print(
            f"White space around answers was taken off in {report.trimmed} rows of the input.",
            markup=False,
        )
    console.print(
        f"Texts translated: {report.translated} now, {report.translations_kept} before. Report and"
        " dropped rows lie beside the rows.",
        markup=False,
    )


def _in_words(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
