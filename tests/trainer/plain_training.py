"""MPO training as one would write it first: one sequence at a time through the model's own eager
forward, torch's AdamW, no DeepSpeed.

What the trainer's many ways of computing a run are compared with; slow, and short enough to be
checked by eye. Of the package it takes the tokens of the rows; which rows a step has, its rate, and
all arithmetic are written here once more.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mpo.config import Config
from mpo.data.examples import TokenizedResponse
from mpo.models.inputs import load_inputs


def rows_of_steps(config: Config, rows: int) -> list[list[int]]:
    """Of each step the indices of its rows: one random order an epoch, the epochs one after the
    other, cut into equal pieces."""
    train = config.train
    assert train.max_steps is None and not train.group_by_dominant and not train.overfit_batch
    total = int(Decimal(rows) * Decimal(str(train.epochs)))
    order: list[int] = []
    while len(order) < total:
        generator = torch.Generator().manual_seed(1_000_003 * train.seed + len(order) // rows)
        order += torch.randperm(rows, generator=generator).tolist()
    return [
        order[:total][i : i + train.pairs_per_step] for i in range(0, total, train.pairs_per_step)
    ]


def rates(config: Config, steps: int) -> list[float]:
    """The learning rate of each step: in equal strides up to the peak, then down to what would be 0
    a step after the last."""
    train, up = config.train, math.ceil(Decimal(str(config.train.warmup_ratio)) * steps)
    down = [i / (steps - up) for i in range(steps - up)]
    shape = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    }[train.schedule]
    return [
        train.learning_rate * share
        for share in [(i + 1) / up for i in range(up)] + [shape(x) for x in down]
    ]


def train_plainly(
    config: Config,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns per step loss, l1 and l2, means over its pairs; AdamW's first moments and the weights
    after the last step."""
    examples = load_inputs(config, lambda line: None).examples.train
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="eager"
    )

    def mean_logp_and_pool(sequence: TokenizedResponse) -> tuple[torch.Tensor, torch.Tensor]:
        ids, start = torch.tensor([sequence.input_ids]), sequence.response_start
        output = model(ids, use_cache=False, output_hidden_states=True)
        logps = output.logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])
        return logps.mean(), output.hidden_states[-1][0, start:].mean(0)

    with torch.no_grad():
        reference = {s: mean_logp_and_pool(s) for e in examples for s in e.dominant}
    options: dict[str, Any] = {
        "betas": config.train.adam_betas,
        "weight_decay": config.train.weight_decay,
    }
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    order, steps = rows_of_steps(config, len(examples)), []
    for indices, rate in zip(order, rates(config, len(order)), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        rows = [examples[i] for i in indices]
        l1 = l2 = torch.zeros(())
        for row in rows:
            gap = (
                mean_logp_and_pool(row.target.chosen)[0]
                - mean_logp_and_pool(row.target.rejected)[0]
            )
            dominant = row.dominant
            l1 = l1 + (
                config.loss.beta * gap - (reference[dominant[0]][0] - reference[dominant[1]][0])
            ).square() / len(rows)
            distances = [
                (mean_logp_and_pool(s)[1] - reference[s][1]).square().mean() for s in dominant
            ]
            l2 = l2 + sum(distances) / 2 / len(rows)
        loss = l1 + config.loss.retention_weight * l2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        steps.append({"loss": loss.item(), "l1": l1.item(), "l2": l2.item()})
    parameters = dict(model.named_parameters())
    return (
        steps,
        {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items()},
        {n: p.detach() for n, p in parameters.items()},
    )
