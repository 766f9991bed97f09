"""Writing files so that an interruption leaves the old one or the new one, never a part.

What is being written lies beside its place under a name of its own that ends in `.incomplete`; only
a killed process leaves it there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, AnyStr, NamedTuple, TextIO

from safetensors import SafetensorError

from mpo.runtime.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk refuses within the block into a UserError that says what could not be
    written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written: {error}. Make room, or mend the place or its permissions;"
            " the same command goes on."
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Yields a UTF-8 file that takes the place of `path`, flushed to the disk, when the block ends
    without an exception.

    Raises:
        UserError: a full disk, no right to write, a folder of that name.
    """
    temporary = unfinished(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_entries(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON that every reader takes, with null for a number that is not finite, which
    JSON has no word for.

    The one place where this package makes JSON. Half of a surrogate pair becomes its escape: no
    encoding could write it.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(
            _with_nulls(value), ensure_ascii=ascii_only, indent=indent, allow_nan=False
        )
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def not_finite(value: Any, where: str = "") -> list[str]:
    """Places of the numbers in `value` that are not finite, such as
    `languages.sw.distance.after`."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [where]
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return [
        place
        for key, part in parts
        for place in not_finite(part, f"{where}.{key}" if where else str(key))
    ]


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON through a temporary file and a rename. Raises UserError as `new_file`
    does."""
    with new_file(path) as file:
        file.write(to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file that this package wrote. Raises UserError where it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete the folder {path.parent} or restore the file."
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object that this package wrote. Raises UserError where it is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} cannot be read (it holds {type(value).__name__}, not an object). Delete the"
            f" folder {path.parent} or restore the file."
        )
    return value


class JsonLine(NamedTuple):
    """A line of a JSONL file."""

    number: int
    """From 1."""
    begin: int
    end: int
    """The line is [begin, end) of what was read, without its line break."""
    value: Any


class BadLine(Exception):
    """A line of a JSONL file that is no JSON, or not what it should be."""

    def __init__(self, line: JsonLine, why: Exception) -> None:
        super().__init__(f"line {line.number}: {why}")
        self.line, self.why = line, why


def json_lines(content: AnyStr) -> Iterator[JsonLine]:
    """The lines of a JSONL file that are not blank. Raises BadLine.

    >>> [line.value for line in json_lines('{"step": 1}\\n\\n{"step": 2}\\n')]
    [{'step': 1}, {'step': 2}]
    """
    begin = 0
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    lines = content.split("\n") if isinstance(content, str) else content.split(b"\n")
    for number, text in enumerate(lines, start=1):
        line = JsonLine(number, begin, begin + len(text), None)
        if text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadLine(line, error) from error
            yield line._replace(value=value)
        begin = line.end + 1


def no_json(path: Path, why: Exception, line: int | None = None) -> UserError:
    """What to tell the user of a file, or a line of one, that `json` does not read."""
    if isinstance(why, json.JSONDecodeError):
        return UserError(
            f"{path}, line {line or why.lineno}, column {why.colno}: no valid JSON ({why.msg})."
        )
    where = str(path) if line is None else f"{path}, line {line}"
    if isinstance(why, RecursionError):
        return UserError(f"{where}: no valid JSON of rows (it is nested too deeply).")
    # no text, or an integer of thousands of digits
    return UserError(f"{where}: no valid JSON ({why}).")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `path` when the block ends without an
    exception. A link is followed.

    Raises:
        UserError: a full disk, no right to write, a file of that name.
    """
    path = Path(os.path.realpath(path))  # of a link to itself too
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path} is a file, and a folder is to lie there. Move it away, or name another folder."
        )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = unfinished(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished folder its name. One that has the name already is moved aside in one piece,
    and then removed."""
    aside = unfinished(path)
    if os.path.lexists(path):
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        if os.path.lexists(aside):
            os.replace(aside, path)
        raise
    _sync_entries(path.parent)
    remove(aside)


def remove_incomplete(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left half written of that name, or of any. For a process that
    has claimed it."""
    for path in folder.glob(
        f".{'*' if name is None else glob.escape(name)}.{'[0-9a-f]' * 8}.incomplete"
    ):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def unfinished(path: Path) -> Path:
    """A name for something unfinished, which no other process has: file systems without locks
    exist."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")


def sync_file(path: Path) -> None:
    """Waits until a file is on the disk, which may only then notice that it is full."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_entries(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the file system can tell."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def home(name: str) -> str:
    """The name with `~` replaced by the home folder, which no shell does inside output_dir=~/run.

    Raises:
        UserError: there is no home folder.
    """
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        raise UserError(
            f"{name}: {error} Set HOME, or write the whole path (for the models of PyPI: set"
            " MPO_CACHE)."
        ) from error
