"""What a run would do and take, without loading a weight."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console

from mpo.config import Config
from mpo.models.attention import shares_prompts
from mpo.models.inputs import load_inputs
from mpo.training import memory
from mpo.training.engine import deepspeed_settings
from mpo.training.kl import mismatched_of
from mpo.training.micro_batches import Batches
from mpo.training.schedule import schedule_of


class Tokens(NamedTuple):
    """Packed tokens of the micro-batches of an epoch."""

    mean: int
    max: int


@dataclass(frozen=True)
class DryRun:
    """A run that was not made. The fields are those of its JSON, in order."""

    model: str
    """A folder or a hub id."""
    rows: int
    languages: dict[str, int]
    """Rows of each."""
    measured: int
    dropped: int
    steps: int
    pairs_per_step: int
    micro_batches_per_step_one_rank: int
    tokens_per_micro_batch: Tokens
    """On one rank."""
    loss: str
    """In words, with what goes through the model for it."""
    reference_sequences: int
    """That are scored once, before the first step."""
    size: memory.Size
    zero_stage: int
    dtype: str
    memory: list[dict[str, Any]]
    """`memory.table`: GiB per GPU for each number of GPUs."""

    def as_dict(self) -> dict[str, Any]:
        """As `--json` has it."""
        tokens, size = self.tokens_per_micro_batch._asdict(), self.size._asdict()
        return {**vars(self), "tokens_per_micro_batch": tokens, "size": size}

    def show(self, console: Console) -> None:
        """For people."""
        counts = ", ".join(f"{language} {count}" for language, count in self.languages.items())
        tokens = self.tokens_per_micro_batch
        lines = {
            "Model": f"{self.model} ({self.dtype}), ZeRO-{self.zero_stage}",
            "Rows": f"{self.rows} ({counts}), {self.measured} measured, {self.dropped} dropped",
            "Loss": self.loss,
            "Reference": (
                f"{self.reference_sequences} sequences to score once"
                if self.reference_sequences
                else "none: the loss takes nothing of it"
            ),
            "Steps": f"{self.steps} of {self.pairs_per_step} pairs",
            "Batches": (
                f"{self.micro_batches_per_step_one_rank} micro-batches per step on one rank,"
                f" {tokens.mean} tokens on average, {tokens.max} at most"
            ),
        }
        for name, text in lines.items():
            console.print(f"{name:<10}{text}", markup=False, soft_wrap=True)
        memory.show(self.memory, self.size, tokens.max, console)
        console.print("Nothing was loaded or written.")


def describe(config: Config) -> DryRun:
    """Checks everything that a run checks before it loads weights, and counts.

        describe(load_config("demo")).show(console())

    Raises:
        UserError: bad configuration, data or model.
    """
    deepspeed_settings(config)  # refuses settings that contradict each other
    inputs = load_inputs(config, lambda line: print(line, file=sys.stderr))
    examples, mismatched = inputs.examples.train, mismatched_of(config, inputs)
    schedule = schedule_of(config, len(examples))
    of_epoch = min(schedule.steps, math.ceil(len(examples) / schedule.pairs_per_step))
    batches = Batches(examples, schedule, config)
    parts = [part for step in range(of_epoch) for part in batches.micro_batches(step, 0, 1)]
    tokens = [part.tokens(shares_prompts(config.model.attention)) for part in parts]
    size = memory.size_of(inputs.model)
    return DryRun(
        model=inputs.model.path,
        rows=len(examples),
        languages=dict(sorted(Counter(e.language for e in examples).items())),
        measured=len(inputs.examples.measured),
        dropped=len(inputs.examples.dropped),
        steps=schedule.steps,
        pairs_per_step=config.train.pairs_per_step,
        micro_batches_per_step_one_rank=math.ceil(len(parts) / of_epoch),
        tokens_per_micro_batch=Tokens(round(sum(tokens) / len(tokens)), max(tokens)),
        loss=config.loss.in_words(),
        reference_sequences=len(batches.objective.referenced(examples, mismatched)),
        size=size,
        zero_stage=config.zero.stage,
        dtype=config.model.dtype,
        memory=memory.table(config, size, max(tokens)),
    )
