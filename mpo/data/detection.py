"""Which language a text is in, for files that do not say, and whether it is the one that is
said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from mpo.languages import code_of, script_of, weighed_letters
from mpo.runtime.errors import UserError

ENGLISH = "en"
"""Stands inside texts of every language: names, quotes, code, and what a translator left as it
was."""
CLEARLY = 0.05
"""A text is clearly in another language if that makes it likelier by so much of its log-likelihood.
Dialects differ by 0.01 at most, languages of one script by 0.14 and more."""
QUOTED = 0.1
"""Weighted share of letters of other scripts above which a text's Latin letters are not looked at:
they are names and terms."""

_LABELS = {"ff": "fuv", "gn": "gug", "ki": "kik", "nb": "no"}
"""py3langid's own names of some languages."""
_READ_AS = {
    "ary": "ar",
    "arz": "ar",
    "fuv": "ff",
    "gug": "gn",
    "kik": "ki",
    "pcm": "en",
    "sdh": "ku",
    "uzs": "uz",
    "wuu": "zh",
    "yue": "zh",
}
"""Dialects that are no other language here, and its own names again."""
_NO_LANGUAGE = "zxx"


@cache
def known_languages() -> frozenset[str]:
    """Codes of the languages that a LanguageDetector can tell."""
    labels = frozenset(map(str, _identifier().nb_classes))
    return labels | {code for code, label in _LABELS.items() if label in labels}


def told_apart(one: str, other: str) -> bool:
    """Whether a LanguageDetector knows both languages, and which of them a text is in."""
    return {code_of(one), code_of(other)} <= known_languages() and _label(one) != _label(other)


class LanguageDetector:
    """Chooses among the target languages and the dominant one, with py3langid's n-gram model,
    unless a text is clearly in none of them.

        >>> LanguageDetector(["sw", "zh"], "en").detect("Ninawezaje kufungua mlango huu?")
        'sw'

    Raises:
        UserError: a language that cannot be told, or two that cannot be told apart.
    """

    def __init__(self, languages: Sequence[str], dominant: str) -> None:
        self.dominant = dominant
        self._names: dict[str, str] = {}
        for language in (*languages, dominant):
            if code_of(language) not in known_languages():
                raise UserError(
                    f"Unknown language code: {language!r} cannot be detected. Leave it out of"
                    " data.languages and data.dominant_language, or use native rows, which state"
                    " theirs."
                )
            other = self._names.setdefault(_label(language), language)
            if other != language:
                raise UserError(
                    f"{other} and {language} cannot be told apart. Use native rows, which state"
                    " their language."
                )

    def detect(self, prompt: str, *answers: str) -> str:
        """The language of the prompt; of the answers too where that is doubtful, or where all of it
        is clearly in a language of its own.

        A prompt that reads as the dominant language or as English, or in which another script is
        the lesser part, does not convict a row alone: it may be short, carry names and quotes, or
        have been left untranslated.
        """
        texts = [text for text in (prompt, *answers) if any(map(str.isalpha, text))]
        if not texts:
            return self.dominant
        nearest, instead = self._read("\n".join(texts))
        if instead is not None:
            return instead
        if texts[0] == prompt:
            first = self._read(prompt)[0]
            if first not in (self.dominant, ENGLISH) and not _mixed(prompt):
                return first
        language, votes = Counter(self._read(text)[0] for text in texts).most_common(1)[0]
        return language if 2 * votes > len(texts) else nearest

    def _read(self, text: str) -> tuple[str, str | None]:
        """(the likeliest of the offered languages, the other one that the text is clearly in)."""
        scores = _scores(text)
        label = max(self._names, key=scores.__getitem__)
        best = max(scores, key=scores.__getitem__)
        other = _READ_AS.get(best, best)
        offered = {code_of(name) for name in self._names.values()}
        clearly = scores[best] - scores[label] > CLEARLY * abs(scores[label])
        instead = other if clearly and other not in offered | {_NO_LANGUAGE} else None
        return self._names[label], instead


def clearly_in_another(language: str, *texts: str) -> str | None:
    """The language that the texts together are clearly in, if it is not the one given; None also
    for a language that cannot be told."""
    if code_of(language) not in known_languages() or not any(
        any(map(str.isalpha, text)) for text in texts
    ):
        return None
    found = LanguageDetector((), language).detect(*texts)
    return None if found == language else found


def _scores(text: str) -> dict[str, float]:
    """The log-likelihood of a text in each language, without its Latin letters where they are those
    of names and terms."""
    weights = weighed_letters(text)
    if weights["LATIN"] and weights.total() - weights["LATIN"] >= QUOTED * weights.total():
        text = text.translate(
            {ord(letter): " " for letter in set(text) if script_of(letter) == "LATIN"}
        )
    return {str(label): float(score) for label, score in _identifier().rank(text)}


def _mixed(text: str) -> bool:
    """Whether Latin letters are the greater part of a text that its other letters name the language
    of."""
    weights = weighed_letters(text)
    return QUOTED * weights.total() <= weights.total() - weights["LATIN"] < weights["LATIN"]


def _label(language: str) -> str:
    return _LABELS.get(code_of(language), code_of(language))


@cache  # a model takes most of a second to load
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
