"""How time and memory grow: `python -m benchmarks.scaling [--quick]`.

Tokens, vocabulary and pairs are doubled one at a time; the exponent of each is fitted by least
squares on logarithms: 1 is linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.candidates import from_hidden
from benchmarks.harness import Comparison, compare
from benchmarks.options import Out, Quick, Repetitions, Threads, set_up
from benchmarks.output import OURS, Result, announced, save
from benchmarks.workloads import FromHidden

CANDIDATES = (
    "plain PyTorch",
    "plain, scored rows only",
    "Liger fused, chunk 1",
    "cut-cross-entropy",
    "mpo_kernels",
    "mpo_kernels, 32 MiB chunks",
)


def workloads(device: torch.device, quick: bool) -> dict[str, list[FromHidden]]:
    """One size doubled, and doubled again, by the name of it."""
    if device.type != "cpu":
        # Llama-3's vocabulary is its third size
        centre = FromHidden(4, 2048, 4096, 32064, dtype=torch.bfloat16, device=device)
    elif quick:
        centre = FromHidden(1, 64, 128, 8000)
    else:
        centre = FromHidden(2, 128, 576, 32000)
    factors = (1, 2) if quick else (1, 2, 4, 8)
    return {
        axis: [replace(centre, **{axis: getattr(centre, axis) * factor}) for factor in factors]
        for axis in ("tokens", "vocab", "pairs")
    }


def main(
    quick: Quick = False, repetitions: Repetitions = 20, threads: Threads = 2, out: Out = None
) -> None:
    """Time and memory against tokens, vocabulary and pairs, with fitted exponents."""
    device, machine, folder, console = set_up(threads, out)
    candidates = [candidate for candidate in from_hidden() if candidate.name in CANDIDATES]
    comparisons, sweeps = [], {}
    for axis, sizes in workloads(device, quick).items():
        sweeps[axis] = [
            compare(workload, candidates, 3 if quick else repetitions, 1.0 if quick else 5.0)
            for workload in announced(sizes, console)
        ]
        comparisons += sweeps[axis]
        _show(axis, sweeps[axis], console)
    result = Result(benchmark="scaling", machine=machine, quick=quick, comparisons=comparisons)
    path = save(result, folder, console, pictured=False)
    curves(sweeps, path.with_suffix(".png"), machine.device)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes) by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def points(
    sweep: Sequence[Comparison], axis: str
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Sizes, seconds and bytes of each candidate that is right at every size."""
    found = {}
    for name in [row.candidate for row in sweep[0].rows if row.status == "ok"]:
        rows = [
            next((r for r in c.rows if r.candidate == name and r.status == "ok"), None)
            for c in sweep
        ]
        if all(row is not None for row in rows):
            sizes = [float(comparison.settings[axis]) for comparison in sweep]
            found[name] = (
                sizes,
                [row.both.median for row in rows if row and row.both],
                [float(row.peak_bytes or 1) for row in rows if row],
            )
    return found


def curves(sweeps: dict[str, list[Comparison]], path: Path, machine: str) -> None:
    """Time and memory against size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(
        2, len(sweeps), figsize=(5 * len(sweeps), 7.5), layout="constrained"
    )
    figure.suptitle(f"from hidden states on {machine}", fontsize=10)
    for column, (axis, sweep) in enumerate(sweeps.items()):
        for name, (sizes, seconds, memory) in points(sweep, axis).items():
            ours = name.startswith("mpo")
            # one candidate's in all panels
            color = OURS if ours else f"C{CANDIDATES.index(name) + 1}"
            line = {
                "linewidth": 2.2 if ours else 1.2,
                "linestyle": "--" if "chunks" in name else "-",
            }
            style = {"color": color, "marker": "o", "markersize": 3, **line}
            axes[0][column].loglog(
                sizes,
                [s * 1e3 for s in seconds],
                label=f"{name} ({exponent(sizes, seconds):.2f})",
                **style,
            )
            axes[1][column].loglog(
                sizes,
                [m / 2**20 for m in memory],
                label=f"{name} ({exponent(sizes, memory):.2f})",
                **style,
            )
        for row, label in ((0, "forward and backward, ms"), (1, "peak above the inputs, MiB")):
            axes[row][column].set(
                xlabel=axis,
                ylabel=label,
                xticks=sizes,
                xticklabels=[f"{size:.0f}" for size in sizes],
            )
            axes[row][column].xaxis.set_minor_locator(NullLocator())
            axes[row][column].legend(fontsize=7, title="(fitted exponent)", title_fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axis: str, sweep: Sequence[Comparison], console: Console) -> None:
    table = Table(title=f"against {axis}", title_justify="left")
    for column in ("", *(str(c.settings[axis]) for c in sweep), "time ~", "memory ~"):
        table.add_column(column, justify="right" if column else "left")
    for name, (sizes, seconds, memory) in points(sweep, axis).items():
        cells = [
            f"{s * 1e3:.1f} ms, {m / 2**20:.0f} MiB" for s, m in zip(seconds, memory, strict=True)
        ]
        powers = [f"{axis}^{exponent(sizes, values):.2f}" for values in (seconds, memory)]
        table.add_row(name, *cells, *powers, style="bold" if name.startswith("mpo") else None)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
