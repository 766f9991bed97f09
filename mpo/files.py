"""Writing files so that an interruption leaves the old one or the new one, never a part."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mpo.errors import UserError


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Yields a UTF-8 file that takes the place of `path`, flushed to the disk, when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:  # with the rights that the umask leaves
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON that every reader takes, with null for a number that is not finite, which JSON has no word for.

    The one place where this package makes JSON. Half of a surrogate pair becomes its escape: no encoding could write it.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_with_nulls(value), ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_finite(value: Any, where: str = "") -> list[str]:
    """Places of the numbers in `value` that are not finite, such as `languages.sw.distance.after`."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [where]
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [place for key, part in parts for place in not_finite(part, f"{where}.{key}" if where else str(key))]


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON through a temporary file and a rename."""
    with new_file(path) as file:
        file.write(to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file that this package wrote. Raises UserError where it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete the folder {path.parent} or restore the file.") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty sibling of `path` that takes its place when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def sha256_of_files(paths: list[Path]) -> str:
    """SHA-256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
