"""What drops a translated row, and why: one stable reason for each thing that goes wrong in
translation."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from mpo.data.detection import LanguageDetector, told_apart
from mpo.data.rows import Finding, Pair
from mpo.data_build.config import FiltersConfig
from mpo.data_build.preferences import places_of
from mpo.languages import script_share, scripts_of, weight_of

SLACK = 10
"""Added to both lengths of a ratio."""
SHORTEST_LOOP = 20
"""Characters of the shortest repetition that counts."""
EXCERPT = 60
"""Characters of a text that a detail shows."""


class Filters:
    """The checks of one build."""

    def __init__(self, config: FiltersConfig, languages: Sequence[str], dominant: str) -> None:
        self._config = config
        self._loop = (
            re.compile(rf"(.{{1,60}}?)\1{{{config.max_repeats},}}", re.DOTALL)
            if config.max_repeats
            else None
        )
        # Between languages of scripts of their own no statistics are needed, and they would misread
        # a text that quotes another language.
        candidates = [*languages, dominant]
        shared = [
            a
            for a in candidates
            if any(
                set(scripts_of(a) or ()) & set(scripts_of(b) or ()) for b in candidates if a != b
            )
        ]
        self._detected = (
            [a for a in shared if all(told_apart(a, b) for b in shared if a != b)]
            if config.detect_from
            else []
        )
        self._detector = (
            LanguageDetector(self._detected[1:], self._detected[0])
            if len(self._detected) > 1
            else None
        )

    def clean(self, text: str) -> str:
        """A translation as it goes into the row."""
        return (html.unescape(text) if self._config.html_entities == "unescape" else text).strip()

    def finding_in(
        self, source: str, dominant: Pair, target: Pair, language: str
    ) -> Finding | None:
        """What is wrong first with a translated pair, or None; `source` is its row's."""
        for place, original, text in zip(
            places_of(target), dominant.texts(), target.texts(), strict=True
        ):
            for reason, detail in self._problems_of(original, text, language):
                return Finding(source, reason, f"{place}: {detail}")
        if target.chosen == target.rejected:
            return Finding(
                source, "chosen_equals_rejected", "both answers have the same translation"
            )
        return None

    def _problems_of(self, original: str, text: str, language: str) -> Iterator[tuple[str, str]]:
        config = self._config
        if not original.strip():
            return  # an empty system message stays one
        if not text.strip():
            yield "empty", "the translation is empty"
            return
        if config.html_entities != "keep" and html.unescape(text) != text:
            yield "html_entities", f"holds escaped characters: {_excerpt(text)}"
        if text.casefold() == original.strip().casefold() and any(map(str.isalpha, text)):
            yield "untranslated", f"is its source, word for word: {_excerpt(text)}"
        share = script_share(text, language)
        if share < config.min_script_share:
            yield (
                "wrong_script",
                f"{share:.0%} of the letters are of the script of {language}: {_excerpt(text)}",
            )
        ratio = (weighted_length(text) + SLACK) / (weighted_length(original) + SLACK)
        if not config.min_length_ratio <= ratio <= config.max_length_ratio:
            yield (
                "length_ratio",
                f"has {ratio:.2f} times the weighted length of its source: {_excerpt(text)}",
            )
        loop = self._loop_in(text)
        if loop and not self._loop_in(original):
            yield "repetition", f"repeats {_excerpt(loop)} over and over"
        if (
            self._detector
            and language in self._detected
            and config.detect_from
            and sum(map(str.isalpha, text)) >= config.detect_from
        ):
            found = self._detector.detect(text)
            if found != language:
                yield "wrong_language", f"reads as {found}: {_excerpt(text)}"

    def _loop_in(self, text: str) -> str | None:
        """The piece that a text repeats, if it does."""
        if self._loop is None:
            return None
        found = (
            match for match in self._loop.finditer(text) if len(match.group()) >= SHORTEST_LOOP
        )
        return next((match.group(1) for match in found), None)


def weighted_length(text: str) -> int:
    """Length of a text in Latin characters, roughly: see weight_of."""
    return sum(map(weight_of, text))


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + "...")
