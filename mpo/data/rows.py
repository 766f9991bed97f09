"""A row of text: a pair of answers in the dominant language and its translation; and what can be
wrong with one, in whatever file it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel

from mpo.runtime.errors import UserError

Item = TypeVar("Item")
LISTED = 10
"""Bad rows that an error message lists; the rest are counted."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = {"frozen": True}
    role: Literal["system", "user", "assistant"]
    content: str


Prompt = tuple[Message, ...]


class Pair(BaseModel):
    """A prompt with a safe and an unsafe answer."""

    model_config = {"frozen": True}
    prompt: Prompt
    chosen: str
    rejected: str

    def conversation(self) -> list[dict[str, str]]:
        """The prompt as chat templates take it."""
        return [message.model_dump() for message in self.prompt]

    def texts(self) -> list[str]:
        """Every text: the messages of the prompt in their order, then the chosen and the rejected
        answer."""
        return [*(message.content for message in self.prompt), self.chosen, self.rejected]


@dataclass(frozen=True)
class Row:
    """A dominant pair and its translation, the target pair."""

    source: str
    """Where it came from, for messages: `rows.jsonl:7`."""
    language: str
    """Of the target pair."""
    dominant: Pair
    target: Pair

    def pairs(self) -> tuple[tuple[str, Pair], tuple[str, Pair]]:
        """Both pairs by the name of their side."""
        return ("dominant", self.dominant), ("target", self.target)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row, or looks so: a short stable reason to count by, and a detail that
    says what to mend."""

    source: str
    """The row's, so that it can be found."""
    reason: str
    detail: str


def findings_in_pair(source: str, side: str, pair: Pair) -> Iterator[Finding]:
    """Every reason why a pair cannot be trained on; `side` names it in the details."""
    if not all(map(is_unicode, pair.texts())):
        yield Finding(
            source,
            "not_unicode",
            f"the {side} pair holds half of a surrogate pair, which no file can; remove it",
        )
    if not pair.prompt or not any(message.content.strip() for message in pair.prompt):
        yield Finding(source, "empty_prompt", f"the {side} prompt is empty")
    elif pair.prompt[-1].role != "user":
        yield Finding(
            source,
            "prompt_not_ending_with_user",
            f"the {side} prompt ends with a {pair.prompt[-1].role} message",
        )
    for kind, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer.strip():
            yield Finding(source, f"empty_{kind}", f"the {side} {kind} answer is empty")
    if pair.chosen.strip() == pair.rejected.strip():
        yield Finding(
            source,
            "chosen_equals_rejected",
            f"the {side} pair has no gap: both answers are the same",
        )


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may escape half of a surrogate pair alone, which is no
    character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def settle_bad_rows(
    bad: Sequence[Finding],
    good: int,
    files: Sequence[str],
    on_bad_row: Literal["error", "drop"],
    option: str = "data.on_bad_row",
) -> None:
    """Lets bad rows go where they may be dropped and something is left.

    Args:
        bad: what is wrong, one finding for each bad row.
        good: rows that are left.
        files: where they stand.
        option: what the user would set to drop them.
    Raises:
        UserError: otherwise; it lists bad rows and counts their reasons.
    """
    if good and not (bad and on_bad_row == "error"):
        return
    counts = ", ".join(
        f"{count} {reason}" for reason, count in Counter(b.reason for b in bad).most_common()
    )
    listed = "".join(f"\n  {b.source}: {b.reason}: {b.detail}" for b in bad[:LISTED])
    more = f"\n  ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    if not good:
        raise UserError(
            f"No usable row is left in {', '.join(files)}"
            f" ({counts or 'the files hold none'}).{listed}{more}"
        )
    raise UserError(
        f"{len(bad)} of {len(bad) + good} rows cannot be trained on ({counts}):{listed}{more}\n"
        f"Mend them, or set {option}=drop to leave them out."
    )


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, in their order.

    >>> evenly_spaced("abcdefghij", 3)
    ['a', 'd', 'g']
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
