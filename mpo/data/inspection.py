"""What is in the data: counts and lengths per language, rows that look wrong, and a view of what is
scored."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mpo.config import DataConfig
from mpo.data.detection import LanguageDetector, clearly_in_another, told_apart
from mpo.data.examples import Answers, Example, ExampleSet, decode_view, remarks
from mpo.data.rows import Finding, Pair, Row
from mpo.languages import is_known, script_share, scripts_of
from mpo.runtime.terminal import show_table

SHORTEST, LONGEST = 0.2, 6.0
"""Target tokens over dominant tokens outside of which a translation is probably cut or padded.
Byte-level vocabularies inflate scripts."""
LISTED = 20
"""Suspicious rows that are printed; JSON has all."""


@dataclass(frozen=True)
class Percentiles:
    """Of numbers of tokens."""

    p5: int
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class Lengths:
    """Rows of one language, and the tokens of their sequences."""

    rows: int
    target: Percentiles
    dominant: Percentiles
    scored: Percentiles
    """Tokens of the target answers alone."""
    cut: int
    """Sequences that data.max_length cut, or that just fit."""


@dataclass(frozen=True)
class View:
    """The target pair of one row as a model sees it: (prompt, scored text) of each answer."""

    source: str
    language: str
    chosen: tuple[str, str]
    rejected: tuple[str, str]


@dataclass(frozen=True)
class Inspection:
    """What `mpo validate` says."""

    languages: dict[str, Lengths]
    """Of the training rows."""
    held_out: dict[str, Lengths]
    """Of data.eval."""
    dominant_pairs: int
    """Different ones that the training rows share."""
    dropped: dict[str, int]
    """How many rows were left out for each reason."""
    suspicious: list[Finding]
    views: list[View]
    """The first training row of each language."""

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def inspect(
    examples: ExampleSet, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Inspection:
    """Looks at every row.

    inputs = load_inputs(config, print)
    inspect(inputs.examples, inputs.tokenizer, config.data).suspicious
    """
    rows = [e.row for e in examples.every()]
    suspicious = [
        *(
            finding
            for example in examples.every()
            for finding in (
                *_suspicions(example, config.dominant_language),
                *remarks(example, tokenizer),
            )
        ),
        *_repeated(rows),
        *_trained_on([e.row for e in examples.train], [e.row for e in examples.held_out]),
        *_unknown_languages(rows),
    ]
    return Inspection(
        languages=_of_each_language(examples.train, config.max_length),
        held_out=_of_each_language(examples.held_out, config.max_length),
        dominant_pairs=len({e.dominant for e in examples.train}),
        dropped=dict(Counter(row.reason for row in examples.dropped).most_common()),
        suspicious=suspicious,
        views=[_view(e, tokenizer) for e in _first_of_each_language(examples.train)],
    )


def _suspicions(example: Example, dominant: str) -> Iterator[Finding]:
    """What looks wrong in one row; `dominant` is the language of the dominant side."""
    row = example.row
    for reason, detail in (
        *_html_entities(row),
        *_wrong_scripts(row),
        *_copied(row),
        *_wrong_languages(row, dominant),
        *_read_as_dominant(row, dominant),
        *_length_ratios(example),
    ):
        yield Finding(row.source, reason, detail)


def _html_entities(row: Row) -> Iterator[tuple[str, str]]:
    for side, pair in row.pairs():
        for place, text in _places(pair):
            if html.unescape(text) != text:
                yield "html_entities", f"the {side} {place} holds escaped characters such as &quot;"


def _wrong_scripts(row: Row) -> Iterator[tuple[str, str]]:
    for place, text in _places(row.target):
        share = script_share(text, row.language)
        if share < 0.5:
            yield (
                "wrong_script",
                f"{share:.0%} of the target {place}'s letters are of the script of {row.language}",
            )


def _copied(row: Row) -> Iterator[tuple[str, str]]:
    for place, mine, theirs in zip(
        ("prompt", "chosen", "rejected"),
        _last_texts(row.target),
        _last_texts(row.dominant),
        strict=True,
    ):
        if mine.strip() == theirs.strip():
            yield "untranslated", f"the target {place} is the dominant one, word for word"


def _wrong_languages(row: Row, dominant: str) -> Iterator[tuple[str, str]]:
    for side, language, pair in (
        ("dominant", dominant, row.dominant),
        ("target", row.language, row.target),
    ):
        if (found := clearly_in_another(language, *pair.texts())) is not None:
            yield "wrong_language", f"the {side} texts read as {found}, not as {language}"


def _read_as_dominant(row: Row, dominant: str) -> Iterator[tuple[str, str]]:
    """Single answers, where the script alone does not tell."""
    if scripts_of(row.language) != scripts_of(dominant) or not told_apart(row.language, dominant):
        return
    for place, text in (("chosen", row.target.chosen), ("rejected", row.target.rejected)):
        if LanguageDetector((row.language,), dominant).detect(text) == dominant:
            yield "untranslated", f"the target {place} reads as {dominant}"


def _length_ratios(example: Example) -> Iterator[tuple[str, str]]:
    for kind, *answers in zip(Answers._fields, example.target, example.dominant, strict=True):
        target, dominant = (len(answer.response) for answer in answers)
        ratio = target / dominant
        if not SHORTEST <= ratio <= LONGEST:
            yield (
                "length_ratio",
                f"the target {kind} answer has {ratio:.2f} times the tokens of the dominant one",
            )


def _unknown_languages(rows: Sequence[Row]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.language, row.source)
    for language, source in first.items():
        if not is_known(language):
            yield Finding(
                source,
                "unknown_language",
                f"{language!r} is no language that is known here, so neither its script nor its"
                " texts are checked",
            )


def _repeated(rows: Sequence[Row]) -> Iterator[Finding]:
    first: dict[tuple[str, Pair], str] = {}
    for row in rows:
        source = first.setdefault((row.language, row.target), row.source)
        if source != row.source:  # a weighted source repeats its own rows on purpose
            yield Finding(row.source, "repeated", f"the same target pair as {source}")


def _trained_on(train: Sequence[Row], held_out: Sequence[Row]) -> Iterator[Finding]:
    trained = {(row.language, row.target): row.source for row in reversed(train)}
    for row in held_out:
        if (source := trained.get((row.language, row.target))) is not None:
            yield Finding(
                row.source, "held_out_row_is_trained_on", f"data.train has it too, as {source}"
            )


def _places(pair: Pair) -> Iterator[tuple[str, str]]:
    yield from zip(("prompt", "chosen answer", "rejected answer"), _last_texts(pair), strict=True)


def _last_texts(pair: Pair) -> tuple[str, str, str]:
    """The last message, and both answers."""
    return pair.prompt[-1].content, pair.chosen, pair.rejected


def _of_each_language(examples: Sequence[Example], limit: int) -> dict[str, Lengths]:
    return {
        name: _lengths([e for e in examples if e.language == name], limit)
        for name in sorted({e.language for e in examples})
    }


def _lengths(examples: Sequence[Example], limit: int) -> Lengths:
    targets = [s for e in examples for s in e.target]
    dominants = [s for e in examples for s in e.dominant]
    return Lengths(
        rows=len(examples),
        target=_percentiles([len(s.input_ids) for s in targets]),
        dominant=_percentiles([len(s.input_ids) for s in dominants]),
        scored=_percentiles([len(s.response) for s in targets]),
        cut=sum(len(s.input_ids) == limit for s in [*targets, *dominants]),
    )


def _percentiles(values: Sequence[int]) -> Percentiles:
    points = torch.tensor(values, dtype=torch.float64)
    p5, p50, p95 = (int(points.quantile(p / 100, interpolation="lower")) for p in (5, 50, 95))
    return Percentiles(p5, p50, p95, max(values))


def _first_of_each_language(examples: Sequence[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.language, example)
    return list(first.values())


def _view(example: Example, tokenizer: PreTrainedTokenizerBase) -> View:
    return View(
        example.source,
        example.language,
        chosen=decode_view(example.target.chosen, tokenizer),
        rejected=decode_view(example.target.rejected, tokenizer),
    )


def show(report: Inspection, console: Console) -> None:
    """The report for people."""
    for title, languages in (
        (
            f"Training rows, sharing {report.dominant_pairs} dominant pairs; lengths in tokens of"
            " prompt and answer",
            report.languages,
        ),
        ("Held-out rows", report.held_out),
    ):
        if languages:
            show_table(_table(title, languages), console)
    if report.dropped:
        console.print(f"Dropped: {_counted(report.dropped)}", markup=False)
    _show_suspicious(report.suspicious, console)
    for view in report.views:
        _show_view(view, console)


def _table(title: str, languages: dict[str, Lengths]) -> Table:
    table = Table(title=title)
    table.add_column("language")
    lengths = ("target p50", "p95", "longest", "dominant p50", "p95", "scored p50")
    for name in ("rows", *lengths, "cut"):
        table.add_column(name, justify="right")
    for language, row in languages.items():
        values = (
            row.rows,
            *(row.target.p50, row.target.p95, row.target.max),
            *(row.dominant.p50, row.dominant.p95),
            row.scored.p50,
            row.cut,
        )
        table.add_row(language, *map(str, values))
    return table


def _show_suspicious(findings: Sequence[Finding], console: Console) -> None:
    reasons = dict(Counter(finding.reason for finding in findings).most_common())
    console.print(f"Suspicious: {_counted(reasons) or 'none'}", markup=False)
    for finding in findings[:LISTED]:
        console.print(
            f"  {finding.source}: {finding.reason}: {finding.detail}", markup=False, soft_wrap=True
        )
    if len(findings) > LISTED:
        console.print(f"  ... and {len(findings) - LISTED} more; --json lists all", markup=False)


def _show_view(view: View, console: Console) -> None:
    console.print(
        f"\nWhat the model sees and what is scored, {view.language}, {view.source}",
        style="bold",
        markup=False,
    )
    for kind, (prompt, scored) in (("chosen", view.chosen), ("rejected", view.rejected)):
        console.print(f"{kind}: {prompt}", end="", markup=False, highlight=False, soft_wrap=True)
        console.print(scored, style="reverse", markup=False, highlight=False, soft_wrap=True)


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
