"""What a run would do and take, without loading a weight."""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.console import Console

from mpo.config import Config
from mpo.models.attention import shares_prompts
from mpo.models.inputs import load_inputs
from mpo.training import memory
from mpo.training.engine import deepspeed_settings
from mpo.training.micro_batches import Batches
from mpo.training.schedule import schedule_of


def describe(config: Config) -> dict[str, Any]:
    """`rows`, `languages`, `steps`, batch arithmetic for one rank, `size` of the model, and
    computed `memory` per number of GPUs."""
    deepspeed_settings(config)  # refuses settings that contradict each other
    inputs = load_inputs(config, lambda line: print(line, file=sys.stderr))
    examples = inputs.examples.train
    schedule = schedule_of(config, len(examples))
    batches = Batches(examples, schedule, config)
    steps = [
        batches.micro_batches(step, 0, 1)
        for step in range(min(schedule.steps, math.ceil(len(examples) / schedule.pairs_per_step)))
    ]
    tokens = [
        part.tokens(shares_prompts(config.model.attention)) for step in steps for part in step
    ]
    size = memory.size_of(inputs.model)
    languages: dict[str, int] = {}
    for example in examples:
        languages[example.language] = languages.get(example.language, 0) + 1
    return {
        "model": inputs.model.path,
        "rows": len(examples),
        "languages": dict(sorted(languages.items())),
        "measured": len(inputs.examples.measured),
        "dropped": len(inputs.examples.dropped),
        "steps": schedule.steps,
        "pairs_per_step": config.train.pairs_per_step,
        "micro_batches_per_step_one_rank": math.ceil(len(tokens) / len(steps)),
        "tokens_per_micro_batch": {"mean": round(sum(tokens) / len(tokens)), "max": max(tokens)},
        "reference_sequences": len({s for e in examples for s in e.dominant}),
        "size": size._asdict(),
        "zero_stage": config.zero.stage,
        "dtype": config.model.dtype,
        "memory": memory.table(config, size, max(tokens)),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    languages = ", ".join(f"{language} {count}" for language, count in report["languages"].items())
    tokens = report["tokens_per_micro_batch"]
    for name, text in (
        ("Model", f"{report['model']} ({report['dtype']}), ZeRO-{report['zero_stage']}"),
        (
            "Rows",
            (
                f"{report['rows']} ({languages}), {report['measured']} measured,"
                f" {report['dropped']} dropped"
            ),
        ),
        ("Reference", f"{report['reference_sequences']} dominant sequences to score once"),
        ("Steps", f"{report['steps']} of {report['pairs_per_step']} pairs"),
        (
            "Batches",
            (
                f"{report['micro_batches_per_step_one_rank']} micro-batches per step on one rank,"
                f" {tokens['mean']} tokens on average, {tokens['max']} at most"
            ),
        ),
    ):
        console.print(f"{name:<10}{text}", markup=False, soft_wrap=True)
    memory.show(report["memory"], report, console)
    console.print("Nothing was loaded or written.")
