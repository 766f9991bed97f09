"""What every command of this folder takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.output import Machine

RESULTS = Path(__file__).parent / "results"

Quick = Annotated[
    bool, typer.Option("--quick", help="Small sizes and few repetitions: under two minutes.")
]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for JSON and pictures; by default runs/benchmarks/<machine>."),
]
Repetitions = Annotated[
    int, typer.Option(help="Rounds of all candidates; a candidate stops after 5 s.", min=1)
]


def wide_console() -> Console:
    """The terminal; where output goes to a log, which has no edge, tables are not folded."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def set_up(
    threads: int, out: Path | None, *, on_cpu: bool = False
) -> tuple[torch.device, Machine, Path, Console]:
    """The GPU where there is one, unless the command runs on the CPU wherever it is; threads fixed;
    where results go, named after the device; and a line that says where this runs."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    machine, console = Machine.here(device), wide_console()
    console.print(
        f"[bold]{machine.device}[/], {machine.threads} threads, torch {machine.versions['torch']}"
    )
    if device.type == "cpu" and not on_cpu:
        console.print(
            "No GPU here: sizes that fit a laptop, and rows of candidates that need one say absent."
        )
    return device, machine, out or Path("runs/benchmarks") / machine.folder, console
