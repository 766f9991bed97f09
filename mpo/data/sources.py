"""Reading rows: the native JSONL format and the published MPO files, told apart by their content.

Native, one object a line (other keys, such as an id, are kept out of the way):

    {"language": "sw", "dominant": {"prompt": [{"role": "user", "content": "..."}], "chosen": "...",
    "rejected": "..."}, "target": {...}}

Published, one JSON list: objects with {source,target}_conversations: [{"from", "value"}] and
{source,target}_{chosen,rejected}: {"from", "value"}. They do not state the target language, which
is detected from the target's texts.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import html
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mpo.config import DataConfig
from mpo.data.detection import LanguageDetector, clearly_in_another
from mpo.data.rows import (
    Finding,
    Message,
    Pair,
    Row,
    evenly_spaced,
    findings_in_pair,
    is_unicode,
    settle_bad_rows,
)
from mpo.languages import canonical, script_share
from mpo.runtime.errors import UserError
from mpo.runtime.files import BadLine, json_lines, no_json
from mpo.runtime.settings import as_written

LOOKED_AT = 50
"""Dominant pairs of a source whose language is looked at while reading."""
UNDETERMINED = "und"
"""The language of a row that does not state it."""
PUBLISHED = tuple(
    f"{side}_{part}"
    for side in ("source", "target")
    for part in ("conversations", "chosen", "rejected")
)
COLUMNS = ("language", "dominant", "target", *PUBLISHED)
"""What rows are made of."""


class NativeRow(BaseModel):
    """A line of a native file."""

    language: str
    dominant: Pair
    target: Pair


def load_rows(
    files: Sequence[str], config: DataConfig, weights: Sequence[float] = ()
) -> tuple[list[Row], list[Finding]]:
    """Reads all sources in their order, the rows of each as often as its weight says.

        rows, bad = load_rows(config.data.train, config.data, config.data.weights)

    Returns:
        The good rows, and the bad ones (none of them where config.on_bad_row is "error").
    Raises:
        UserError: a file is missing, unreadable, no JSON or of no known form; its dominant side is
            in another language than config.dominant_language; or a row is bad and config.on_bad_row
            is "error"; or no row is left.
    """
    rows: list[Row] = []
    bad: list[Finding] = []
    reader = _Reader(config)
    labels = labels_of([*config.train, *config.eval, *files])
    for file, weight in zip(files, weights or [1.0] * len(files), strict=True):
        read = [reader.row(place, value) for place, value in objects(file, labels[file], COLUMNS)]
        pairs = [row.dominant for row in read if isinstance(row, Row)]
        check_dominant_language(file, pairs, config.dominant_language)
        read = [reader.settled(row) if isinstance(row, Row) else row for row in read]
        rows += weighted([row for row in read if isinstance(row, Row)], weight)
        bad += [row for row in read if isinstance(row, Finding)]
    settle_bad_rows(bad, len(rows), files, config.on_bad_row)
    return rows, bad


def check_dominant_language(
    file: str, pairs: Sequence[Pair], language: str, option: str = "data.dominant_language"
) -> None:
    """Raises UserError where most of a source's pairs are clearly in another language than its
    dominant side should be.

    `option` is what the user would set.
    """
    looked_at = evenly_spaced(list(dict.fromkeys(pairs)), LOOKED_AT)
    found = Counter(clearly_in_another(language, *pair.texts()) for pair in looked_at)
    del found[None]
    for other, count in found.most_common(1):
        if 2 * count > len(looked_at):
            raise UserError(
                f"The dominant side of {file} is in {other}, not in {language} ({count} of"
                f" {len(looked_at)} pairs that were looked at). Set {option}={other}, and let no"
                f" target language be {other}."
            )


def weighted(rows: Sequence[Row], weight: float) -> list[Row]:
    """weight x rows, to the nearest: all of them as often as that takes, and evenly spaced ones
    once more.

        weighted(rows, 2.5)  # of four rows: all, all, the first and the third
    """
    whole, count = divmod(round(as_written(weight) * len(rows)), max(1, len(rows)))
    return list(rows) * whole + evenly_spaced(rows, count)


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """A short label for each source that no other has: the last parts of its path, as many as it
    takes. One file has one label.

        >>> labels_of(["/a/x/rows.jsonl", "/a/y/rows.jsonl"])
        {'/a/x/rows.jsonl': 'x/rows.jsonl', '/a/y/rows.jsonl': 'y/rows.jsonl'}
    """
    paths = {name: name if name.startswith("hf:") else os.path.abspath(name) for name in names}
    labels = {}
    for name, path in paths.items():
        others = [other.split("/") for other in set(paths.values()) - {path}]
        parts = path.split("/")
        size = next(
            (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)),
            len(parts),
        )
        labels[name] = "/".join(parts[-size:])
    return labels


def objects(name: str, label: str, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(place, value) of each row of a source.

        dict(objects("rows.jsonl", "rows.jsonl", COLUMNS))["rows.jsonl:1"]

    Args:
        name: a JSON or JSONL file, which may be packed, a Parquet file, a folder of a dataset, or
            `hf:owner/name:split`.
        label: what places begin with.
        columns: those of a table that are read, where they are there.
    Raises:
        UserError: it is missing, damaged or nothing of these.
    """
    path = Path(name)
    if name.startswith("hf:") or path.is_dir():
        yield from _of_dataset(name, label, columns)
        return
    content = _content_of(path)
    named_parquet = path.suffix.lower() == ".parquet"
    begins_as_json = content.lstrip()[:1] in (b"", b"[", b"{")
    if content.startswith(b"PAR1") or (named_parquet and not begins_as_json):
        yield from _of_parquet(path, content, label, columns)
    else:
        yield from _of_json(path, content, label)


def _of_dataset(name: str, label: str, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a dataset of the hub, or of a folder of one."""
    dataset = _loaded_dataset(name)
    dataset = dataset.select_columns(_wanted(name, dataset.column_names, columns))
    for i in range(len(dataset)):
        try:
            value = dataset[i]
        except Exception as error:  # whatever a column holds that is no text
            raise UserError(
                f"{name}, row {i}: cannot be read: {type(error).__name__}: {error}"
            ) from error
        yield f"{label}[{i}]", value


def _loaded_dataset(name: str) -> Any:
    """No code that comes with a dataset is run: `datasets` has no way to."""
    import datasets

    on_hub = name.startswith("hf:")
    repository, _, split = name.removeprefix("hf:").partition(":")
    if on_hub and not repository:
        raise UserError(f"{name!r} names no dataset. Write hf:owner/name or hf:owner/name:split.")
    loaded: Any
    try:
        if on_hub:
            loaded = datasets.load_dataset(repository, split=split or "train")
        else:
            loaded = datasets.load_from_disk(name)
    except Exception as error:  # whatever the hub, the cache or the folder has to say
        raise UserError(
            f"The dataset {name} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise UserError(
            f"The dataset folder {name} holds several splits: {', '.join(loaded)}. Name one, e.g."
            f" {name}/{next(iter(loaded))}."
        )
    return loaded


def _of_parquet(
    path: Path, content: bytes, label: str, columns: Collection[str]
) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        table = file.read(columns=_wanted(str(path), file.schema_arrow.names, columns))
        values = table.to_pylist()
    except UserError:
        raise
    except Exception as error:  # a damaged file, or text that is none
        raise UserError(f"{path} is no readable Parquet file: {error}") from error
    yield from ((f"{label}[{i}]", value) for i, value in enumerate(values))


def _wanted(name: str, there: Sequence[str], columns: Collection[str]) -> list[str]:
    """Those of a table's columns that rows are made of; the others may hold whatever they like."""
    wanted = [column for column in dict.fromkeys(there) if column in columns]
    if not wanted:
        raise UserError(
            f"{name} has no column of rows ({', '.join(columns)}); it has"
            f" {', '.join(there) or 'none'}."
        )
    twice = [column for column in wanted if list(there).count(column) > 1]
    if twice:
        raise UserError(f"{name} has the column {twice[0]!r} twice; rename one.")
    return wanted


def _content_of(path: Path) -> bytes:
    """The bytes of a file, unpacked where they are packed, whatever it is called."""
    if not path.is_file():
        raise UserError(
            f"No data file at {path}. Check data.train and data.eval; paths are relative to the"
            " configuration or to here."
        )
    try:
        content = path.read_bytes()
        for magic, unpack in _PACKED.items():
            if content.startswith(magic):
                content = unpack(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`."
        )
    for magic, kind in _NOT_UNPACKED.items():
        if content.startswith(magic):
            raise UserError(
                f"{path} is packed ({kind}). Unpack it; files packed with gzip, bzip2 or xz are"
                " read as they are."
            )
    return content


_PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
_NOT_UNPACKED = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


def _of_json(path: Path, content: bytes, label: str) -> Iterator[tuple[str, Any]]:
    """Of a JSON list, or of the lines of a JSONL file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{path} is empty.")
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise no_json(path, error) from error
        yield from ((f"{label}[{i}]", value) for i, value in enumerate(values))
        return
    try:
        for line in json_lines(text):
            yield f"{label}:{line.number}", line.value
    except BadLine as bad:
        raise no_json(path, bad.why, bad.line.number) from bad


class _Reader:
    """From a source's values to rows, with the languages of one configuration."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config

    @functools.cached_property
    def _detector(self) -> LanguageDetector:
        return LanguageDetector(self._config.languages, self._config.dominant_language)

    def row(self, source: str, value: Any) -> Row | Finding:
        """The row that a value is, if it is one. The language of a published one is
        undetermined."""
        if not isinstance(value, dict):
            return Finding(
                source, "not_an_object", f"holds {type(value).__name__}; a row is a JSON object"
            )
        if "source_conversations" in value or "target_conversations" in value:
            return self._published(source, value)
        try:
            row = NativeRow.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                return Finding(source, "missing_field", f"has no {field!r}")
            return Finding(
                source, "wrong_type", f"{field}: {first['msg']}, not {first['input']!r}"[:300]
            )
        return Row(source, canonical(row.language), row.dominant, row.target)

    def _published(self, source: str, value: dict[str, Any]) -> Row | Finding:
        roles: dict[str, Literal["system", "user", "assistant"]] = {
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "system": "system",
        }

        def pair(side: str) -> Pair:
            # The published texts passed through a translator that escaped them: &quot; and &#39;
            # are no part of the language.
            turns = tuple(
                Message(role=roles[turn["from"]], content=html.unescape(turn["value"]))
                for turn in value[f"{side}_conversations"]
            )
            answers = {
                kind: html.unescape(value[f"{side}_{kind}"]["value"])
                for kind in ("chosen", "rejected")
            }
            return Pair(prompt=turns, **answers)

        try:
            return Row(source, UNDETERMINED, pair("source"), pair("target"))
        except KeyError as error:
            return Finding(source, "missing_field", f"has no {error}")
        except (TypeError, ValidationError) as error:
            return Finding(source, "wrong_type", str(error)[:300])

    def settled(self, row: Row) -> Row | Finding:
        """The row with its language, or the first reason why it cannot be trained on."""
        for finding in self._findings_in_texts(row):
            return finding
        dominant, offered = self._config.dominant_language, None
        if row.language == UNDETERMINED:
            offered = self._config.languages
            row = replace(row, language=self._detector.detect(*row.target.texts()[-3:]))
        if row.language == dominant:
            return Finding(
                row.source,
                "target_untranslated",
                f"the target texts are in the dominant language, {dominant}",
            )
        if offered is not None and row.language not in offered:
            return Finding(
                row.source,
                "language_not_offered",
                f"the target texts are in {row.language}, which data.languages does not name",
            )
        return row

    def _findings_in_texts(self, row: Row) -> Iterator[Finding]:
        if not row.language:
            yield Finding(row.source, "empty_language", "language is empty; give a code such as sw")
        elif not is_unicode(row.language):
            yield Finding(
                row.source,
                "not_unicode",
                "language holds half of a surrogate pair; give a code such as sw",
            )
        for side, pair in row.pairs():
            yield from findings_in_pair(row.source, side, pair)
        dominant = self._config.dominant_language
        share = script_share("\n".join(row.dominant.texts()), dominant)
        if share < 0.5:
            yield Finding(
                row.source,
                "wrong_dominant_language",
                f"{share:.0%} of the letters of the dominant texts are of the script of {dominant},"
                " data.dominant_language",
            )
