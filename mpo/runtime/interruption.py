"""Stopping: a request ends a run between two steps, with a checkpoint, and everything else at once.
Several signals may be one request.

Imported before anything slow, so that a Ctrl-C while libraries load is one already.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType

from mpo.runtime.errors import Status

SENTENCE = "Interrupted. What was finished is kept, and the same command goes on from there."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOMENT = 2.0
"""Seconds within which a second Ctrl-C is the first one: a launcher passes on the signal that the
terminal sent to its ranks, too."""


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint to go on from."""


class Interruption:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._deferred: str | None = None
        self._pass_on: Callable[[int], None] | None = None
        self.ending = False
        """Nothing is left to do but for the interpreter, which a signal need not wait for."""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._since is not None

    @contextmanager
    def deferred(self, until: str) -> Iterator[None]:
        """Within the block a request is left to who reads `requested`, and the user is told when
        that is."""
        self._deferred = until
        try:
            yield
        finally:
            self._deferred = None

    @contextmanager
    def passed_on(self, to: Callable[[int], None]) -> Iterator[None]:
        """Within the block `to` gets the number of every signal, such as a process that knows what
        to do with it, and nothing else happens here."""
        self._pass_on = to
        try:
            yield
        finally:
            self._pass_on = None

    def heed(self) -> None:
        """Raises KeyboardInterrupt if a request came that nobody has heeded."""
        if self.requested:
            raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. All are one request, but for another Ctrl-C after a moment: a person
        who does not want to wait.

        Raises:
            KeyboardInterrupt: the request is not deferred, or is repeated.
        """
        if self.ending:
            os._exit(Status.INTERRUPTED)
        if self._pass_on is not None:
            self._since = self._since or monotonic()
            self._pass_on(number)
            return
        if self._since is None:
            self._since = monotonic()
            if self._deferred:
                _say(f"Stopping {self._deferred}. Ctrl-C again ends it at once.")
                return
        elif number != signal.SIGINT or monotonic() - self._since < MOMENT:
            return
        raise KeyboardInterrupt


def _say(line: str) -> None:
    """On rank 0 to standard error, past its buffer: a print may be what the signal interrupted, and
    the terminal may be closed."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


_current: Interruption | None = None


def install() -> Interruption:
    """From here on SIGTERM, Ctrl-C and a terminal that closes are noted in what it returns, to the
    end of the process.

    A signal that the process was told to ignore, as `nohup` does, stays ignored.
    """
    global _current
    _current = Interruption()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _current.note)
    return _current


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """As `install`, within the block only. What is installed already stays, and is shared."""
    global _current
    # only the main thread may handle signals
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Interruption()
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield install()
    finally:
        _current = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether this process was asked to stop: then that is why something failed."""
    return _current is not None and _current.requested
