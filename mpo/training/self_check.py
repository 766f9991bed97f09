"""Whether the model before the first step is its own reference."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpo.config import Config
from mpo.models.attention import shares_prompts
from mpo.models.forward import Outputs
from mpo.models.packing import Batch
from mpo.models.scoring import Scorer
from mpo.runtime.errors import UserError
from mpo.training.kl import MismatchedAnswers
from mpo.training.micro_batches import in_micro_batches, make_batch
from mpo.training.objective import Objective
from mpo.training.reference import Reference, dominant_sequences
from mpo.training.run import Run


def self_check(
    run: Run, scorer: Scorer, reference: Reference, mismatched: MismatchedAnswers
) -> None:
    """Before the first step the policy is the reference: L2 must vanish, the dominant gap must
    reproduce the store, and a loss of log-ratios must be what it is where they are 0 (log 2 for
    DPO, 1/2 for KTO); those of answers to other prompts must be 0 too.

    A difference means that training would pull toward the wrong place: dropout that is on, a store
    of another model, a packed neighbour that leaks. Compared in training mode, packed with other
    sequences than the store's.

    Raises:
        UserError: they differ, with both numbers.
    """
    objective = Objective(run.config.loss)
    if not objective.takes_reference:
        return
    batch, output = _first_batch(run, scorer, reference, objective)
    found = []
    if objective.pools_dominant:
        found.append(_l2(run, batch, output))
    if objective.takes_dominant:
        found.append(_dominant_gap(run, scorer, reference))
    if objective.takes_logps:
        found.append(_loss(run, objective, batch, output))
    if objective.takes_kl:
        found.append(_log_ratios(run, mismatched))
    if not all(each.is_right for each in found):
        raise UserError(
            f"Step-0 self-check failed on {run.examples[0].source}: before any training,"
            f" {' and '.join(each.words for each in found)}. Turn off dropout in the model's"
            " config, try model.attention=packed, and delete the reference folder if the model"
            " changed."
        )


class _Found(NamedTuple):
    """A number beside what it has to be."""

    is_right: bool
    words: str


def _first_batch(
    run: Run, scorer: Scorer, reference: Reference, objective: Objective
) -> tuple[Batch, Outputs]:
    """The first two examples in one batch, and what comes of it without gradients."""
    config, probe = run.config, run.examples[:2]
    (part,) = in_micro_batches(
        probe,
        objective,
        pairs=len(probe),
        tokens=None,
        share_prompts=shares_prompts(config.model.attention),
    )
    store = reference.look_up(part.reference_sequences(objective))
    of_step = {**objective.numbers_of_step(probe), "kl": 0.0}
    batch = make_batch(part, objective, store, config, of_step).to(run.device)
    with torch.no_grad():
        return batch, scorer.engine(batch=batch)


def _l2(run: Run, batch: Batch, output: Outputs) -> _Found:
    size = float(batch.pooled_reference.square().mean())
    relative = float(output.l2) / len(run.examples[:2]) / max(size, 1e-30)
    return _Found(
        relative <= _tolerances(run.config)[0], f"relative L2 is {relative:.2e} (should be 0)"
    )


def _dominant_gap(run: Run, scorer: Scorer, reference: Reference) -> _Found:
    probe = run.examples[:2]
    gap = float(scorer.measure(probe[:1]).dominant[0])
    stored = reference.look_up(dominant_sequences(probe)).gap(probe[0])
    return _Found(
        abs(gap - stored) <= _tolerances(run.config)[1],
        f"the dominant gap is {gap:.4f} while the reference store holds {stored:.4f}",
    )


def _loss(run: Run, objective: Objective, batch: Batch, output: Outputs) -> _Found:
    value, rows = float(output.l1), len(run.examples[:2])
    from_reference, allowed = objective.at_reference(batch, _tolerances(run.config)[1])
    return _Found(
        abs(value - from_reference) <= allowed,
        f"{run.config.loss.name} is {value / rows:.6f} (should be {from_reference / rows:.6f})",
    )


def _log_ratios(run: Run, mismatched: MismatchedAnswers) -> _Found:
    sequences = mismatched.of_rows(range(len(run.examples[:2])))
    largest = float(mismatched.log_ratios(sequences).abs().max())
    return _Found(
        largest <= _tolerances(run.config)[1],
        f"answers to other prompts are up to {largest:.4f} nats per token away from the"
        " reference's (should be 0)",
    )


def _tolerances(config: Config) -> tuple[float, float]:
    """Of the relative L2, and of a gap in nats per token."""
    return (1e-3, 0.1) if config.model.dtype == "bfloat16" else (1e-6, 1e-3)
