"""Which language a text is in, for files that do not say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from mpo.errors import UserError


@cache
def known_languages() -> frozenset[str]:
    """The languages that a LanguageDetector can tell (ISO 639-1, and 639-3 where there is no shorter code)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return frozenset(map(str, LanguageIdentifier.from_model_file(MODEL_FILE).labels))


class LanguageDetector:
    """Chooses among the target languages and the dominant one (ISO 639-1), with py3langid's n-gram model."""

    def __init__(self, languages: Sequence[str], dominant: str) -> None:
        self.dominant = dominant
        self._languages = (*languages, dominant)

    def detect(self, *texts: str) -> str:
        """The language of the first text; of the others too where the first looks like the dominant language.

        A prompt may be short or carry names and quotes in the dominant language, so it alone does not convict a row of being untranslated.
        """
        first = _identifier(self._languages).classify(texts[0])[0]
        if first != self.dominant or len(texts) == 1:
            return first
        return _identifier(self._languages).classify("\n".join(texts))[0]


@cache  # a model takes most of a second to load
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    try:
        identifier.set_languages(list(languages))
    except ValueError as error:
        raise UserError(f"data.languages {list(languages)}: {error}. Use ISO 639-1 codes, or native rows, which state theirs.") from error
    return identifier
