"""The ways of a loss to its gradient, side by side: `python -m benchmarks.engines [--quick]`.

    kept logits             `linear_token_logprobs` and autograd: the logits of up to one chunk stay
                            until backward, where any upstream gradient is known. More rows are
                            computed again.
    chunk loop              `linear_sequence_loss` held to its loop over chunks, which a compiler
                            takes at any size: the loss is called in the loop, and gradients are
                            made in forward.
    linear_sequence_loss    as it comes: it takes the first way for a single chunk, else the second
    linear_mpo_loss         the loop with one kernel for the loss

below, at and above one chunk, and where a pair alone is larger than that. All compute MPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import torch
import typer

from benchmarks.candidates import (
    ours_of_mpo,
    ours_of_sequences,
    ours_of_tokens,
    plain_on_scored_rows,
)
from benchmarks.harness import Candidate, Inputs, Loss, compare
from benchmarks.options import Out, Quick, Repetitions, Threads, set_up
from benchmarks.output import Result, announced, save, show
from benchmarks.workloads import FromHidden
from mpo_kernels import sequence_losses


@dataclass
class Chunked(FromHidden):
    """All tokens are scored, `chunk_rows` of them at once."""

    scored: float = 1.0
    chunk_rows: int = 512
    place: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.place
        self.chunk_bytes = self.chunk_rows * self.vocab * self.dtype.itemsize

    def settings(self) -> dict[str, str | int | float]:
        rows = 2 * self.pairs * self.tokens
        return {**super().settings(), "rows": rows, "chunk_rows": self.chunk_rows}


def _in_the_loop(workload: Chunked) -> Loss:
    chosen = ours_of_sequences(workload, workload.chunk_bytes)

    def loss(inputs: Inputs) -> torch.Tensor:
        with patch.object(sequence_losses, "_is_told_in_the_loop", lambda *_: True):
            return chosen(inputs)

    return loss


CANDIDATES: list[Candidate[Chunked]] = [
    Candidate("plain, scored rows only", plain_on_scored_rows),
    Candidate("kept logits", lambda w: ours_of_tokens(w, w.chunk_bytes), ours=True),
    Candidate("chunk loop", _in_the_loop, ours=True),
    Candidate("linear_sequence_loss", lambda w: ours_of_sequences(w, w.chunk_bytes), ours=True),
    Candidate("linear_mpo_loss", lambda w: ours_of_mpo(w, w.chunk_bytes), ours=True),
]


def workloads(device: torch.device, quick: bool) -> list[Chunked]:
    """Four places in each dtype; pairs take a quarter of a chunk, or three halves."""
    if device.type != "cpu":
        hidden, vocab, rows, dtypes = 4096, 128256, 2048, [torch.bfloat16]
    else:
        hidden, vocab, rows = (128, 8000, 128) if quick else (576, 49152, 512)
        dtypes = [torch.float32, torch.bfloat16]
    places = {
        "half a chunk": (2, rows // 8),
        "one chunk": (4, rows // 8),
        "two chunks": (8, rows // 8),
        "pairs larger than a chunk": (2, rows * 3 // 4),
    }
    return [
        Chunked(
            pairs, tokens, hidden, vocab, dtype=dtype, device=device, chunk_rows=rows, place=place
        )
        for dtype in dtypes
        for place, (pairs, tokens) in places.items()
    ]


def main(
    quick: Quick = False, repetitions: Repetitions = 20, threads: Threads = 2, out: Out = None
) -> None:
    """MPO by kept logits, by a loop over chunks and by its own function."""
    device, machine, folder, console = set_up(threads, out)
    comparisons = []
    for workload in announced(workloads(device, quick), console):
        comparisons.append(
            compare(workload, CANDIDATES, 3 if quick else repetitions, 0.5 if quick else 5.0)
        )
        show(comparisons[-1], console)
    save(
        Result(benchmark="engines", machine=machine, quick=quick, comparisons=comparisons),
        folder,
        console,
    )


if __name__ == "__main__":
    typer.run(main)
