"""The loss from hidden states, side by side: `python -m benchmarks.linear [--quick]`."""

from __future__ import annotations

from dataclasses import replace

import torch
import typer

from benchmarks.candidates import from_hidden
from benchmarks.harness import compare
from benchmarks.objectives import MPO, OBJECTIVES
from benchmarks.options import Out, Quick, Repetitions, Threads, set_up
from benchmarks.output import Result, announced, save, show
from benchmarks.workloads import FromHidden


def workloads(device: torch.device, quick: bool) -> list[FromHidden]:
    """MPO at the centre with a trainable and with a frozen head, then with one size changed at a
    time; then other losses at the centre."""
    changes: list[dict] = []
    if device.type != "cpu":
        centre = FromHidden(4, 2048, 4096, 128256, dtype=torch.bfloat16, device=device)
        changes = [
            {"tokens": 512},
            {"tokens": 8192},
            {"vocab": 256000},
            {"hidden": 2048},
            {"scored": 0.25},
            {"scored": 1.0},
        ]
    elif quick:
        centre = FromHidden(1, 64, 128, 8000)
    else:
        # SmolLM2-135M's head, 160 of 256 tokens scored in each of two sequences.
        centre = FromHidden(1, 256, 576, 49152)
        changes = [
            {"tokens": 64},
            {"tokens": 1024},
            {"vocab": 128256},
            {"hidden": 1536},
            {"scored": 0.25},
            {"scored": 1.0},
        ]
    if quick:
        changes = []
    changes = [{"trainable": False}, *changes]
    changes += [{"objective": objective} for objective in OBJECTIVES if objective is not MPO]
    return [centre, *(replace(centre, **change) for change in changes)]


def main(
    quick: Quick = False, repetitions: Repetitions = 20, threads: Threads = 2, out: Out = None
) -> None:
    """MPO, DPO, SimPO, ORPO and a user's own loss from hidden states, forward and backward: plain
    PyTorch, torch.compile, Liger, TRL, cut-cross-entropy, torch's own, and ours."""
    device, machine, folder, console = set_up(threads, out)
    comparisons = []
    for workload in announced(workloads(device, quick), console):
        comparisons.append(
            compare(workload, from_hidden(), 3 if quick else repetitions, 0.5 if quick else 5.0)
        )
        show(comparisons[-1], console)
    save(
        Result(benchmark="linear", machine=machine, quick=quick, comparisons=comparisons),
        folder,
        console,
    )


if __name__ == "__main__":
    typer.run(main)
