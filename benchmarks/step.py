"""One whole training step on a real small model and real pairs: `python -m benchmarks.step [--quick]`.

Six rows of one dominant pair, as the published data have them. Both sides get the same model, rows, learning rate and AdamW:

    published   as the published code does it, written out plainly: for each row one padded forward of the target pair, one of the dominant
                pair, and one of the dominant pair through a reference model that is resident; fp32 logits of every position; L2 over states
                pooled over every position, padding included
    ours        the trainer's step: one packed forward, the dominant pair once, no reference model, scored rows only at the head

The two losses differ where the published one pools over padding, so the check compares L1 and the reward gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Timing
from benchmarks.options import Out, Quick, Threads, set_up
from benchmarks.output import Machine

ROWS, MAX_TOKENS = 6, 512
LEARNING_RATE = 1e-6
RECIPE = Path(__file__).parents[1] / "mpo" / "recipes" / "demo.yaml"


class Measured(BaseModel):
    """One side on one model. `peak_bytes` is above weights, gradients and optimizer state."""

    name: str
    seconds: Timing
    examples_per_second: float
    peak_bytes: int
    l1: float
    parts: dict[str, float]
    """Seconds of the last step by part."""


class Configuration(BaseModel):
    """One model with both sides."""

    model: str
    tokens: int
    sides: list[Measured]


class StepResult(BaseModel):
    """What `step.json` holds."""

    benchmark: str = "step"
    machine: Machine
    quick: bool
    configurations: list[Configuration]
    bars: list[dict[str, Any]]


class _Parts:
    """Seconds since the last mark, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


Step = Callable[[_Parts], float]


def published(model: Any, reference: Any, examples: Sequence[Any], optimizer: torch.optim.Optimizer) -> Step:
    """The published recipe; returns the step's mean L1."""

    def padded(sequences: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = max(len(s.input_ids) for s in sequences)
        ids, mask, labels = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(3))
        labels.fill_(-100)
        for row, s in enumerate(sequences):
            ids[row, : len(s.input_ids)] = torch.tensor(s.input_ids)
            mask[row, : len(s.input_ids)] = 1
            labels[row, s.response_start : len(s.input_ids)] = torch.tensor(s.input_ids[s.response_start :])
        return ids, mask, labels

    def gap_and_states(network: Any, sequences: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, labels = padded(sequences)
        out = network(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        logps = out.logits[:, :-1].float().log_softmax(-1)
        wanted, scored = labels[:, 1:].clamp_min(0), labels[:, 1:] != -100
        means = (logps.gather(-1, wanted[..., None])[..., 0] * scored).sum(1) / scored.sum(1)
        return means[0] - means[1], out.hidden_states[-1].mean(1)

    def step(parts: _Parts) -> float:
        total = 0.0
        for e in examples:
            target, _ = gap_and_states(model, [e.target_chosen, e.target_rejected])
            _, pooled = gap_and_states(model, [e.dominant_chosen, e.dominant_rejected])
            parts.mark("forward of the policy")
            with torch.no_grad():
                dominant, kept = gap_and_states(reference, [e.dominant_chosen, e.dominant_rejected])
            parts.mark("forward of the reference")
            l1 = (target - dominant) ** 2
            ((l1 + (pooled - kept).square().mean()) / len(examples)).backward()
            parts.mark("backward")
            total += float(l1.detach()) / len(examples)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        parts.mark("optimizer")
        return total

    return step


def ours(model: Any, examples: Sequence[Any], optimizer: torch.optim.Optimizer, config: Any) -> Step:
    """The trainer's own batch and forward; the reference's numbers are made before, as its store holds them."""
    from mpo.batching import pack_for_scoring
    from mpo.model import bind_mpo_forward
    from mpo.reference import ReferenceStore, dominant_sequences
    from mpo.train import make_batch

    bind_mpo_forward(model, config.loss)
    sequences = dominant_sequences(examples)
    with torch.no_grad():
        scores = model(batch=pack_for_scoring(sequences, config.loss.pool))
    store = ReferenceStore({s: i for i, s in enumerate(sequences)}, scores)

    def step(parts: _Parts) -> float:
        batch = make_batch(examples, [1.0] * len(examples), store, config)
        out = model(batch=batch)
        parts.mark("forward of the policy")  # with the head's gradients
        (out.loss / len(examples)).backward()
        parts.mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        parts.mark("optimizer")
        return float(out.l1.mean())

    return step


def measure(name: str, step: Step, repetitions: int) -> Measured:
    """Times the step and counts its memory. The first step, which makes gradients and optimizer state, is warm-up."""
    l1 = step(_Parts())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step(_Parts())
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    alive = peak = 0
    for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    seconds, parts = [], _Parts()
    for _ in range(repetitions):
        parts, began = _Parts(), time.perf_counter()
        step(parts)
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    timing = Timing(median=seconds[len(seconds) // 2], p20=seconds[0], p80=seconds[-1], repetitions=repetitions)
    return Measured(
        name=name, seconds=timing, examples_per_second=ROWS / timing.median, peak_bytes=peak, l1=l1, parts=parts.seconds
    )  # fmt: skip


def compare(label: str, load: Callable[[str], Any], examples: Sequence[Any], config: Any, repetitions: int) -> Configuration:
    """Both sides on one model, one after the other in one process, each with a model of its own."""
    from mpo.train import packed_tokens

    sides = []
    for name in ("published recipe", "mpo"):
        model = load("sdpa" if name == "published recipe" else "packed")
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        if name == "mpo":
            step = ours(model, examples, optimizer, config)
        else:
            step = published(model, load("sdpa").eval(), examples, optimizer)
        sides.append(measure(name, step, repetitions))
        del model, optimizer, step
    return Configuration(model=label, tokens=packed_tokens(examples), sides=sides)


def main(quick: Quick = False, threads: Threads = 2, out: Out = None, repetitions: int = 3) -> None:
    """One training step, the trainer's against the published recipe, on SmolLM2-135M and on a model whose head dominates."""
    device, machine, folder, console = set_up(threads, out)
    if device.type == "cuda":
        console.print("This command measures on the CPU, where both sides fit any machine.")
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mpo.config import load_config
    from mpo.prepare import prepare

    config = load_config(RECIPE, [f"data.max_length={MAX_TOKENS}", "data.eval=[]"])
    prepared = prepare(config, console.print)
    first = prepared.examples[0].dominant_chosen
    examples = [e for e in prepared.examples if e.dominant_chosen == first][: 2 if quick else ROWS]

    def small(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(prepared.model.path, dtype=torch.float32, attn_implementation=attention)

    def head_dominated(attention: str) -> Any:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 2 if quick else 18,
        }
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 160, "tie_word_embeddings": True}
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads), attn_implementation=attention, dtype=torch.float32)

    configurations, bars = [], []
    for label, load, speed, memory in (
        ("SmolLM2-135M-Instruct, fp32", small, 1.8, 0.55),
        ("vocabulary 262144, hidden 640, fp32, random weights", head_dominated, 2.5, 0.35),
    ):
        found = compare(label, load, examples, config, 1 if quick else repetitions)
        configurations.append(found)
        theirs, mine = found.sides
        ratio, share = mine.examples_per_second / theirs.examples_per_second, mine.peak_bytes / theirs.peak_bytes
        bars.append({"what": f"speed, {label}", "promised": f">= {speed}", "measured": f"{ratio:.2f}", "holds": ratio >= speed})
        bars.append({"what": f"memory, {label}", "promised": f"<= {memory}", "measured": f"{share:.2f}", "holds": share <= memory})
        _show(found, len(examples), console)
    for bar in bars:
        console.print(f"{bar['what']}: {bar['measured']} (bar {bar['promised']})", markup=False)
    result = StepResult(machine=machine, quick=quick, configurations=configurations, bars=bars)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console.print(str(folder / "step.json"))


def _show(found: Configuration, rows: int, console: Console) -> None:
    table = Table(title=f"{found.model}: a step of {rows} rows of one dominant pair, {found.tokens} tokens packed", title_justify="left")
    for column in ("", "seconds (least-most)", "examples/s", "peak MiB", "L1 before", "where the time goes"):
        table.add_column(column)
    for side in found.sides:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in side.parts.items())
        table.add_row(
            side.name,
            f"{side.seconds.median:.1f} ({side.seconds.p20:.1f}-{side.seconds.p80:.1f})",
            f"{side.examples_per_second:.3f}",
            f"{side.peak_bytes / 2**20:.0f}",
            f"{side.l1:.5f}",
            parts,
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
