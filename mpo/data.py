"""Reading rows: the native JSONL format and the published MPO files, told apart by their content.

Native, one object a line (other keys, such as an id, are kept out of the way):

    {"language": "sw", "dominant": {"prompt": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "..."}, "target": {...}}

Published, one JSON list: objects with {source,target}_conversations: [{"from", "value"}] and {source,target}_{chosen,rejected}: {"from",
"value"}.
They do not state the target language, which is detected from the target's texts.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mpo.config import DataConfig
from mpo.errors import UserError
from mpo.language import LanguageDetector

LISTED = 10
"""Bad rows that an error message lists; the rest are counted."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = {"frozen": True}
    role: Literal["system", "user", "assistant"]
    content: str


class Pair(BaseModel):
    """A prompt with a safe and an unsafe answer."""

    model_config = {"frozen": True}
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    def conversation(self) -> list[dict[str, str]]:
        """The prompt as chat templates take it."""
        return [message.model_dump() for message in self.prompt]


class NativeRow(BaseModel):
    """A line of a native file."""

    language: str
    dominant: Pair
    target: Pair


@dataclass(frozen=True)
class Row:
    """A dominant pair and its translation. `source` says where it came from, for messages."""

    source: str
    language: str
    dominant: Pair
    target: Pair


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on: a short stable reason to count by, and a detail that says what to mend."""

    source: str
    reason: str
    detail: str


def load_rows(files: Sequence[str], config: DataConfig, weights: Sequence[float] = ()) -> tuple[list[Row], list[BadRow]]:
    """Reads all sources in their order, the rows of each as often as its weight says.

    Returns:
        The good rows, and the bad ones (none of them where config.on_bad_row is "error").
    Raises:
        UserError: a file is missing, unreadable, no JSON or of no known form; or a row is bad and config.on_bad_row is "error"; or
            no row is left.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    detector = LanguageDetector(config.languages, config.dominant_language)
    for file, weight in zip(files, weights or [1.0] * len(files), strict=True):
        good: list[Row] = []
        for source, value in objects(file):
            row = _read_row(source, value, detector)
            problem = row if isinstance(row, BadRow) else _problem_of(row)
            if problem is not None:
                bad.append(problem)
            elif isinstance(row, Row):
                good.append(row)
        rows += weighted(good, weight)
    settle_bad_rows(bad, len(rows), config.train, config.on_bad_row)
    return rows, bad


def settle_bad_rows(
    bad: Sequence[BadRow], good: int, files: Sequence[str], on_bad_row: Literal["error", "drop"], option: str = "data.on_bad_row"
) -> None:
    """Raises UserError that lists bad rows and counts their reasons, unless they may be dropped and something is left.

    `option` is what the user would set to drop them.
    """
    if (bad and on_bad_row == "error") or not good:
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(b.reason for b in bad).most_common())
        listed = "".join(f"\n  {b.source}: {b.reason}: {b.detail}" for b in bad[:LISTED])
        more = f"\n  ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        if not good:
            raise UserError(f"No usable row is left in {', '.join(files)} ({counts or 'the files hold none'}).{listed}{more}")
        raise UserError(
            f"{len(bad)} of {len(bad) + good} rows cannot be trained on ({counts}):{listed}{more}\n"
            f"Mend them, or set {option}=drop to leave them out."
        )


def weighted(rows: Sequence[Row], weight: float) -> list[Row]:
    """Each row floor(weight) times, and for the rest of the weight evenly spaced rows once more. weight 1 is the rows as they are."""
    whole, count = int(weight), round((weight - int(weight)) * len(rows))
    return list(rows) * whole + [rows[i * len(rows) // count] for i in range(count)]


def objects(name: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row of a source."""
    path = Path(name)
    if name.startswith("hf:"):
        yield from _of_dataset(name, *name.removeprefix("hf:").split(":"))
    elif path.is_dir():
        yield from _of_dataset(name)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _of_parquet(path)
    else:
        yield from _of_json(path)


def _of_dataset(name: str, repository: str = "", split: str = "train") -> Iterator[tuple[str, Any]]:
    """Rows of a dataset of the hub, or of a folder of one. No code that comes with it is run: `datasets` has no way to."""
    import datasets

    try:
        loaded = datasets.load_dataset(repository, split=split) if repository else datasets.load_from_disk(name)
    except Exception as error:  # whatever the hub, the cache or the folder has to say
        raise UserError(f"The dataset {name} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise UserError(f"The dataset folder {name} holds several splits: {', '.join(loaded)}. Name one, e.g. {name}/{next(iter(loaded))}.")
    yield from ((f"{Path(name).name}[{i}]", row) for i, row in enumerate(loaded))


def _of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.lib.ArrowInvalid) as error:
        raise UserError(f"{path} is no readable Parquet file: {error}") from error
    yield from ((f"{path.name}[{i}]", row) for i, row in enumerate(table.to_pylist()))


def _of_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a JSON list, or of the lines of a JSONL file."""
    if not path.is_file():
        raise UserError(f"No data file at {path}. Check data.train and data.eval; paths are relative to the configuration or to here.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{path} is empty.")
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}, column {error.colno}: no valid JSON ({error.msg}).") from error
        yield from ((f"{path.name}[{i}]", value) for i, value in enumerate(values))
        return
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}, column {error.colno}: no valid JSON ({error.msg}).") from error


def _read_row(source: str, value: Any, detector: LanguageDetector) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(source, "not_an_object", f"holds {type(value).__name__}; a row is a JSON object")
    if "source_conversations" in value or "target_conversations" in value:
        return _read_published(source, value, detector)
    try:
        row = NativeRow.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            return BadRow(source, "missing_field", f"has no {field!r}")
        return BadRow(source, "wrong_type", f"{field}: {first['msg']}, not {first['input']!r}"[:300])
    return Row(source, row.language, row.dominant, row.target)


def _read_published(source: str, value: dict[str, Any], detector: LanguageDetector) -> Row | BadRow:
    roles: dict[str, Literal["system", "user", "assistant"]] = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }

    def pair(side: str) -> Pair:
        # The published texts passed through a translator that escaped them: &quot; and &#39; are no part of the language.
        turns = tuple(Message(role=roles[turn["from"]], content=html.unescape(turn["value"])) for turn in value[f"{side}_conversations"])
        answers = {kind: html.unescape(value[f"{side}_{kind}"]["value"]) for kind in ("chosen", "rejected")}
        return Pair(prompt=turns, **answers)

    try:
        dominant, target = pair("source"), pair("target")
    except KeyError as error:
        return BadRow(source, "missing_field", f"has no {error}")
    except (TypeError, ValidationError) as error:
        return BadRow(source, "wrong_type", str(error)[:300])
    if not target.prompt:
        return BadRow(source, "empty_prompt", "the target prompt has no message")
    language = detector.detect(target.prompt[-1].content, target.chosen, target.rejected)
    if language == detector.dominant:
        return BadRow(source, "target_untranslated", f"the target texts are in the dominant language, {detector.dominant}")
    return Row(source, language, dominant, target)


def _problem_of(row: Row) -> BadRow | None:
    """The first reason why a well-formed row cannot be trained on."""
    if not row.language.strip():
        return BadRow(row.source, "empty_language", "language is empty; give a code such as sw")
    return next((problem for side in ("dominant", "target") for problem in problems_of_pair(row.source, side, getattr(row, side))), None)


def problems_of_pair(source: str, side: str, pair: Pair) -> Iterator[BadRow]:
    """Every reason why a pair cannot be trained on; `side` names it in the details."""
    if not pair.prompt or not any(message.content.strip() for message in pair.prompt):
        yield BadRow(source, "empty_prompt", f"the {side} prompt is empty")
    elif pair.prompt[-1].role != "user":
        yield BadRow(source, "prompt_not_ending_with_user", f"the {side} prompt ends with a {pair.prompt[-1].role} message")
    for kind in ("chosen", "rejected"):
        if not getattr(pair, kind).strip():
            yield BadRow(source, f"empty_{kind}", f"the {side} {kind} answer is empty")
    if pair.chosen.strip() == pair.rejected.strip():
        yield BadRow(source, "chosen_equals_rejected", f"the {side} pair has no gap: both answers are the same")
