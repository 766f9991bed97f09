"""MPO training as one would write it first: one sequence at a time through the model's own eager
forward, torch's AdamW, no DeepSpeed.

What the trainer's many ways of computing a run are compared with; slow, and short enough to be
checked by eye. Of the package it takes the tokens of the rows; which rows a step has, its rate, and
all arithmetic are written here once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from mpo.config import Config
from mpo.data.examples import Answers, Example, Side, TokenizedResponse
from mpo.data.mismatched import mismatched_answers
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


class Seen(NamedTuple):
    """Of one answer: sum of its tokens' log-probabilities, their number, and the mean hidden
    state."""

    sum: torch.Tensor
    tokens: int
    pooled: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return self.sum / self.tokens


class Pair(NamedTuple):
    """Chosen and rejected (w, l) under the policy and under the reference (w0, l0)."""

    w: Seen
    l: Seen  # noqa: E741
    w0: Seen
    l0: Seen
    gap: torch.Tensor
    """Of the dominant pair under the reference."""
    tokens: float
    """Mean number of tokens of the step's chosen answers."""
    kl: float
    """Of the step, where the loss takes it."""

    @property
    def margin(self) -> torch.Tensor:
        return (self.w.sum - self.w0.sum) - (self.l.sum - self.l0.sum)


def negative_log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + torch.exp(-x))


def odds(mean: torch.Tensor) -> torch.Tensor:
    return mean.exp() / (1 - mean.exp())


FORMULAS: dict[str, Callable[[Pair, Any], torch.Tensor]] = {
    "mpo": lambda p, h: (h.beta * (p.w.mean - p.l.mean) - p.gap) ** 2,
    "sft": lambda p, h: -p.w.sum / p.tokens,
    "dpo": lambda p, h: negative_log_sigmoid(h.beta * p.margin),
    "ipo": lambda p, h: (
        ((p.w.sum - p.w0.sum) / p.w.tokens - (p.l.sum - p.l0.sum) / p.l.tokens - 1 / (2 * h.tau))
        ** 2
    ),
    "cpo": lambda p, h: (
        negative_log_sigmoid(h.beta * (p.w.sum - p.l.sum)) - h.alpha * p.w.sum / p.tokens
    ),
    "orpo": lambda p, h: (
        -p.w.mean + h.beta * negative_log_sigmoid(torch.log(odds(p.w.mean) / odds(p.l.mean)))
    ),
    "simpo": lambda p, h: negative_log_sigmoid(h.beta * (p.w.mean - p.l.mean) - h.gamma),
    "length_dpo": lambda p, h: negative_log_sigmoid(
        h.beta * p.margin + h.alpha * (p.w.tokens - p.l.tokens)
    ),
    "kto": lambda p, h: (
        h.desirable_weight * (1 - torch.sigmoid(h.beta * (p.w.sum - p.w0.sum - p.kl))) / 2
        + h.undesirable_weight * (1 - torch.sigmoid(h.beta * (p.kl - p.l.sum + p.l0.sum))) / 2
    ),
    "own_losses:squared": lambda p, h: (p.margin / (p.w.tokens + p.l.tokens) - 0.7) ** 2,
    "own_losses:Lift": lambda p, h: torch.exp(-h.rate * p.w.mean),
}
"""What the losses of the package and of own_losses.py give to one row, from their papers."""


def sides_of(row: Example, config: Config) -> list[Answers]:
    """The pairs of a row that the loss sees."""
    return [row.target, row.dominant] if config.loss.pairs == "both" else [row.target]


def answers_to_others(examples: list[Example], config: Config) -> list[list[TokenizedResponse]]:
    """Of each row the prompts of the pairs that the loss sees, with answers of other rows; as the
    package deals them."""
    sides: tuple[Side, ...] = ("target", "dominant") if config.loss.pairs == "both" else ("target",)
    seed, length = config.train.seed, config.data.max_length
    dealt = [mismatched_answers(examples, side, seed, length) for side in sides]
    return [
        [sequence for answers in row for sequence in answers] for row in zip(*dealt, strict=True)
    ]


def train_plainly(
    config: Config,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns per step loss, its own value (l1) and l2, means over its rows, and kl; AdamW's first
    moments and the weights after the last step."""
    examples = load_inputs(config, lambda line: None).examples.train
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="eager"
    )

    def look_at(sequence: TokenizedResponse) -> Seen:
        ids, start = torch.tensor([sequence.input_ids]), sequence.response_start
        output = model(ids, use_cache=False, output_hidden_states=True)
        logps = output.logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])
        return Seen(logps.sum(), len(logps), output.hidden_states[-1][0, start:].mean(0))

    with torch.no_grad():
        reference = {s: look_at(s) for e in examples for s in e.sequences()}
        others = answers_to_others(examples, config) if config.loss.name == "kto" else []
        reference |= {s: look_at(s) for row in others for s in row}
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
        lengths = [len(a.chosen.response) for row in rows for a in sides_of(row, config)]
        with torch.no_grad():
            ratios = [
                float(look_at(s).sum - reference[s].sum)
                for i in (indices if others else [])
                for s in others[i]
            ]
        kl = max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0
        for row in rows:
            sides = sides_of(row, config)
            for answers in sides:
                now, then = [look_at(s) for s in answers], [reference[s] for s in answers]
                gap = reference[row.dominant.chosen].mean - reference[row.dominant.rejected].mean
                value = FORMULAS[config.loss.name](
                    Pair(*now, *then, gap, sum(lengths) / len(lengths), kl),
                    SimpleNamespace(**config.loss.own()),
                )
                l1 = l1 + value / len(sides) / len(rows)
            distances = [
                (look_at(s).pooled - reference[s].pooled).square().mean() for s in row.dominant
            ]
            l2 = l2 + sum(distances) / 2 / len(rows)
        loss = l1 + config.loss.retention_weight * l2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        steps.append({"loss": loss.item(), "l1": l1.item(), "l2": l2.item(), "kl": kl})
    parameters = dict(model.named_parameters())
    return (
        steps,
        {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items()},
        {n: p.detach() for n, p in parameters.items()},
    )
