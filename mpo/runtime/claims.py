"""Whose an output is: a lock that one process holds, and what tells one description of an output
from another."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mpo.runtime.files import writing


class Claim:
    """A lock file that one process holds, until it lets go or ends, however it ends. File systems
    without locks are not guarded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """Tries to get hold of it. Returns None, or who has it.

        Raises:
            UserError: the lock file cannot be made.
        """
        if self._file is not None:
            return None
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                return file.read(200) or "unknown"
        except OSError:
            file.close()
            return None
        with contextlib.suppress(OSError):  # who it is matters to people only
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"pid {os.getpid()} on {platform.node()}".encode())
        self._file = file
        return None

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock: not so on a file system without locks."""
        return self._file is not None

    def release(self) -> None:
        """Lets go of it."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Difference(NamedTuple):
    """A value that is another one in what lies there than in what is asked for here."""

    where: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.where} is {self.there!r} there and {self.here!r} here"


def differences(there: Any, here: Any, where: str = "") -> list[Difference]:
    """Every leaf of two nested dictionaries that differs. One that a side lacks is None there.

    >>> differences({"loss": {"beta": 1.0}}, {"loss": {"beta": 2.0}})
    [Difference(where='loss.beta', there=1.0, here=2.0)]
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            difference
            for key in dict.fromkeys([*there, *here])
            for difference in differences(
                there.get(key), here.get(key), f"{where}.{key}" if where else key
            )
        ]
    return [] if there == here else [Difference(where, there, here)]
