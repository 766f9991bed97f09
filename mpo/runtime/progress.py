"""What a person sees while a run goes on: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from mpo.runtime.terminal import console, moves

SECONDS_BETWEEN_LINES = 10
"""In a log a long task prints a line this often at most."""
BAR = 20
"""Columns of a bar, which is drawn where nothing else needs them."""
GAP = 2
"""Columns between the parts of a line."""


ShowStep = Callable[[int, Sequence[str], bool], None]


class Progress:
    """Rank 0's view of the run; silent on the other ranks."""

    def __init__(self, enabled: bool) -> None:
        self.console = console(quiet=not enabled)
        self._bars_move = moves(self.console)

    def log(self, line: str) -> None:
        """Prints a line."""
        self.console.print(line, soft_wrap=True, markup=False)

    @contextmanager
    def task(
        self, name: str, total: int, unit: str = "sequences"
    ) -> Iterator[Callable[[int], None]]:
        """A bar over `total` of the unit. Yields the call that says how many more are done."""
        began = last_line = time.monotonic()
        done = 0
        with self._bars() as bars:
            bar = bars.add_task(name, total=total, details=())

            def advance(count: int) -> None:
                nonlocal done, last_line
                done += count
                bars.advance(bar, count)
                if not self._bars_move and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    self.log(f"{name}: {done}/{total}")

            yield advance
        if not self._bars_move:
            self.log(f"{name}: {done}/{total} {unit} in {time.monotonic() - began:.1f} s")

    @contextmanager
    def steps(self, total: int, done: int, every: int) -> Iterator[ShowStep]:
        """A bar over optimizer steps. Yields the call that shows one: how many are done, details
        with the most important first, and whether a log gets it in any case; else it gets every
        `every`-th."""
        with self._bars() as bars:
            bar = bars.add_task("Training", total=total, completed=done, details=())

            def show(step: int, details: Sequence[str], is_remarkable: bool = False) -> None:
                bars.update(bar, completed=step, details=details)
                if not self._bars_move and (step % every == 0 or step == total or is_remarkable):
                    self.log("  ".join([f"step {step}/{total}", *details]))

            yield show

    def _bars(self) -> Bars:
        return Bars(
            _Line(self.console),
            console=self.console,
            transient=not self._bars_move,
            disable=not self._bars_move,
        )


class _Line(ProgressColumn):
    """A task in one line that fits the terminal: how much is done, the time and the first detail
    before all else, the bar after all."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """As rich calls it, several times a second."""
        width, (most_important, *details) = self._console.width, task.fields["details"] or [""]
        done = f"{task.completed:.0f}/{task.total or 0:.0f}"
        times = f"{_clock(task.elapsed)} <{_clock(task.time_remaining)}"
        parts = [
            (done, "progress.download"),
            (times, "progress.elapsed"),
            *([(most_important, "")] if most_important else []),
        ]
        if _width(parts) > width:
            parts[1] = (_clock(task.elapsed), "progress.elapsed")
        name = " ".join(task.description.split())
        room = width - _width(parts) - GAP
        if room >= min(8, cell_len(name)):
            parts.insert(0, (_shortened(name, room), ""))
        for place, detail in enumerate(details, 1):
            more = GAP + 1 if place < len(details) else 0  # room to say that there is more
            if _width([*parts, (detail, "")]) + more > width:
                parts.append(("…", ""))
                break
            parts.append((detail, ""))
        text = Text(" " * GAP).join(Text(*part) for part in parts)
        if _width(parts) + GAP + BAR <= width:
            full = round(BAR * task.percentage / 100)
            mark = "-" if self._console.options.ascii_only else "━"
            text.append(" " * GAP).append(mark * full, "bar.complete").append(
                mark * (BAR - full), "bar.back"
            )
        return text


def _width(parts: Sequence[tuple[str, str]]) -> int:
    return sum(cell_len(text) for text, _ in parts) + GAP * (len(parts) - 1)


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds, or dashes for what is not known yet."""
    return (
        "-:--:--"
        if seconds is None
        else f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
    )


def _shortened(name: str, room: int) -> str:
    """The name, or its two ends, in at most `room` columns."""
    if cell_len(name) <= room:
        return name
    tail = name[::-1]
    return (
        set_cell_size(name, room // 2).rstrip()
        + "…"
        + set_cell_size(tail, (room - 1) - room // 2).rstrip()[::-1]
    )
