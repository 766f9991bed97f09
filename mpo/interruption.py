"""Stopping a run between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint to go on from."""


class Interruption:
    """Whether this process was asked to stop."""

    requested = False


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Within the block the first SIGTERM or Ctrl-C only asks the loop to stop at its next step; a second one ends it at once."""
    state = Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        if state.requested:
            raise KeyboardInterrupt
        state.requested = True

    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
