"""Where results go.

A table on the terminal and in Markdown, JSON with everything needed to judge them, and pictures.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Comparison, Row, Timing, W
from benchmarks.workloads import SEED

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "cut-cross-entropy",
    "quack-kernels",
    "mpo-kernels",
)
COLORS = {"ok": "#8fa3b8", "wrong": "#c0392b", "bound": "#d9d9d9"}
OURS = "#1f77b4"


class Machine(BaseModel):
    """Where it ran."""

    device: str
    cpu: str
    cores: int
    threads: int
    python: str
    versions: dict[str, str]

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """This process on this machine. Packages that are not installed are named as absent."""
        cpu = _cpu_name()
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {cpu}",
            cpu=cpu,
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            versions={name: _version(name) for name in PACKAGES},
        )

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.cores} cores".lower()).strip("-")


class Result(BaseModel):
    """What one command measured."""

    benchmark: str
    machine: Machine
    seed: int = SEED
    quick: bool
    comparisons: list[Comparison]


def announced(workloads: Sequence[W], console: Console) -> Iterator[W]:
    """Hands on each workload after a line that says which of how many it is."""
    for number, workload in enumerate(workloads, 1):
        console.print(
            f"{number} of {len(workloads)}: {workload.name}, {_listed(workload.settings())}",
            style="dim",
        )
        yield workload


COLUMNS = (
    "",
    "forward ms",
    "backward ms",
    "both ms (20-80%)",
    "peak MiB",
    "products",
    "worst error",
    "x least work",
    "x fastest peer",
    "",
)


def show(comparison: Comparison, console: Console) -> None:
    """A table: times with their 20th and 80th percentile, memory, matrix products, worst error, and
    time beside the least work's and the best peer's."""
    table = Table(title=_title(comparison), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for row, cells in zip(comparison.rows, _cells(comparison), strict=True):
        table.add_row(*cells, style=_style(row))
    console.print(table)


def markdown(result: Result) -> str:
    """The same tables, for a reader of the repository; rows of candidates that are absent are left
    out."""
    lines = [f"# {result.benchmark} on {result.machine.device}, {result.machine.threads} threads"]
    for comparison in result.comparisons:
        lines += ["", _title(comparison), "", f"| {' | '.join(COLUMNS)} |"]
        lines.append("|---" * len(COLUMNS) + "|")
        lines += [
            f"| {' | '.join(cells)} |"
            for row, cells in zip(comparison.rows, _cells(comparison), strict=True)
            if row.status != "absent"
        ]
    return "\n".join(lines) + "\n"


def _title(comparison: Comparison) -> str:
    return f"{comparison.workload}: {_listed(comparison.settings)}"


def _cells(comparison: Comparison) -> Iterator[list[str]]:
    """One for each row, a text for each column."""
    peer, ratios = comparison.fastest(ours=False), comparison.times_least_work
    for row in comparison.rows:
        yield [
            row.candidate,
            _median(row.forward),
            _median(row.backward),
            _spread(row.both),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            "" if row.products is None else f"{row.products:.2f}",
            f"{max(row.errors.values()):.1e}" if row.errors else "",
            f"{ratios[row.candidate]:.2f}" if row.candidate in ratios else "",
            _share(row, peer),
            row.status if row.status in ("ok", "bound") else f"{row.status}: {row.reason}",
        ]


def _style(row: Row) -> str | None:
    if row.ours:
        return "bold"
    if row.status in ("wrong", "failed"):
        return "red"
    return None if row.status == "ok" else "dim"


def _share(row: Row, peer: Row | None) -> str:
    """Its time in multiples of the peer's."""
    if row.both is None or peer is None or peer.both is None:
        return ""
    return f"{row.both.median / peer.both.median:.2f}"


def save(result: Result, folder: Path, console: Console, pictured: bool = True) -> Path:
    """`<folder>/<benchmark>.json`, its tables as Markdown and, unless the caller draws one of its
    own, a picture; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.benchmark}.json"
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    if pictured:
        draw(result, path.with_suffix(".png"))
    console.print(f"{path}, {path.with_suffix('.md').name} and {path.with_suffix('.png').name}")
    return path


def draw(result: Result, path: Path) -> None:
    """Time and memory of every candidate that ran, one line of panels per comparison."""
    lines = []
    for comparison in result.comparisons:
        rows = [row for row in comparison.rows if row.both is not None]
        drawn = [
            Rectangles(
                marked(r.candidate, r.status),
                OURS if r.ours else COLORS[r.status],
                _timing(r),
                r.peak_bytes or 0,
            )
            for r in rows
        ]
        lines.append((_title(comparison), drawn))
    panels(
        f"{result.benchmark} on {result.machine.device}, {result.machine.threads} threads",
        lines,
        path,
        time="forward and backward, ms",
        milliseconds=True,
        memory="peak memory above the inputs, gradients included, MiB",
    )


class Rectangles(NamedTuple):
    """The two rectangles of one candidate."""

    name: str
    color: str
    seconds: Timing
    peak_bytes: int


def panels(
    title: str,
    lines: Sequence[tuple[str, Sequence[Rectangles]]],
    path: Path,
    *,
    time: str,
    milliseconds: bool,
    memory: str,
) -> None:
    """A picture of horizontal rectangles: for each titled group a line of two panels, time and
    memory, its first candidate on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit = 1e3 if milliseconds else 1.0
    heights = [0.75 + 0.22 * len(group) for _, group in lines]
    figure, axes = plt.subplots(
        len(lines),
        2,
        figsize=(12, 0.6 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=10)
    for (left, right), (name, group) in zip(axes, lines, strict=True):
        rows = list(reversed(group))
        names, colors = [row.name for row in rows], [row.color for row in rows]
        _draw_times(left, rows, unit)
        left.set_xlabel(f"{time} (bars from the 20th to the 80th percentile)", fontsize=8)
        left.set_title(name, fontsize=8, loc="left")
        right.barh(names, [row.peak_bytes / 2**20 for row in rows], color=colors)
        right.set_xlabel(memory, fontsize=8)
        right.set_yticklabels([])
        for axis in (left, right):
            axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_times(axis: Any, rows: Sequence[Rectangles], unit: float) -> None:
    times = [row.seconds.median * unit for row in rows]
    low = [(row.seconds.median - row.seconds.p20) * unit for row in rows]
    high = [(row.seconds.p80 - row.seconds.median) * unit for row in rows]
    axis.barh(
        [row.name for row in rows],
        times,
        xerr=[low, high],
        color=[row.color for row in rows],
        capsize=2,
    )
    # One candidate that is far slower must not squeeze the others: its rectangle is cut and its
    # time written.
    limit = 3 * statistics.median(times)
    if max(times) <= limit:
        return
    axis.set_xlim(0, limit)
    for place, value in enumerate(times):
        if value > limit:
            text = f"{value:.0f} "
            axis.text(limit, place, text, ha="right", va="center", fontsize=8, color="white")


def marked(name: str, status: str) -> str:
    return name + (" (WRONG)" if status == "wrong" else "")


def _listed(settings: Mapping[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _timing(row: Row) -> Timing:
    assert row.both is not None
    return row.both


def _median(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median * 1e3:.2f}"


def _spread(timing: Timing | None) -> str:
    if timing is None:
        return ""
    return f"{timing.median * 1e3:.2f} ({timing.p20 * 1e3:.2f}-{timing.p80 * 1e3:.2f})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
