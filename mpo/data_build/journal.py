"""Finished texts on disk, one JSON object a line, so that a build that stopped anywhere goes on
without asking for them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from mpo.runtime.errors import UserError
from mpo.runtime.files import BadLine, json_lines, no_json, to_json


def key_of(*parts: Any) -> str:
    """What a finished text depends on, as 32 hexadecimal digits. Parts are whatever JSON holds."""
    return hashlib.sha256(
        json.dumps(parts, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    ).hexdigest()[:32]


class Journal:
    """Texts by key. What `add` has returned from survives a kill and a power cut; a line that one
    cut short is removed.

        with Journal(Path("rows.jsonl.translations.jsonl"), "translation") as journal:
            journal.add([{"key": key_of("Hello"), "source": "Hello", "translation": "Habari"}])
            journal.get(key_of("Hello"))

    Raises:
        UserError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, value: str) -> None:
        """`value` names the field of a line that holds the text."""
        self.path, self._value = path, value
        self._texts: dict[str, str] = {}
        try:
            self._file = open(path, "a+b")
            records, size = read_records(path)
            if size < path.stat().st_size:
                self._file.truncate(size)
            elif size and not path.read_bytes().endswith(b"\n"):
                self._file.write(b"\n")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error}). Choose another output."
            ) from error
        for record in records:
            if not (isinstance(record.get("key"), str) and isinstance(record.get(value), str)):
                raise UserError(
                    f"{path} is no journal of this command: a line lacks key or {value}. Move it"
                    " away."
                )
            self._texts[record["key"]] = record[value]

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, key: str) -> str | None:
        """The finished text, or None."""
        return self._texts.get(key)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends finished texts, each with its `key`, and waits until they are on the disk."""
        records = list(records)
        try:
            self._file.write("".join(to_json(record) + "\n" for record in records).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error}). Make room; the same command goes on from"
                " what is there."
            ) from error
        self._texts.update((record["key"], record[self._value]) for record in records)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many bytes they take: less than the file has if its last
    line was cut short.

    Raises:
        UserError: a line before the last is no JSON object.
    """
    whole = path.read_bytes()
    records: list[dict[str, Any]] = []
    try:
        for line in json_lines(whole):
            if not isinstance(line.value, dict):
                raise UserError(
                    f"{path}, line {line.number}: holds {type(line.value).__name__}; a line is a"
                    " JSON object."
                )
            records.append(line.value)
    except BadLine as bad:
        if bad.line.end == len(whole):  # no line break behind it: a kill came in between
            return records, bad.line.begin
        raise no_json(path, bad.why, bad.line.number) from bad
    return records, len(whole)
