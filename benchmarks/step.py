"""One whole training step on a real small model and real pairs.

    python -m benchmarks.step [--quick]

Six rows of one dominant pair, as the published data have them. Every side gets the same weights,
rows, learning rate and AdamW:

    published recipe    as the published code does it, written out plainly: for each row one padded
                        forward of the target pair, one of the dominant pair, and one of the
                        dominant pair through a reference model that is resident; fp32 logits of
                        every position; L2 over states pooled over every position, padding included
    mpo                 the trainer's step with the settings of the row: prompts and the dominant
                        pair once, no reference model, scored rows only at the head

Before the first step the policy is the reference, so L2 and its gradient vanish on every side,
whatever it pools over: there the gradient of the whole step is compared with float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks.harness import TOLERANCE, Timing, allocations, timing
from benchmarks.options import Out, Quick, Threads, set_up
from benchmarks.output import COLORS, OURS, Machine, Rectangles, marked, panels

ROWS, MAX_TOKENS = 6, 512
LEARNING_RATE = 1e-6
RECIPE = Path(__file__).parents[1] / "mpo" / "recipes" / "demo.yaml"
PUBLISHED = "published recipe"
SETTINGS = {
    "mpo, all rows at once": ["train.pairs_per_micro_batch=6"],
    "mpo, 640 tokens at a time": ["train.tokens_per_micro_batch=640"],
    "mpo, 640 tokens, selective": [
        "train.tokens_per_micro_batch=640",
        "model.activation_checkpointing=selective",
    ],
}
"""What the trainer is asked to do. The bars hold one of them to speed and memory at once: the
fastest of those within the bar of memory."""


class Measured(BaseModel):
    """One side on one model. `peak_bytes` is above weights, gradients and optimizer state;
    `gradient_error` is relative to float64."""

    name: str
    status: Literal["ok", "wrong"]
    gradient_error: float
    seconds: Timing
    examples_per_second: float
    peak_bytes: int
    l1: float
    parts: dict[str, float]
    """Seconds of a step by part, medians."""


class Configuration(BaseModel):
    """One model with all sides."""

    model: str
    tokens: dict[str, int]
    """Tokens that go through the body in forward and backward, by side."""
    sides: list[Measured]


class Bar(BaseModel):
    """A ratio to the published recipe that the trainer promises."""

    what: str
    side: str
    promised: str
    measured: float
    holds: bool


class StepResult(BaseModel):
    """What `step.json` holds."""

    benchmark: str = "step"
    machine: Machine
    quick: bool
    configurations: list[Configuration]
    bars: list[Bar]


class _Parts:
    """Seconds since the last mark, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass
class Side:
    """One way to make a step. `gradients(parts)` fills the model's and returns the mean L1."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    gradients: Callable[[_Parts], float]
    tokens: int

    def step(self) -> _Parts:
        """A whole step."""
        parts = _Parts()
        self.gradients(parts)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        parts.mark("optimizer")
        return parts


def _padded(sequences: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels (S, T)."""
    width = max(len(s.input_ids) for s in sequences)
    ids, mask, labels = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(3))
    labels.fill_(-100)
    for row, s in enumerate(sequences):
        ids[row, : len(s.input_ids)] = torch.tensor(s.input_ids)
        mask[row, : len(s.input_ids)] = 1
        labels[row, s.response_start : len(s.input_ids)] = torch.tensor(
            s.input_ids[s.response_start :]
        )
    return ids, mask, labels


def _gap_and_states(network: Any, sequences: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair's reward gap, and its states pooled over every position."""
    ids, mask, labels = _padded(sequences)
    out = network(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    logits = out.logits[:, :-1]
    logps = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    wanted, scored = labels[:, 1:].clamp_min(0), labels[:, 1:] != -100
    means = (logps.gather(-1, wanted[..., None])[..., 0] * scored).sum(1) / scored.sum(1)
    return means[0] - means[1], out.hidden_states[-1].mean(1)


def published(model: Any, reference: Any, examples: Sequence[Any]) -> Callable[[_Parts], float]:
    """The published recipe."""

    def gradients(parts: _Parts) -> float:
        total = 0.0
        for e in examples:
            target, _ = _gap_and_states(model, e.target)
            _, pooled = _gap_and_states(model, e.dominant)
            parts.mark("forward")
            with torch.no_grad():
                dominant, kept = _gap_and_states(reference, e.dominant)
            parts.mark("reference forward")
            l1 = (target - dominant) ** 2
            ((l1 + (pooled - kept).square().mean()) / len(examples)).backward()
            parts.mark("backward")
            total += float(l1.detach()) / len(examples)
        return total

    return gradients


def ours(model: Any, examples: Sequence[Any], config: Any) -> tuple[Callable[[_Parts], float], int]:
    """The trainer's own batches and forward, and the tokens of a step. The reference's numbers are
    made before, as its store holds them."""
    from mpo.models import recompute
    from mpo.models.forward import bind_mpo_forward
    from mpo.models.packing import pack_for_scoring
    from mpo.training.micro_batches import in_micro_batches, make_batch
    from mpo.training.objective import Objective
    from mpo.training.reference import ReferenceStore, dominant_sequences

    bind_mpo_forward(model, config.loss)
    sequences = dominant_sequences(examples)
    with torch.no_grad():
        scores = model(batch=pack_for_scoring(sequences, config.loss.pool, True))
    store = ReferenceStore({s: i for i, s in enumerate(sequences)}, scores)
    budget = {
        "pairs": config.train.pairs_per_micro_batch,
        "tokens": config.train.tokens_per_micro_batch,
    }
    objective = Objective(config.loss)
    plan = in_micro_batches(examples, objective, **budget, share_prompts=True)

    def gradients(parts: _Parts) -> float:
        if config.model.activation_checkpointing:
            recompute.enable(model, config.model.activation_checkpointing)
        else:
            recompute.disable(model)
        l1 = 0.0
        for part in plan:
            batch = make_batch(part, objective, store, config, {})
            out = model(batch=batch)
            parts.mark("forward, head's gradients")
            (out.loss / len(examples)).backward()
            parts.mark("backward")
            l1 += float(out.l1) / len(examples)
        return l1

    return gradients, sum(part.tokens(True) for part in plan)


def exact_gradient(model: Any, examples: Sequence[Any]) -> list[torch.Tensor]:
    """Gradient of the mean L1 in float64, a row at a time; rounded to float32, which is far below
    what is measured with it."""
    network = model.double()
    for e in examples:
        with torch.no_grad():
            dominant, _ = _gap_and_states(network, e.dominant)
        target, _ = _gap_and_states(network, e.target)
        ((target - dominant) ** 2 / len(examples)).backward()
    return [p.grad.float() for p in network.parameters()]


def _error(model: Any, exact: Sequence[torch.Tensor]) -> float:
    """Relative L2 error of all gradients together."""
    difference = sum(
        float((p.grad - want).double().square().sum())
        for p, want in zip(model.parameters(), exact, strict=True)
    )
    return (difference / sum(float(want.double().square().sum()) for want in exact)) ** 0.5


def sides_of(
    load: Callable[[str], Any], examples: Sequence[Any], settings: dict[str, Any]
) -> Iterator[Side]:
    """The published recipe with a model and a reference of its own, and the trainer's settings,
    which share one model."""
    from mpo.models.attention import NAME

    model = load("sdpa").train()
    padded = [
        len(pair) * max(len(s.input_ids) for s in pair)
        for e in examples
        for pair in (e.target, e.dominant)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    yield Side(
        PUBLISHED, model, optimizer, published(model, load("sdpa").eval(), examples), sum(padded)
    )
    model = load(NAME).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    for name, config in settings.items():
        gradients, tokens = ours(model, examples, config)
        yield Side(name, model, optimizer, gradients, tokens)


def compare(
    label: str,
    load: Callable[[str], Any],
    examples: Sequence[Any],
    settings: dict[str, Any],
    repetitions: int,
) -> Configuration:
    """All sides on one model: checked against float64 at equal weights, then stepped in turns."""
    exact = exact_gradient(load("sdpa").train(), examples)
    sides = list(sides_of(load, examples, settings))
    l1, errors, peaks = {}, {}, {}
    for side in sides:
        l1[side.name] = side.gradients(_Parts())
        errors[side.name] = _error(side.model, exact)
        side.optimizer.zero_grad(set_to_none=False)
    for side in sides:
        side.step()  # makes the optimizer's state
        peaks[side.name] = allocations(lambda side=side: side.step())  # type: ignore[misc]
    times: dict[str, list[_Parts]] = {side.name: [] for side in sides}
    for _ in range(repetitions):
        for side in sides:
            times[side.name].append(side.step())
    measured = []
    for side in sides:
        seconds = timing([sum(parts.seconds.values()) for parts in times[side.name]])
        measured.append(
            Measured(
                name=side.name,
                status="ok" if errors[side.name] <= TOLERANCE[torch.float32] else "wrong",
                gradient_error=errors[side.name],
                seconds=seconds,
                examples_per_second=len(examples) / seconds.median,
                peak_bytes=peaks[side.name],
                l1=l1[side.name],
                parts={
                    part: statistics.median(p.seconds[part] for p in times[side.name])
                    for part in times[side.name][0].seconds
                },
            )
        )
    return Configuration(
        model=label, tokens={side.name: side.tokens for side in sides}, sides=measured
    )


def main(quick: Quick = False, threads: Threads = 2, out: Out = None, repetitions: int = 3) -> None:
    """One training step, the trainer's against the published recipe, on SmolLM2-135M and on a model
    whose head dominates."""
    _, machine, folder, console = set_up(threads, out, on_cpu=True)
    console.print("This command measures on the CPU, where both sides fit any machine.")
    from transformers import AutoModelForCausalLM

    from mpo.config import load_config
    from mpo.models.inputs import load_inputs

    tokens = 128 if quick else MAX_TOKENS
    overrides = [
        f"data.max_length={tokens}",
        "data.on_bad_row=drop",
        "data.eval=[]",
        "model.attention=packed",
    ]
    settings = {
        name: load_config(RECIPE, [*overrides, *more])
        for name, more in list(SETTINGS.items())[1 if quick else 0 :]
    }
    inputs = load_inputs(next(iter(settings.values())), console.print)
    first = inputs.examples.train[0].dominant.chosen
    of_one_pair = [e for e in inputs.examples.train if e.dominant.chosen == first]
    examples = of_one_pair[: 2 if quick else ROWS]

    def small(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            inputs.model.path, dtype=torch.float32, attn_implementation=attention
        )

    vocab = 65536 if quick else 262144

    def head_dominated(attention: str) -> Any:
        return _head_dominated(attention, vocab, 2 if quick else 18)

    configurations: list[Configuration] = []
    bars: list[Bar] = []
    for label, load, speed, memory in (
        ("SmolLM2-135M-Instruct, fp32", small, 1.8, 0.55),
        (f"vocabulary {vocab}, hidden 640, fp32, random weights", head_dominated, 2.5, 0.35),
    ):
        found = compare(label, load, examples, settings, 1 if quick else repetitions)
        configurations.append(found)
        bars += judge(found, speed, memory)
        _show(found, len(examples), console)
    for bar in bars:
        verdict = "quick: sizes too small to judge" if quick else "holds" if bar.holds else "MISSED"
        console.print(
            f"{bar.what}, {bar.side}: {bar.measured:.2f} (bar {bar.promised}, {verdict})",
            markup=False,
        )
    result = StepResult(machine=machine, quick=quick, configurations=configurations, bars=bars)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    picture(result, folder / "step.png")
    console.print(f"{folder / 'step.json'} and step.png")


def _head_dominated(attention: str, vocab: int, layers: int) -> Any:
    """A model of random weights, most of them in its head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=160,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )


def judge(found: Configuration, speed: float, memory: float) -> list[Bar]:
    """The bars of one model: at least `speed` times the recipe's examples per second and at most
    `memory` of its peak, by one setting."""
    theirs, *others = found.sides
    right = [side for side in others if side.status == "ok"]
    within = [side for side in right if side.peak_bytes <= memory * theirs.peak_bytes]
    if not right:
        return []
    if within:
        mine = max(within, key=lambda side: side.examples_per_second)
    else:
        mine = min(right, key=lambda side: side.peak_bytes)
    ratio = mine.examples_per_second / theirs.examples_per_second
    share = mine.peak_bytes / theirs.peak_bytes
    of = f"{found.model} against the {PUBLISHED}"
    return [
        Bar(
            what=f"speed, {of}",
            side=mine.name,
            promised=f">= {speed}",
            measured=ratio,
            holds=ratio >= speed,
        ),
        Bar(
            what=f"memory, {of}",
            side=mine.name,
            promised=f"<= {memory}",
            measured=share,
            holds=share <= memory,
        ),
    ]


def _show(found: Configuration, rows: int, console: Console) -> None:
    theirs = found.sides[0]
    table = Table(
        title=f"{found.model}: a step of {rows} rows of one dominant pair", title_justify="left"
    )
    for column in (
        "",
        "tokens",
        "s (20-80%)",
        "examples/s",
        "x recipe",
        "peak MiB",
        "x recipe",
        "L1 before",
        "error",
        "where the time goes",
    ):
        table.add_column(column)
    for side in found.sides:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in side.parts.items())
        table.add_row(
            side.name,
            str(found.tokens[side.name]),
            f"{side.seconds.median:.1f} ({side.seconds.p20:.1f}-{side.seconds.p80:.1f})",
            f"{side.examples_per_second:.3f}",
            f"{side.examples_per_second / theirs.examples_per_second:.2f}",
            f"{side.peak_bytes / 2**20:.0f}",
            f"{side.peak_bytes / theirs.peak_bytes:.2f}",
            f"{side.l1:.5f}",
            (
                f"{side.gradient_error:.1e}"
                if side.status == "ok"
                else f"WRONG {side.gradient_error:.1e}"
            ),
            parts,
            style="bold" if side.name != PUBLISHED else None,
        )
    console.print(table)


def picture(result: StepResult, path: Path) -> None:
    """Seconds and peak memory of every side, a line of panels per model."""
    lines = []
    for found in result.configurations:
        colors = [COLORS["ok"] if side.name == PUBLISHED else OURS for side in found.sides]
        drawn = [
            Rectangles(marked(s.name, s.status), color, s.seconds, s.peak_bytes)
            for s, color in zip(found.sides, colors, strict=True)
        ]
        lines.append((found.model, drawn))
    panels(
        f"one training step on {result.machine.device}, {result.machine.threads} threads",
        lines,
        path,
        time="seconds per step",
        milliseconds=False,
        memory="peak memory above weights, gradients and optimizer state, MiB",
    )


if __name__ == "__main__":
    typer.run(main)
