"""What is in the data: counts and lengths per language, rows that look wrong, and a view of what is
scored."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mpo.config import Config
from mpo.data.detection import LanguageDetector, clearly_in_another, told_apart
from mpo.data.examples import Answers, Example, decode_view, remarks
from mpo.data.rows import Pair, Row
from mpo.languages import is_known, script_share, scripts_of
from mpo.models.inputs import Prepared
from mpo.runtime.terminal import show_table

SHORTEST, LONGEST = 0.2, 6.0
"""Target tokens over dominant tokens outside of which a translation is probably cut or padded.
Byte-level vocabularies inflate scripts."""
LISTED = 20
"""Suspicious rows that are printed; JSON has all."""


def examine(config: Config, prepared: Prepared) -> dict[str, Any]:
    """The report as JSON: `languages` and, of data.eval, `held_out` (counts and lengths per
    language), `dominant_pairs`, `dropped` (reason: rows), `suspicious` ([{source, reason,
    detail}]), `views`.
    """
    examples = prepared.examples
    every = [*examples, *prepared.held_out]
    return {
        "languages": _of_each_language(examples, config.data.max_length),
        "held_out": _of_each_language(prepared.held_out, config.data.max_length),
        "dominant_pairs": len({e.dominant for e in examples}),
        "dropped": dict(Counter(row.reason for row in prepared.dropped).most_common()),
        "suspicious": (
            [
                {"source": example.source, "reason": reason, "detail": detail}
                for example in every
                for reason, detail in (
                    *_suspicions(example, config),
                    *remarks(example, prepared.tokenizer),
                )
            ]
            + _repeated([e.row for e in examples], [e.row for e in prepared.held_out])
            + _unknown_languages([e.row for e in every])
        ),
        "views": [_view(e, prepared.tokenizer) for e in _first_of_each_language(examples)],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    shared = (
        f"Training rows, sharing {report['dominant_pairs']} dominant pairs; lengths in tokens of"
        " prompt and answer"
    )
    for title, languages in ((shared, report["languages"]), ("Held-out rows", report["held_out"])):
        if not languages:
            continue
        table = Table(title=title)
        table.add_column("language")
        for name in (
            "rows",
            "target p50",
            "p95",
            "longest",
            "dominant p50",
            "p95",
            "scored p50",
            "cut",
        ):
            table.add_column(name, justify="right")
        for language, row in languages.items():
            lengths = [
                row["target"]["p50"],
                row["target"]["p95"],
                row["target"]["max"],
                row["dominant"]["p50"],
                row["dominant"]["p95"],
            ]
            table.add_row(
                language,
                str(row["rows"]),
                *map(str, lengths),
                str(row["scored"]["p50"]),
                str(row["cut"]),
            )
        show_table(table, console)
    if report["dropped"]:
        console.print(
            "Dropped: "
            + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()),
            markup=False,
        )
    reasons = Counter(item["reason"] for item in report["suspicious"])
    console.print(
        "Suspicious: "
        + (
            ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            if reasons
            else "none"
        ),
        markup=False,
    )
    for item in report["suspicious"][:LISTED]:
        console.print(
            f"  {item['source']}: {item['reason']}: {item['detail']}", markup=False, soft_wrap=True
        )
    if len(report["suspicious"]) > LISTED:
        console.print(
            f"  ... and {len(report['suspicious']) - LISTED} more; --json lists all", markup=False
        )
    for view in report["views"]:
        console.print(
            f"\nWhat the model sees and what is scored, {view['language']}, {view['source']}",
            style="bold",
            markup=False,
        )
        for kind in ("chosen", "rejected"):
            prompt, scored = view[kind]
            console.print(
                f"{kind}: {prompt}", end="", markup=False, highlight=False, soft_wrap=True
            )
            console.print(scored, style="reverse", markup=False, highlight=False, soft_wrap=True)


def _suspicions(example: Example, config: Config) -> Iterator[tuple[str, str]]:
    row = example.row
    for side, pair in (("dominant", row.dominant), ("target", row.target)):
        for place, text in _texts(pair):
            if html.unescape(text) != text:
                yield "html_entities", f"the {side} {place} holds escaped characters such as &quot;"
    for place, text in _texts(row.target):
        share = script_share(text, row.language)
        if share < 0.5:
            yield (
                "wrong_script",
                f"{share:.0%} of the target {place}'s letters are of the script of {row.language}",
            )
    for place, mine, theirs in zip(
        ("prompt", "chosen", "rejected"), _all(row.target), _all(row.dominant), strict=True
    ):
        if mine.strip() == theirs.strip():
            yield "untranslated", f"the target {place} is the dominant one, word for word"
    dominant = config.data.dominant_language
    for side, language, pair in (
        ("dominant", dominant, row.dominant),
        ("target", row.language, row.target),
    ):
        if (found := clearly_in_another(language, *pair.texts())) is not None:
            yield "wrong_language", f"the {side} texts read as {found}, not as {language}"
    if scripts_of(row.language) == scripts_of(dominant) and told_apart(row.language, dominant):
        for place in ("chosen", "rejected"):
            if (
                LanguageDetector((row.language,), dominant).detect(getattr(row.target, place))
                == dominant
            ):
                yield "untranslated", f"the target {place} reads as {dominant}"
    for kind, *answers in zip(Answers._fields, example.target, example.dominant, strict=True):
        target, other = (len(answer.input_ids) - answer.response_start for answer in answers)
        ratio = target / other
        if not SHORTEST <= ratio <= LONGEST:
            yield (
                "length_ratio",
                f"the target {kind} answer has {ratio:.2f} times the tokens of the dominant one",
            )


def _unknown_languages(rows: Sequence[Row]) -> list[dict[str, str]]:
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.language, row.source)
    detail = "is no language that is known here, so neither its script nor its texts are checked"
    return [
        {"source": source, "reason": "unknown_language", "detail": f"{language!r} {detail}"}
        for language, source in first.items()
        if not is_known(language)
    ]


def _repeated(rows: Sequence[Row], held_out: Sequence[Row]) -> list[dict[str, str]]:
    found = []
    first: dict[tuple, str] = {}
    trained = {(row.language, row.target): row.source for row in reversed(rows)}
    for row in (*rows, *held_out):
        key = (row.language, row.target)
        # a weighted source repeats its own rows on purpose
        if first.setdefault(key, row.source) != row.source:
            found.append(
                {
                    "source": row.source,
                    "reason": "repeated",
                    "detail": f"the same target pair as {first[key]}",
                }
            )
    for row in held_out:
        if (source := trained.get((row.language, row.target))) is not None:
            found.append(
                {
                    "source": row.source,
                    "reason": "held_out_row_is_trained_on",
                    "detail": f"data.train has it too, as {source}",
                }
            )
    return found


def _texts(pair: Pair) -> Iterator[tuple[str, str]]:
    yield from zip(("prompt", "chosen answer", "rejected answer"), _all(pair), strict=True)


def _all(pair: Pair) -> tuple[str, str, str]:
    return pair.prompt[-1].content, pair.chosen, pair.rejected


def _of_each_language(examples: Sequence[Example], limit: int) -> dict[str, Any]:
    return {
        name: _lengths([e for e in examples if e.language == name], limit)
        for name in sorted({e.language for e in examples})
    }


def _lengths(examples: Sequence[Example], limit: int) -> dict[str, Any]:
    targets = [s for e in examples for s in e.target]
    dominants = [s for e in examples for s in e.dominant]
    return {
        "rows": len(examples),
        "target": _percentiles([len(s.input_ids) for s in targets]),
        "dominant": _percentiles([len(s.input_ids) for s in dominants]),
        "scored": _percentiles([len(s.input_ids) - s.response_start for s in targets]),
        "cut": sum(len(s.input_ids) == limit for s in [*targets, *dominants]),
    }


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    points = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": int(points.quantile(p / 100, interpolation="lower")) for p in (5, 50, 95)} | {
        "max": max(values)
    }


def _first_of_each_language(examples: Sequence[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.language, example)
    return list(first.values())


def _view(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "source": example.source,
        "language": example.language,
        "chosen": decode_view(example.target.chosen, tokenizer),
        "rejected": decode_view(example.target.rejected, tokenizer),
    }
