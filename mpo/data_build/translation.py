"""What a translator is: anything that turns texts of the dominant language into texts of another
one, in batches, as they get done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from mpo.data.rows import Finding


class Failure(NamedTuple):
    """Why a text has no translation, or a prompt no answer; it drops the rows that need it, and the
    next build tries it again."""

    reason: str
    detail: str

    def of(self, source: str) -> Finding:
        """What it says of a row that needs the text."""
        return Finding(source, self.reason, self.detail)


Result = str | Failure
"""A text that was made, or why there is none."""
Finished = list[tuple[str, Result]]
"""(source text, its translation or why there is none)."""


class Translator(Protocol):
    """A way to translate. Making one checks all that can be checked without work, and raises
    UserError.

        for batch in translator.translate(["Hello", "Good night"], "sw"):
            for text, result in batch:
                ...
    """

    def identity(self, language: str) -> list[str] | None:
        """What a translation into that language depends on besides its source; None: nothing that
        takes work, so no journal is kept."""

    def translate(self, texts: Sequence[str], language: str) -> Iterator[Finished]:
        """Translates texts that are all different, in any order. Raises UserError where going on
        makes no sense."""
