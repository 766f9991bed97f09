"""What is in the data: counts and lengths per language, rows that look wrong, and a view of what is scored."""

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
from mpo.data import Pair, Row
from mpo.language import LanguageDetector
from mpo.language_table import SCRIPTS, script_share
from mpo.prepare import Prepared
from mpo.tokenizing import Example, decode_view

SHORTEST, LONGEST = 0.2, 6.0
"""Target tokens over dominant tokens outside of which a translation is probably cut or padded. Byte-level vocabularies inflate scripts."""
LISTED = 20
"""Suspicious rows that are printed; JSON has all."""


def examine(config: Config, prepared: Prepared) -> dict[str, Any]:
    """The report as JSON: `languages`, `dominant_pairs`, `dropped` (reason: rows), `suspicious` ([{source, reason, detail}]), `views`."""
    examples = prepared.examples
    languages = {
        language: _lengths([e for e in examples if e.language == language], config.data.max_length)
        for language in sorted({e.language for e in examples})
    }
    sources = {e.source for e in examples}
    rows = [row for row in prepared.rows if row.source in sources]
    return {
        "languages": languages,
        "dominant_pairs": len({(e.dominant_chosen, e.dominant_rejected) for e in examples}),
        "dropped": dict(Counter(row.reason for row in prepared.dropped).most_common()),
        "suspicious": [
            {"source": row.source, "reason": reason, "detail": detail}
            for row, example in zip(rows, examples, strict=True)
            for reason, detail in _suspicions(row, example, config)
        ]
        + _repeated(rows),
        "views": [_view(e, prepared.tokenizer) for e in _first_of_each_language(examples)],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    table = Table(title=f"Training rows, sharing {report['dominant_pairs']} dominant pairs; lengths in tokens of prompt and answer")
    table.add_column("language")
    for name in ("rows", "target p50", "p95", "longest", "dominant p50", "p95", "scored p50", "cut"):
        table.add_column(name, justify="right")
    for language, row in report["languages"].items():
        lengths = [row["target"]["p50"], row["target"]["p95"], row["target"]["max"], row["dominant"]["p50"], row["dominant"]["p95"]]
        table.add_row(language, str(row["rows"]), *map(str, lengths), str(row["scored"]["p50"]), str(row["cut"]))
    console.print(table)
    if report["dropped"]:
        console.print("Dropped: " + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()), markup=False)
    reasons = Counter(item["reason"] for item in report["suspicious"])
    console.print(
        "Suspicious: " + (", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) if reasons else "none"), markup=False
    )
    for item in report["suspicious"][:LISTED]:
        console.print(f"  {item['source']}: {item['reason']}: {item['detail']}", markup=False, soft_wrap=True)
    if len(report["suspicious"]) > LISTED:
        console.print(f"  ... and {len(report['suspicious']) - LISTED} more; --json lists all", markup=False)
    for view in report["views"]:
        console.print(f"\nWhat the model sees and what is scored, {view['language']}, {view['source']}", style="bold", markup=False)
        for kind in ("chosen", "rejected"):
            prompt, scored = view[kind]
            console.print(f"{kind}: {prompt}", end="", markup=False, highlight=False, soft_wrap=True)
            console.print(scored, style="reverse", markup=False, highlight=False, soft_wrap=True)


def _suspicions(row: Row, example: Example, config: Config) -> Iterator[tuple[str, str]]:
    for side, pair in (("dominant", row.dominant), ("target", row.target)):
        for place, text in _texts(pair):
            if html.unescape(text) != text:
                yield "html_entities", f"the {side} {place} holds escaped characters such as &quot;"
    for place, text in _texts(row.target):
        share = script_share(text, row.language)
        if share < 0.5:
            yield "wrong_script", f"{share:.0%} of the target {place}'s letters are of the script of {row.language}"
    for place, mine, theirs in zip(("prompt", "chosen", "rejected"), _all(row.target), _all(row.dominant), strict=True):
        if mine.strip() == theirs.strip():
            yield "untranslated", f"the target {place} is the dominant one, word for word"
    detector = LanguageDetector(config.data.languages, config.data.dominant_language)
    dominant_script = SCRIPTS.get(config.data.dominant_language)
    if SCRIPTS.get(row.language, dominant_script) == dominant_script and row.language in config.data.languages:
        for place in ("chosen", "rejected"):
            if detector.detect(getattr(row.target, place)) == config.data.dominant_language:
                yield "untranslated", f"the target {place} reads as {config.data.dominant_language}"
    for kind in ("chosen", "rejected"):
        mine, theirs = getattr(example, f"target_{kind}"), getattr(example, f"dominant_{kind}")
        ratio = (len(mine.input_ids) - mine.response_start) / (len(theirs.input_ids) - theirs.response_start)
        if not SHORTEST <= ratio <= LONGEST:
            yield "length_ratio", f"the target {kind} answer has {ratio:.2f} times the tokens of the dominant one"


def _repeated(rows: Sequence[Row]) -> list[dict[str, str]]:
    first: dict[tuple, str] = {}
    found = []
    for row in rows:
        key = (row.language, row.target)
        if first.get(key, row.source) != row.source:  # a weighted source repeats its own rows on purpose
            found.append({"source": row.source, "reason": "repeated", "detail": f"the same target pair as {first[key]}"})
        first.setdefault(key, row.source)
    return found


def _texts(pair: Pair) -> Iterator[tuple[str, str]]:
    yield from zip(("prompt", "chosen answer", "rejected answer"), _all(pair), strict=True)


def _all(pair: Pair) -> tuple[str, str, str]:
    return pair.prompt[-1].content, pair.chosen, pair.rejected


def _lengths(examples: Sequence[Example], limit: int) -> dict[str, Any]:
    targets = [s for e in examples for s in (e.target_chosen, e.target_rejected)]
    dominants = [s for e in examples for s in (e.dominant_chosen, e.dominant_rejected)]
    return {
        "rows": len(examples),
        "target": _percentiles([len(s.input_ids) for s in targets]),
        "dominant": _percentiles([len(s.input_ids) for s in dominants]),
        "scored": _percentiles([len(s.input_ids) - s.response_start for s in targets]),
        "cut": sum(len(s.input_ids) == limit for s in [*targets, *dominants]),
    }


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    points = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": int(points.quantile(p / 100, interpolation="lower")) for p in (5, 50, 95)} | {"max": max(values)}


def _first_of_each_language(examples: Sequence[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.language, example)
    return list(first.values())


def _view(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "source": example.source,
        "language": example.language,
        "chosen": decode_view(example.target_chosen, tokenizer),
        "rejected": decode_view(example.target_rejected, tokenizer),
    }
