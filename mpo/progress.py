"""What a person sees while a run goes on: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from mpo.terminal import console

if TYPE_CHECKING:  # for annotations only: a command that trains nothing need not wait seconds for the libraries behind them
    from mpo.batching import Schedule
    from mpo.config import Config
    from mpo.data import BadRow
    from mpo.tokenizing import Example

SECONDS_BETWEEN_LINES = 10
"""In a log a long task prints a line this often at most."""


class Progress:
    """Rank 0's view of the run; silent on the other ranks."""

    def __init__(self, enabled: bool) -> None:
        self.console = console(quiet=not enabled)

    def log(self, line: str) -> None:
        """Prints a line."""
        self.console.print(line, soft_wrap=True, markup=False)

    def header(
        self,
        config: Config,
        examples: Sequence[Example],
        measured: Sequence[Example],
        dropped: Sequence[BadRow],
        schedule: Schedule,
        world: int,
    ) -> None:
        """The run in a few lines: model, rows, dropped rows, batch arithmetic."""
        train = config.train
        dominant = len({(e.dominant_chosen, e.dominant_rejected) for e in examples})
        self.log(f"Model     {config.model.path} ({config.model.dtype}), ZeRO-{config.zero.stage}, {world} rank(s)")
        self.log(f"Training  {_by_language(examples)}, sharing {dominant} dominant pairs")
        self.log(f"Measured  {_by_language(measured)}")
        if dropped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(b.reason for b in dropped).most_common())
            self.log(f"Dropped   {len(dropped)} rows ({reasons}); see dropped_rows.jsonl")
        self.log(
            f"Steps     {schedule.steps} of {train.pairs_per_step} pairs (micro-batches of {train.pairs_per_micro_batch}), learning rate "
            f"{train.learning_rate:g} {train.schedule}, beta {config.loss.beta:g}, retention weight {config.loss.retention_weight:g}"
        )

    @contextmanager
    def task(self, name: str, total: int, unit: str = "sequences") -> Iterator[Callable[[int], None]]:
        """A bar over `total` of the unit. Yields the call that says how many more are done."""
        began = last_line = time.monotonic()
        done = 0
        with self._bars() as bars:
            bar = bars.add_task(name, total=total, detail="")

            def advance(count: int) -> None:
                nonlocal done, last_line
                done += count
                bars.advance(bar, count)
                if not self.console.is_terminal and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                    last_line = time.monotonic()
                    self.log(f"{name}: {done}/{total}")

            yield advance
        if not self.console.is_terminal:
            self.log(f"{name}: {done}/{total} {unit} in {time.monotonic() - began:.1f} s")

    @contextmanager
    def steps(self, total: int, done: int, every: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A bar over optimizer steps. Yields the call that shows a row of metrics; a log gets every `every`-th."""
        with self._bars() as bars:
            bar = bars.add_task("Training", total=total, completed=done, detail="")

            def show(row: dict[str, Any]) -> None:
                gaps = " ".join(f"{language} {gap:+.2f}" for language, gap in row["gap"].items())
                skipped = "  SKIPPED: non-finite gradients" if row["skipped"] else ""
                detail = (
                    f"loss {row['loss']:.4f}  L1 {row['l1']:.4f}  L2 {row['l2']:.2e}  {row['pairs'] / row['seconds']:.2f} pairs/s  "
                    f"gap {gaps}{skipped}"
                )
                bars.update(bar, completed=row["step"], detail=detail)
                if not self.console.is_terminal and (row["step"] % every == 0 or row["step"] == total or skipped):
                    self.log(f"step {row['step']}/{total}  {detail}")

            yield show

    def _bars(self) -> Bars:
        return Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            transient=not self.console.is_terminal,
            disable=not self.console.is_terminal,
        )


def _by_language(examples: Sequence[Example]) -> str:
    counts = Counter(e.language for e in examples)
    return f"{len(examples)} rows ({', '.join(f'{language} {n}' for language, n in sorted(counts.items()))})"
