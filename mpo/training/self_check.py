"""Whether the model before the first step is its own reference."""

from __future__ import annotations

import torch

from mpo.config import Config
from mpo.models.attention import shares_prompts
from mpo.models.forward import Outputs
from mpo.models.scoring import Scorer
from mpo.runtime.errors import UserError
from mpo.training.micro_batches import in_micro_batches, make_batch
from mpo.training.reference import Reference, dominant_sequences
from mpo.training.run import Run


def self_check(run: Run, scorer: Scorer, reference: Reference) -> None:
    """Before the first step the policy is the reference: L2 must vanish and the dominant gap must
    reproduce the store.

    A difference means that training would pull toward the wrong place: dropout that is on, a store
    of another model, a packed neighbour that leaks. Compared in training mode, packed with other
    sequences than the store's.

    Raises:
        UserError: they differ, with both numbers.
    """
    probe = run.examples[:2]
    first = probe[0]
    l2, size = _l2_of_a_batch(run, scorer, reference)
    relative = l2 / len(probe) / max(size, 1e-30)
    gap = float(scorer.measure([first]).dominant[0])
    stored = reference.look_up(dominant_sequences(probe)).gap(first)
    allowed_l2, allowed_gap = _tolerances(run.config)
    if not relative <= allowed_l2 or not abs(gap - stored) <= allowed_gap:
        raise UserError(
            f"Step-0 self-check failed on {first.source}: before any training, relative L2 is"
            f" {relative:.2e} (should be 0) and the dominant gap is {gap:.4f} while the reference"
            f" store holds {stored:.4f}. Turn off dropout in the model's config, try"
            " model.attention=packed, and delete the reference folder if the model changed."
        )


def _l2_of_a_batch(run: Run, scorer: Scorer, reference: Reference) -> tuple[float, float]:
    """L2 of the first two examples in one batch, and the mean square of what it compares with."""
    config, probe = run.config, run.examples[:2]
    (part,) = in_micro_batches(
        probe, pairs=len(probe), tokens=None, share_prompts=shares_prompts(config.model.attention)
    )
    batch = make_batch(part, reference.look_up(part.reference_sequences()), config).to(run.device)
    with torch.no_grad():
        output: Outputs = scorer.engine(batch=batch)
    return float(output.l2), float(batch.pooled_reference.square().mean())


def _tolerances(config: Config) -> tuple[float, float]:
    """Of the relative L2 and of the gap."""
    return (1e-3, 0.1) if config.model.dtype == "bfloat16" else (1e-6, 1e-3)
