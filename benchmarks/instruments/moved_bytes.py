"""Bytes that the kernels move for one loss from logits, counted in Triton's interpreter. Prints
JSON, one entry per vocabulary:

TRITON_INTERPRET=1 MPO_KERNELS_BACKEND=triton python -m benchmarks.instruments.moved_bytes 8192
20011
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

PAIRS, TOKENS = 2, 6


def moved(vocab: int) -> dict[str, float]:
    """For bf16 logits: bytes per element forward and backward, forward bytes of a call that scores
    nothing but one row per sequence, beyond those rows, and new memory in place as a share of the
    logits."""
    import mpo_kernels
    from benchmarks.instruments.operators import Memory
    from benchmarks.instruments.traffic import Meter

    labels = torch.randint(
        0, vocab, (2 * PAIRS, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    logits = torch.randn(
        2 * PAIRS, TOKENS, vocab, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    gap = torch.zeros(PAIRS)
    with Meter() as meter:
        mpo_kernels.mpo_loss(
            logits.clone().requires_grad_(), labels, gap, validate=False
        ).loss.backward()
    assert meter.clean, (meter.out_of_bounds, meter.races, meter.hazards, meter.uninitialised)
    one = labels.clone()
    one[:, :-1] = -100
    with Meter() as few:
        mpo_kernels.mpo_loss(logits, one, gap, validate=False)
    working = logits.clone().requires_grad_() * 1
    with Memory() as memory:
        loss = mpo_kernels.mpo_loss(
            working, labels, gap, inplace_backward=True, validate=False
        ).loss
        torch.autograd.grad(loss, working)
    total = meter.loaded.total() + meter.stored.total()
    return {
        "bytes_per_element": total / logits.numel(),
        "bytes_of_ignored_rows": few.loaded["logits_ptr"] - (vocab + 1) * 2 * 2 * PAIRS,
        "in_place_share": memory.total / logits.nbytes,
    }


def in_interpreter(vocabularies: list[int]) -> dict[str, dict[str, float]]:
    """`moved` of each vocabulary, from a process of its own: the interpreter must be chosen before
    triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MPO_KERNELS_BACKEND": "triton"}
    command = [sys.executable, "-m", "benchmarks.instruments.moved_bytes", *map(str, vocabularies)]
    return json.loads(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    print(json.dumps({vocab: moved(int(vocab)) for vocab in sys.argv[1:]}))
