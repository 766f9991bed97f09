"""Translations that are finished already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mpo.data_build.config import FileConfig
from mpo.data_build.journal import read_records
from mpo.data_build.translation import Failure, Finished
from mpo.languages import canonical
from mpo.runtime.errors import UserError


class FileTranslator:
    """Looks translations up; white space around a source does not matter.

    Raises:
        UserError: the file is missing, no JSONL, lacks a field, or has nothing in one of the
            languages.
    """

    def __init__(self, config: FileConfig, languages: Sequence[str]) -> None:
        path = Path(config.path)
        if not path.is_file():
            raise UserError(
                f"No file of translations at {path}. Check translator.file.path; it is relative to"
                " the configuration or here."
            )
        self._name = path.name
        self._finished: dict[tuple[str, str], str] = {}
        try:
            records, _ = read_records(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        for number, record in enumerate(records, start=1):
            fields = [record.get(name) for name in ("source", "language", "translation")]
            if not all(isinstance(field, str) for field in fields):
                raise UserError(
                    f"{path}, row {number}: needs texts `source`, `language` and `translation`; it"
                    f" has {', '.join(record)}."
                )
            source, language, translation = map(str, fields)
            self._finished[source.strip(), canonical(language)] = translation
        there = {language for _, language in self._finished}
        missing = [language for language in languages if language not in there]
        if missing:
            raise UserError(
                f"{path} has no translation into {', '.join(missing)}; it has"
                f" {', '.join(sorted(there)) or 'none at all'}."
            )

    def identity(self, language: str) -> None:
        """Looking up takes no work."""

    def translate(self, texts: Sequence[str], language: str) -> Iterator[Finished]:
        """All texts at once; those that the file does not have fail as `no_translation`."""
        missing = Failure(
            "no_translation", f"{self._name} has no translation of it into {language}"
        )
        yield [(text, self._finished.get((text.strip(), language), missing)) for text in texts]
