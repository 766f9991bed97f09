"""What a GPU should need for the loss from hidden states: `python -m benchmarks.model [--quick]`.

    MODEL. Nothing here was measured, and nothing here is a measurement.

Of every pass of a call, FLOPs and bytes are counted (`benchmarks.instruments.passes`), and the pass
takes what the slower of two published rates allows: MODEL seconds = sum over passes of
max(FLOPs / rate of products, bytes / bandwidth). The bound is the same for the three products
alone. No GPU reaches its data sheet; a measured run is held against the model by ratios: a
candidate's time over the time of `least work`, and one candidate's over another's. Launches, waits
and the host are not in it, and neither is a product that a library does badly.

`benchmarks.static` prints it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks import candidates
from benchmarks.harness import UPSTREAM, Loss
from benchmarks.instruments.passes import Pass, counted
from benchmarks.options import Out, Quick, Threads, set_up
from benchmarks.workloads import FromHidden

SCORED = 0.625
"""Of all rows; who cannot leave the others out computes them too."""
ROWS = (256, 512, 1024, 2048, 4096, 8192)


class Rates(NamedTuple):
    """What a data sheet promises."""

    flops: float
    """Per second, dense bf16."""
    bandwidth: float
    """Bytes of memory per second."""
    float32_products: bool
    """bf16 products can hand out float32."""
    source: str


GPUS = {
    # the data sheet has the rate with sparsity, 1979 TFLOP/s; the white paper has both
    "H100 SXM": Rates(989.4e12, 3.35e12, True, "NVIDIA H100 white paper and data sheet, SXM5"),
    "A100 SXM 80GB": Rates(312e12, 2.039e12, True, "NVIDIA A100 data sheet, 80 GB SXM"),
    "MI300X": Rates(1307.4e12, 5.3e12, False, "AMD ROCm documentation, MI300 series"),
}
HEADS = {
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-2-9B": (3584, 256000),
}
"""Hidden size and vocabulary. Gemma's soft-cap is left out: it changes no byte."""


class Way(NamedTuple):
    """A candidate as it is counted."""

    build: Callable[[FromHidden], Loss]
    drops: bool = True
    """Only scored rows reach the head; what picks them is not counted."""
    compiled: bool = False
    """What a compiler would fuse counts as the least that it could make of it."""
    reads_labels: bool = False
    """On the host."""


WAYS = {
    "mpo_kernels": Way(candidates.ours_of_mpo, reads_labels=True),
    "mpo_kernels, any loss": Way(candidates.ours_of_sequences, reads_labels=True),
    "plain, scored rows only": Way(candidates.plain_on_scored_rows),
    "plain PyTorch": Way(candidates.plain_hidden, drops=False),
    "torch.compile": Way(candidates.plain_hidden, drops=False, compiled=True),
    "TRL chunked log-probs": Way(candidates.trl_hidden),
    "Liger fused, chunk 1": Way(
        functools.partial(candidates.liger_hidden, chunk=1), drops=False, compiled=True
    ),
}


class Modelled(BaseModel):
    """One candidate for one head, one number of scored rows and one GPU."""

    label: Literal["MODEL"] = "MODEL"
    head: str
    rows: int
    gpu: str
    candidate: str
    flops: int = 0
    bytes: int = 0
    model_seconds: float = 0.0
    bound_seconds: float = 0.0
    """Of the three products alone, by the same rates."""
    reason: str = ""
    """Why nothing could be counted."""


class ModelResult(BaseModel):
    """What the command found."""

    benchmark: Literal["model"] = "model"
    label: Literal["MODEL"] = "MODEL"
    quick: bool
    scored: float = SCORED
    rates: dict[str, tuple[float, float, str]]
    """FLOPs and bytes per second with their source, by GPU."""
    rows: list[Modelled]


def seconds(passes: list[Pass], rates: Rates) -> float:
    """MODEL: each pass at the rate that limits it."""
    return sum(max(p.flops / rates.flops, p.bytes / rates.bandwidth) for p in passes)


def workload(rows: int, hidden: int, vocab: int, *, drops: bool = True) -> FromHidden:
    """`rows` scored rows in pairs of at most 512; with `drops` the others are gone already."""
    tokens = min(rows // 2, 256)
    return FromHidden(
        rows // (2 * tokens),
        tokens if drops else round(tokens / SCORED),
        hidden,
        vocab,
        scored=1.0 if drops else SCORED,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )


def passes_of(way: Way, of: FromHidden, float32_products: bool) -> list[Pass]:
    """Forward and backward."""
    if not way.reads_labels:
        of.labels = of.labels.to("meta")
    inputs = of.inputs()
    with counted(
        float32_products=float32_products, fused_columns=of.vocab if way.compiled else None
    ) as passes:
        loss = way.build(of)(inputs)
        loss.backward(torch.full_like(loss, UPSTREAM))
    return passes


def bound_of(of: FromHidden) -> list[Pass]:
    """The three products alone, as `benchmarks.linear` times them."""
    hidden, weight = of.inputs().values()
    hidden = hidden.detach().flatten(0, 1)
    logits = hidden.new_empty(hidden.shape[0], of.vocab)
    with counted(float32_products=True) as passes:
        torch.mm(hidden, weight.detach().t(), out=logits)
        torch.mm(logits, weight.detach())
        torch.mm(logits.t(), hidden)
    return passes


def modelled(
    heads: dict[str, tuple[int, int]] = HEADS, all_rows: tuple[int, ...] = ROWS
) -> Iterator[Modelled]:
    """Every candidate, row by row."""
    for head, sizes in heads.items():
        for rows in all_rows:
            bound = bound_of(workload(rows, *sizes))
            for name, way in WAYS.items():
                of = workload(rows, *sizes, drops=way.drops)
                empty = Modelled(head=head, rows=rows, gpu="", candidate=name)
                yield from _of_way(way, of, empty, bound)


def _of_way(way: Way, of: FromHidden, empty: Modelled, bound: list[Pass]) -> Iterator[Modelled]:
    """A row for each GPU."""
    found: dict[bool, list[Pass] | str] = {}
    for gpu, rates in GPUS.items():
        kind = rates.float32_products
        if kind not in found:
            try:
                found[kind] = passes_of(way, of, kind)
            except Exception as reason:  # a peer may fail in any way; its row says how
                found[kind] = f"{type(reason).__name__}: {reason}".splitlines()[0]
        passes = found[kind]
        row = empty.model_copy(update={"gpu": gpu})
        if isinstance(passes, str):
            yield row.model_copy(update={"reason": passes})
            continue
        yield row.model_copy(
            update={
                "flops": sum(p.flops for p in passes),
                "bytes": sum(p.bytes for p in passes),
                "model_seconds": seconds(passes, rates),
                "bound_seconds": seconds(bound, rates),
            }
        )


def result_of(quick: bool) -> ModelResult:
    """Everything, or one head at two sizes."""
    heads = dict(list(HEADS.items())[:1]) if quick else HEADS
    return ModelResult(
        quick=quick,
        rates={name: (r.flops, r.bandwidth, r.source) for name, r in GPUS.items()},
        rows=list(modelled(heads, (512, 4096) if quick else ROWS)),
    )


Cell = Callable[[Modelled], str]


def _digits(number: float) -> str:
    """Three of them."""
    return f"{number:#.3g}".rstrip(".")


def _time(row: Modelled) -> str:
    share = row.bound_seconds / row.model_seconds
    return f"{_digits(row.model_seconds * 1e3)} ({share:.0%})"


def _counts(row: Modelled) -> str:
    return f"{_digits(row.flops / 1e12)}, {_digits(row.bytes / 1e9)}"


def tables(result: ModelResult) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table."""
    for head in dict.fromkeys(row.head for row in result.rows):
        for gpu, (flops, bandwidth, source) in result.rates.items():
            rates = f"{flops / 1e12:g} TFLOP/s, {bandwidth / 1e12:g} TB/s: {source}"
            here = [row for row in result.rows if (row.head, row.gpu) == (head, gpu)]
            columns, lines = _table(here, _time)
            bounds = {row.rows: row.bound_seconds for row in here if not row.reason}
            lines.insert(0, ["three products", *(_digits(t * 1e3) for t in bounds.values())])
            title = f"MODEL, not measured: {head} on {gpu} ({rates}); ms (share of the bound)"
            yield title, columns, lines
        some = next(iter(result.rates))
        here = [row for row in result.rows if (row.head, row.gpu) == (head, some)]
        yield f"MODEL, counted: {head} on {some}; TFLOP, GB moved", *_table(here, _counts)


def _table(rows: list[Modelled], cell: Cell) -> tuple[list[str], list[list[str]]]:
    """A line for each candidate, a column for each number of scored rows."""
    sizes = list(dict.fromkeys(row.rows for row in rows))
    lines = []
    for name in dict.fromkeys(row.candidate for row in rows):
        of_name = [row for row in rows if row.candidate == name]
        absent = any(row.reason for row in of_name)
        lines.append([name, *(["absent"] * len(sizes) if absent else map(cell, of_name))])
    return ["", *map(str, sizes)], lines


def show(result: ModelResult, console: Console) -> None:
    """The tables, and why a candidate is absent."""
    for title, columns, lines in tables(result):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for line in lines:
            table.add_row(*line, style="bold" if line[0].startswith("mpo") else None)
        console.print(table)
    for name, reason in {row.candidate: row.reason for row in result.rows if row.reason}.items():
        console.print(f"{name}: absent, {reason}", markup=False)


def save(result: ModelResult, folder: Path) -> Path:
    """JSON with everything, and the tables in Markdown; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    text = ["# MODEL: what a GPU should need. Nothing here was measured"]
    for title, columns, lines in tables(result):
        text += ["", title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        text += [f"| {' | '.join(line)} |" for line in lines]
    path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def main(quick: Quick = False, threads: Threads = 2, out: Out = None) -> None:
    """MODEL: what ours, plain PyTorch, torch.compile, TRL and Liger should take on three GPUs, from
    counted FLOPs and bytes. They go to runs/benchmarks/model, for they are of no machine."""
    _, _, folder, console = set_up(threads, out or Path("runs/benchmarks/model"), on_cpu=True)
    with console.status("counting"):
        result = result_of(quick)
    show(result, console)
    console.print(f"{save(result, folder)} and model.md")


if __name__ == "__main__":
    typer.run(main)
