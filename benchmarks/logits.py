"""The loss from logits, side by side: `python -m benchmarks.logits [--quick]`."""

from __future__ import annotations

import torch
import typer

from benchmarks.candidates import from_logits
from benchmarks.harness import compare
from benchmarks.options import Out, Quick, Repetitions, Threads, set_up
from benchmarks.output import Result, announced, save, show
from benchmarks.workloads import FromLogits


def workloads(device: torch.device, quick: bool) -> list[FromLogits]:
    """Real vocabularies: SmolLM2, Llama-3.1, Gemma-2. A GPU gets a micro-batch of four pairs of
    2048 tokens."""
    on_gpu = device.type != "cpu"
    tokens, pairs = (64, 1) if quick else (2048, 4) if on_gpu else (256, 1)
    vocabularies = (49152,) if quick else (128256, 256000) if on_gpu else (49152, 128256)
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    return [
        FromLogits(pairs, tokens, vocab, dtype=dtype, device=device)
        for vocab in vocabularies
        for dtype in dtypes
    ]


def main(
    quick: Quick = False, repetitions: Repetitions = 20, threads: Threads = 2, out: Out = None
) -> None:
    """Forward and backward from logits: plain PyTorch, torch.compile, TRL, Liger, quack and this
    package."""
    device, machine, folder, console = set_up(threads, out)
    comparisons = []
    for workload in announced(workloads(device, quick), console):
        comparisons.append(
            compare(workload, from_logits(), 5 if quick else repetitions, 2.0 if quick else 5.0)
        )
        show(comparisons[-1], console)
    save(
        Result(benchmark="logits", machine=machine, quick=quick, comparisons=comparisons),
        folder,
        console,
    )


if __name__ == "__main__":
    typer.run(main)
