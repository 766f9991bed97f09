"""Standard output and standard error as the user has them: of any encoding, into a pipe whose
reader leaves, onto a full disk."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH_OF_A_LOG = 140
"""Columns of what is no terminal: a log has no edge, and its tables should not be folded."""
_SPELLED = {"→": "->", "…": "...", "–": "-", "—": "-", "×": "x"}


def console(quiet: bool = False) -> Console:
    """A console on standard output to which every text is a text: names in brackets are no markup,
    `:x:` is no picture."""
    made = Console(quiet=quiet, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = WIDTH_OF_A_LOG
    return made


def moves(console: Console) -> bool:
    """Whether a line may be drawn again and again: on a terminal that understands how, and not into
    a pipe that only wants the colours."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and bool(getattr(console.file, "isatty", bool)())
    )


def show_table(table: Table, console: Console) -> None:
    """The table, or where the terminal is too narrow for its words, its rows below each other."""
    if (
        console.measure(table, options=console.options.update(max_width=1_000_000)).minimum
        <= console.width
    ):
        console.print(table)
        return
    console.print(table.title)
    headers = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        console.print()
        for header, cell in zip(headers, row, strict=True):
            if cell:
                console.print(f"{header}: {str(cell).replace(chr(10), '')}", soft_wrap=True)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """As much of the end of each path as tells it from the others.

    >>> distinct_names(["runs/a/model", "runs/b/model"])
    ['a/model', 'b/model']
    """
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = [str(Path(*part[-count:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


class Streams:
    """Puts both standard streams behind `_Stream`, and tells at the end whether something is
    lost."""

    def __init__(self) -> None:
        codecs.register_error("mpo", _spell_out)
        sys.stdout = self._out = _Stream.of(sys.stdout)
        sys.stderr = _Stream.of(sys.stderr)

    def lost(self) -> str | None:
        """Why standard output is not whole, or None if it is, or if its reader wanted no more."""
        if self._out is None:
            return None
        self._out.flush()
        return (
            None
            if self._out.failure is None
            else self._out.failure.strerror or str(self._out.failure)
        )


class _Stream:
    """A text stream that fails nobody: letters that its encoding lacks are spelled out, and what
    cannot be written goes nowhere.

    A run is worth more than its log, so that neither a pager that is closed nor a full disk behind
    the log ends it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="mpo")

    @classmethod
    def of(cls, stream: Any) -> Any:
        """The stream itself where the process was started without one."""
        return None if stream is None else cls(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or gives up the stream for good."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """As `write`."""
        self.write("".join(lines))

    def flush(self) -> None:
        """As `write`."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:
            self.failure = self.failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: arrows and dashes in ASCII, other letters by their number."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return (
        "".join(_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters),
        error.end,
    )
