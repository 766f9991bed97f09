"""Which language a text is in, for files that do not say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from mpo.errors import UserError


def detectable(languages: Sequence[str]) -> list[str]:
    """Those of the languages (ISO 639-1) that a LanguageDetector knows, in their order."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    known = set(map(str, LanguageIdentifier.from_model_file(MODEL_FILE).labels))
    return [language for language in languages if language in known]


class LanguageDetector:
    """Chooses among the target languages and the dominant one (ISO 639-1), with py3langid's n-gram model."""

    def __init__(self, languages: Sequence[str], dominant: str) -> None:
        self.dominant = dominant
        self._languages = [*languages, dominant]

    @cached_property
    def _identifier(self) -> Any:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
        try:
            identifier.set_languages(self._languages)
        except ValueError as error:
            raise UserError(
                f"data.languages {self._languages}: {error}. Use ISO 639-1 codes, or native rows, which state theirs."
            ) from error
        return identifier

    def detect(self, *texts: str) -> str:
        """The language of the first text; of the others too where the first looks like the dominant language.

        A prompt may be short or carry names and quotes in the dominant language, so it alone does not convict a row of being untranslated.
        """
        first = self._identifier.classify(texts[0])[0]
        if first != self.dominant or len(texts) == 1:
            return first
        return self._identifier.classify("\n".join(texts))[0]
