"""The input of a build: preference pairs in one language."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mpo.data.rows import (
    Finding,
    Message,
    Pair,
    Prompt,
    findings_in_pair,
    is_unicode,
    settle_bad_rows,
)
from mpo.data.sources import check_dominant_language, labels_of, objects
from mpo.data_build.config import BuildConfig
from mpo.runtime.errors import UserError


class PreferenceRow(BaseModel):
    """A row of the input. Other keys are kept out of the way."""

    id: str | int | None = None
    prompt: str | tuple[Message, ...]
    chosen: str | None = None
    rejected: str


@dataclass(frozen=True)
class Preference:
    """A pair in the dominant language. `source` says where it came from; where the model is to
    answer, `pair.chosen` is empty."""

    id: str
    source: str
    pair: Pair
    trimmed: bool = False
    """Whether white space around an answer was taken off, as it is around a translation: a
    tokenizer may join it with what a chat template writes before an answer, and then the answer
    cannot be scored."""


def read_preferences(config: BuildConfig) -> tuple[list[Preference], list[Finding]]:
    """Reads all input in its order.

    Returns:
        The good rows, and the bad ones (none of them where config.on_bad_row is "error").
    Raises:
        UserError: input is missing or unreadable; or a row is bad and config.on_bad_row is "error";
            or no row is left.
    """
    rows: list[Preference] = []
    bad: list[Finding] = []
    seen: dict[str, str] = {}
    labels = labels_of(config.input)
    for name in config.input:
        if not name.startswith("hf:") and not Path(name).exists():
            raise UserError(
                f"No input at {name}. Check `input`; paths are relative to the configuration or to"
                " here."
            )
        read = [
            _read(source, value, config)
            for source, value in objects(name, labels[name], tuple(PreferenceRow.model_fields))
        ]
        pairs = [row.pair for row in read if isinstance(row, Preference)]
        check_dominant_language(name, pairs, config.dominant_language, "dominant_language")
        for row in read:
            if isinstance(row, Preference) and row.id in seen:
                row = Finding(
                    row.source,
                    "duplicate_id",
                    f"id {row.id!r} is that of {seen[row.id]} too; give each row its own",
                )
            if isinstance(row, Finding):
                bad.append(row)
            else:
                seen[row.id] = row.source
                rows.append(row)
    settle_bad_rows(bad, len(rows), config.input, config.on_bad_row, "on_bad_row")
    return rows, bad


def _read(source: str, value: Any, config: BuildConfig) -> Preference | Finding:
    row = _parsed(source, value)
    if isinstance(row, Finding):
        return row
    answered_later = config.chosen_from_model is not None
    if row.chosen is None and not answered_later:
        return Finding(
            source,
            "missing_field",
            "has no 'chosen'; give it, or set chosen_from_model.path to let a model answer",
        )
    if isinstance(row.prompt, str):
        prompt: Prompt = (Message(role="user", content=row.prompt),)
    else:
        prompt = row.prompt
    chosen = "" if answered_later else row.chosen or ""
    clean = html.unescape if config.filters.html_entities == "unescape" else str
    pair = map_texts(Pair(prompt=prompt, chosen=chosen, rejected=row.rejected), clean)
    for finding in findings_in_pair(source, "dominant", pair):
        if not (answered_later and finding.reason == "empty_chosen"):
            return finding
    trimmed = pair.model_copy(
        update={"chosen": pair.chosen.strip(), "rejected": pair.rejected.strip()}
    )
    return Preference(source if row.id is None else str(row.id), source, trimmed, trimmed != pair)


def _parsed(source: str, value: Any) -> PreferenceRow | Finding:
    if not isinstance(value, dict):
        return Finding(
            source, "not_an_object", f"holds {type(value).__name__}; a row is a JSON object"
        )
    try:
        row = PreferenceRow.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        if first["type"] == "missing" and len(first["loc"]) == 1:
            return Finding(source, "missing_field", f"has no {field!r}")
        wanted = "text or a list of messages with role and content" if field == "prompt" else "text"
        return Finding(source, "wrong_type", f"{field} is no {wanted}: {value.get(field)!r}"[:300])
    if not is_unicode(str(row.id)):
        return Finding(
            source, "not_unicode", "id holds half of a surrogate pair, which no file can; remove it"
        )
    return row


def places_of(pair: Pair) -> list[str]:
    """What each of a pair's texts is, for messages to people."""
    names = [f"message {i + 1}" for i in range(len(pair.prompt) - 1)]
    return [*names, "prompt", "chosen answer", "rejected answer"]


def map_texts(pair: Pair, change: Callable[[str], str]) -> Pair:
    """The pair with every text changed."""
    prompt = tuple(
        message.model_copy(update={"content": change(message.content)}) for message in pair.prompt
    )
    return Pair(prompt=prompt, chosen=change(pair.chosen), rejected=change(pair.rejected))
