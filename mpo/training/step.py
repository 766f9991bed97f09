"""One optimizer step.

Gradients are exact averages over the pairs of a step whatever the number of ranks and
micro-batches: each micro-batch's backward starts from (sum over its pairs) * world / (pairs of the
step), and DeepSpeed averages over ranks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import deepspeed
import deepspeed.comm as dist
import torch

from mpo.models.packing import Batch
from mpo.training.engine import OptimizerGuard, learning_rate, peak_memory_gib
from mpo.training.kl import MismatchedAnswers
from mpo.training.metrics import StepMetrics, StepSums
from mpo.training.micro_batches import Batches, MicroBatch, make_batch
from mpo.training.reference import Reference
from mpo.training.run import Run


@dataclass(frozen=True)
class Stepper:
    """What every optimizer step of a run works with."""

    run: Run
    engine: deepspeed.DeepSpeedEngine
    guard: OptimizerGuard
    reference: Reference
    mismatched: MismatchedAnswers
    batches: Batches

    def step(self, number: int, stop_requested: Callable[[], bool]) -> StepMetrics:
        """Moves the weights by step 0 <= number < steps. Called by all ranks.

        stop_requested: whether this rank was asked to stop; asked when its backward is done.
        """
        began = time.perf_counter()
        world, schedule, train = dist.get_world_size(), self.run.schedule, self.run.config.train
        positions = schedule.positions(number)
        seed_step(train.seed, number)
        rate = learning_rate(train, number, schedule.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums, parts = StepSums(), self.batches.micro_batches(number, dist.get_rank(), world)
        of_step = self._numbers_of(number)
        for part in parts:
            batch = self._batch_of(part, of_step)
            output = self.engine(batch=batch)
            self.engine.backward(output.loss * (world / len(positions)), scale_wrt_gas=False)
            sums.add(part, batch, output)
        totals = sums.reduce(stop_requested(), self.batches.languages, self.run.device)
        self.engine.step()
        skipped, seconds = self.guard.skipped(self.engine), time.perf_counter() - began
        return StepMetrics(
            step=number + 1,
            epoch=positions.stop / schedule.rows,
            pairs=len(positions),
            totals=totals,
            kl=of_step.get("kl"),
            objective=self.run.config.loss,
            learning_rate=rate,
            grad_norm=self.guard.grad_norm(self.engine),
            skipped=skipped,
            seconds=seconds,
            peak_memory_gib=peak_memory_gib(self.run.device),
        )

    def _numbers_of(self, number: int) -> dict[str, float]:
        """What all groups of a step share, known before its first micro-batch."""
        rows, objective = self.batches.rows_of(number), self.batches.objective
        numbers = objective.numbers_of_step([self.run.examples[row] for row in rows])
        return {**numbers, "kl": self.mismatched.kl(rows)} if objective.takes_kl else numbers

    def _batch_of(self, part: MicroBatch, of_step: Mapping[str, float]) -> Batch:
        """On this rank's device. Every rank looks up as often as the others."""
        objective = self.batches.objective
        store = self.reference.look_up(part.reference_sequences(objective))
        return make_batch(part, objective, store, self.run.config, of_step).to(self.run.device)


def seed_step(seed: int, step: int) -> None:
    """Makes what a step draws (dropout) a function of seed, step and rank, so that a run that goes
    on draws what it would have drawn."""
    torch.manual_seed(random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63))
