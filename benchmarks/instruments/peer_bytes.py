"""Bytes per bf16 logit for the loss of log-probabilities, forward and backward, of this package and
of the peers whose kernels start from logits. Counted: what kernels ask for, in Triton's
interpreter, and the tensors that torch's operations read and write. Prints JSON:

TRITON_INTERPRET=1 MPO_KERNELS_BACKEND=triton python -m benchmarks.instruments.peer_bytes 8192 20011
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from pydantic import BaseModel, TypeAdapter

from benchmarks.objectives import MPO

PAIRS, TOKENS = 2, 6


class Bytes(BaseModel):
    """Per logit; None, with the reason, where the peer is absent."""

    kernels: float | None = None
    torch: float | None = None
    ignored: float | None = None
    """Of both kinds, per logit of a row that is not scored."""
    reason: str = ""


Moved = dict[str, dict[str, Bytes]]
"""By vocabulary and candidate."""


def _ours(logits: torch.Tensor, labels: torch.Tensor, inplace: bool) -> torch.Tensor:
    import mpo_kernels

    return mpo_kernels.mpo_loss(
        logits, labels, torch.zeros(PAIRS), inplace_backward=inplace, validate=False
    ).loss


def _liger(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from benchmarks.instruments.peers import liger

    return MPO.of_tokens(liger(logits, labels), labels)


def _trl(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from benchmarks.instruments.peers import trl

    return MPO.of_tokens(trl(logits, labels), labels)


CANDIDATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mpo_kernels": functools.partial(_ours, inplace=False),
    "mpo_kernels in place": functools.partial(_ours, inplace=True),
    "Liger cross-entropy": _liger,
    "TRL selective log-softmax": _trl,
}


def moved(vocab: int) -> dict[str, Bytes]:
    """Of every candidate."""
    return {name: _of(loss, vocab) for name, loss in CANDIDATES.items()}


def _of(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], vocab: int) -> Bytes:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (2 * PAIRS, TOKENS), generator=generator)
    logits = torch.randn(2 * PAIRS, TOKENS, vocab, generator=generator).bfloat16()
    few = labels.clone()
    few[:, :-1] = -100
    try:
        kernels, other = _count(loss, logits, labels)
        all_of_few = sum(_count(loss, logits, few))
    except Exception as reason:  # a peer may fail in any way; its row says how
        return Bytes(reason=f"{type(reason).__name__}: {reason}".splitlines()[0])
    scored = logits.numel() // TOKENS  # logits of the rows that `few` scores
    ignored = (all_of_few - (kernels + other) / TOKENS) / (logits.numel() - scored)
    return Bytes(kernels=kernels / logits.numel(), torch=other / logits.numel(), ignored=ignored)


def _count(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[int, int]:  # by kernels, by torch
    from benchmarks.instruments.operators import Moved as OfTorch
    from benchmarks.instruments.traffic import Meter

    working = logits.clone().requires_grad_() * 1  # no leaf: those may not be written over
    with Meter() as meter, OfTorch() as of_torch:
        torch.autograd.grad(loss(working, labels), working)
    return meter.loaded.total() + meter.stored.total(), of_torch.total


def in_interpreter(vocabularies: list[int]) -> Moved:
    """`moved` of each vocabulary, from a process of its own: the interpreter must be chosen before
    triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MPO_KERNELS_BACKEND": "triton"}
    command = [sys.executable, "-m", "benchmarks.instruments.peer_bytes", *map(str, vocabularies)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return TypeAdapter(Moved).validate_json(done.stdout)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                vocab: {name: found.model_dump() for name, found in moved(int(vocab)).items()}
                for vocab in sys.argv[1:]
            }
        )
    )
