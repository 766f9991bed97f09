"""What this package promises of itself, each with the value measured now: `python -m
benchmarks.bars [--quick]`.

Exits with status 1 if one is missed. Bars that take long to measure are read from what
`benchmarks.linear` and `benchmarks.step` wrote last on this machine. If they wrote nothing here,
another machine's values are shown and not judged: they are of the code of that day.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
import typer
from rich.table import Table

# triton's default until 3.10; it decides about instruction counts
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import mpo_kernels
from benchmarks.candidates import from_hidden, ours_from_hidden
from benchmarks.harness import Comparison, compare, matrix_products, peak_bytes
from benchmarks.instruments import moved_bytes, numerics
from benchmarks.instruments.accuracy import relative_error
from benchmarks.instruments.covering import covering
from benchmarks.objectives import OBJECTIVES
from benchmarks.options import RESULTS, Quick, Threads, wide_console
from benchmarks.output import Machine, Result
from benchmarks.step import StepResult
from benchmarks.workloads import FromHidden

ACCURACY_ELEMENTS = 9_000_000
"""Elements of the largest head in the accuracy sample."""
FLOAT32_LOGITS = {"rows": 128, "hidden": 576, "vocab": 49152}
"""Sizes of the sample; its logits have standard deviation 3."""
PRODUCTS = "time of linear_mpo_loss / its matrix products alone, over 64 scored rows"
PEERS = ("plain PyTorch", "Liger fused, chunk 1", "Liger fused, chunk 16", "TRL chunked log-probs")


class Bar(NamedTuple):
    """One promise."""

    what: str
    promised: str
    measured: str
    holds: bool | None  # None: not measured here


def main(quick: Quick = False, threads: Threads = 2) -> None:
    """Each bar with the value measured beside it."""
    torch.set_num_threads(threads)
    console = wide_console()
    table = Table("", "bar", "measured", "", title="Bars", title_justify="left")
    missed = 0
    for section in SECTIONS:
        with console.status(section.__name__):
            for bar in section(quick):
                table.add_row(
                    bar.what,
                    bar.promised,
                    bar.measured,
                    {True: "holds", False: "[red]MISSED[/]", None: "not measured here"}[bar.holds],
                )
                missed += bar.holds is False
    console.print(table)
    raise typer.Exit(1 if missed else 0)


def accuracy(quick: bool) -> Iterator[Bar]:
    """Errors of the linear loss over a sample of the numerics matrix."""
    largest = ACCURACY_ELEMENTS // (8 if quick else 1)
    cases = covering(numerics.AXES, list(itertools.combinations(numerics.AXES, 2)))
    missed, ratios, single = [], [], []
    for case in (case for case in cases if case["vocab"] * case["hidden"] <= largest):
        try:
            errors = numerics.check(case)
        except AssertionError as error:
            missed.append(str(error))
            continue
        if case["dtype"] == torch.float32:
            single += [ours for ours, _ in errors.values()]
        else:
            ratios += numerics.ratios(errors)
    mean, rare = statistics.geometric_mean(ratios), statistics.quantiles(ratios, n=20)[-1]
    text = (
        f"geometric mean {mean:.3f}x, 95th percentile {rare:.2f}x of {len(ratios)}; {len(missed)}"
        " results beyond their bar"
    )
    yield Bar(
        "bf16, fp16: error / error of plain autograd", "<= 1.25", text, not missed and mean < 1.05
    )
    within = sum(error <= numerics.FP32_BAR for error in single)
    # Beyond 1e-5 a result may be only where plain autograd is too, or where the error is the
    # difference of two nearly equal numbers.
    text = (
        f"{within} of {len(single)} results, median {statistics.median(single):.1e}; the others are"
        " held to plain autograd's error"
    )
    yield Bar("fp32: relative error", "<= 1e-5", text, not missed)


def float32_logits(quick: bool) -> Iterator[Bar]:
    """What `logits_dtype=torch.float32` makes of half-precision products, beside rounded logits."""
    sizes = {"rows": 64, "hidden": 64, "vocab": 8000} if quick else dict(FLOAT32_LOGITS)
    for dtype in (torch.bfloat16, torch.float16):
        rounded, wide = (
            numerics.logprob_errors(dtype, logits_dtype, **sizes)
            for logits_dtype in (None, torch.float32)
        )
        text = (
            f"log-probabilities {wide.logprob:.1e} (rounded logits {rounded.logprob:.1e}),"
            f" gradients {wide.gradient:.1e} ({rounded.gradient:.1e})"
        )
        yield Bar(
            f"{str(dtype)[6:]}, float32 logits: mean error of a log-probability, relative error of"
            " gradients",
            f"<= 2e-6, <= {torch.finfo(dtype).eps / 2:.1e}",
            text,
            wide.logprob <= 2e-6 and wide.gradient <= torch.finfo(dtype).eps / 2,
        )


def traffic(quick: bool) -> Iterator[Bar]:
    """Bytes from logits, counted in the interpreter."""
    found = moved_bytes.in_interpreter([8192] if quick else [8192, 20011])
    for vocab, values in found.items():
        yield Bar(
            f"bytes per bf16 logit, forward and backward, V = {vocab}",
            "<= 6.05",
            f"{values['bytes_per_element']:.3f}",
            values["bytes_per_element"] <= 6.05,
        )
    ignored = max(values["bytes_of_ignored_rows"] for values in found.values())
    yield Bar("bytes of ignored rows, forward", "0", f"{ignored:.0f}", ignored == 0)
    share = max(values["in_place_share"] for values in found.values())
    yield Bar("new memory in place, share of the logits", "< 1 %", f"{share:.2%}", share < 0.01)


def work(quick: bool) -> Iterator[Bar]:
    """FLOPs from hidden states, counted."""
    for trainable, gemms in ((True, 3), (False, 2)):
        counted = {}
        for objective in OBJECTIVES:
            workload = FromHidden(4, 64, 64, 1000, trainable=trainable, objective=objective)
            for chunk_bytes in (None, 1):  # one chunk, and one for each pair
                loss = ours_from_hidden(workload, chunk_bytes)
                counted[objective.name, chunk_bytes] = matrix_products(workload, loss) or 0
        most = max(counted.values())
        kind = "trainable" if trainable else "frozen"
        yield Bar(
            f"head FLOPs / (2 x scored x D x V), {kind} head, five losses, one chunk and four",
            f"<= {gemms}",
            f"{most:g}",
            0 < min(counted.values()) and most <= gemms,
        )


def memory(quick: bool) -> Iterator[Bar]:
    """Peak above the inputs, for one and for many chunks."""
    budget, hidden, vocab = 32 << 20, 128, 32000
    for tokens in (128, 1024):
        workload = FromHidden(4, tokens, hidden, vocab, scored=1.0)

        def loss(inputs, workload=workload):
            return mpo_kernels.linear_mpo_loss(
                inputs["hidden"],
                inputs["weight"],
                workload.labels,
                *workload.constants,
                chunk_bytes=budget,
            ).loss

        peak = peak_bytes(workload, loss)
        named = budget + 4 * vocab * hidden + 4 * 8 * tokens * hidden
        rest = (peak - named) / named
        yield Bar(
            f"peak / (budget + dW + dH), {8 * tokens} tokens from hidden states",
            "<= 1.1",
            f"{1 + rest:.2f}",
            rest <= 0.1,
        )


def compiled(quick: bool) -> Iterator[Bar]:
    """What Triton's compiler makes of every kernel."""
    from benchmarks.instruments.machine_code import TARGETS
    from benchmarks.instruments.variants import facts, variants

    for target in ("sm_90",) if quick else TARGETS:
        made = [(variant, facts(variant.compiled(target))) for variant in variants()]
        spilled = sum(values["spilled"] for _, values in made)
        widths = {
            values["widest_bits"]
            for variant, values in made
            if variant.tiled_as is not None and variant.aligned
        }
        stats = next(values for variant, values in made if variant.name == "stats plain aligned")
        text = (
            f"{spilled} spills in {len(made)} variants; {min(widths)}-bit; statistics"
            f" {stats['registers']} registers, {stats['instructions_per_element']} instructions per"
            " element"
        )
        yield Bar(
            f"compiled for {target}",
            "no spills; 128-bit where aligned",
            text,
            spilled == 0 and widths == {128},
        )


def emulated(quick: bool) -> Iterator[Bar]:
    """The emitted PTX on the emulator, through the package's own launches."""
    from benchmarks.instruments.launch import TARGETS, gpu_on_cpu
    from mpo_kernels import oracle

    vocab, gap = 2051, torch.tensor([0.3, -0.2])
    labels = torch.randint(0, vocab, (4, 3), generator=torch.Generator().manual_seed(0))
    exact = torch.randn(4, 3, vocab, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = exact.double().requires_grad_()
    oracle.mpo_loss(wide, labels, gap.double())[0].backward()
    os.environ["MPO_KERNELS_BACKEND"] = "triton"
    try:
        for target in ("sm_90",) if quick else TARGETS:
            logits = exact.clone().requires_grad_()
            with gpu_on_cpu(target, strict=False) as launches:
                mpo_kernels.mpo_loss(logits, labels, gap).loss.backward()
            error = relative_error(logits.grad, wide.grad)
            findings = sum(not launch.findings.clean for launch in launches)
            text = (
                f"gradient off by {error:.1e}; findings in {findings} of {len(launches)} launches"
            )
            yield Bar(
                f"PTX for {target} emulated",
                "the oracle; no race, no bad access",
                text,
                error < 4e-3 and findings == 0,
            )
    finally:
        os.environ.pop("MPO_KERNELS_BACKEND")


def peers(quick: bool) -> Iterator[Bar]:
    """CPU, beside plain PyTorch, Liger and TRL, at 62.5 % scored rows."""
    candidates = [c for c in from_hidden() if c.name in PEERS or c.name == "mpo_kernels"]
    result: Comparison = compare(
        FromHidden(1, 256, 576, 49152), candidates, repetitions=3 if quick else 12
    )
    ours, theirs = result.fastest(ours=True), result.fastest(ours=False)
    absent = [row.candidate for row in result.rows if row.status == "absent"]
    if ours is None or theirs is None or ours.both is None or theirs.both is None:
        yield Bar(
            "CPU time / fastest of plain, Liger, TRL",
            "<= 0.65",
            f"nothing right to compare with; absent: {absent}",
            False,
        )
        return
    ratio = ours.both.median / theirs.both.median
    text = f"{ratio:.2f} of {theirs.candidate}" + (
        f"; absent: {', '.join(absent)}" if absent else ""
    )
    yield Bar("CPU time / fastest of plain, Liger, TRL", "<= 0.65", text, ratio <= 0.65)
    smallest = min(
        (row for row in result.rows if row.status == "ok" and not row.ours),
        key=lambda row: row.peak_bytes or 0,
    )
    share = (ours.peak_bytes or 0) / (smallest.peak_bytes or 1)
    yield Bar(
        "CPU peak memory / leanest of them",
        "< 1",
        f"{share:.2f} of {smallest.candidate}",
        share < 1,
    )


def products(quick: bool) -> Iterator[Bar]:
    """The linear loss beside its matrix products alone, from what `benchmarks.linear` wrote last at
    full size."""
    found = _newest_full("linear", Result)
    if found is None:
        yield Bar(PRODUCTS, "<= 1.10", "run python -m benchmarks.linear", None)
        return
    panels = [
        (comparison.times_least_work["mpo_kernels"], comparison.settings)
        for comparison in found.result.comparisons
        if comparison.settings.get("loss", "MPO") == "MPO" and _scored_rows(comparison) > 64
    ]
    worst, sizes = max(panels, key=lambda panel: panel[0])
    within = sum(ratio <= 1.10 for ratio, _ in panels)
    names = ("tokens", "hidden", "vocab", "scored", "head")
    text = f"{worst:.2f} at {', '.join(f'{name} {sizes[name]}' for name in names)}"
    yield Bar(
        f"{PRODUCTS} ({found.machine})",
        "<= 1.10",
        f"{text}; {within} of {len(panels)} panels hold",
        worst <= 1.10 if found.here else None,
    )


def _scored_rows(comparison: Comparison) -> int:
    pairs, tokens, scored = (float(comparison.settings[n]) for n in ("pairs", "tokens", "scored"))
    return round(2 * pairs * max(1, round(tokens * scored)))


def step(quick: bool) -> Iterator[Bar]:
    """The whole step, from what `benchmarks.step` wrote last at full size."""
    found = _newest_full("step", StepResult)
    if found is None:
        yield Bar(
            "whole training step", "1.8x; 0.55 of the memory", "run python -m benchmarks.step", None
        )
        return
    for bar in found.result.bars:
        yield Bar(
            f"step, {bar.what}, {bar.side} ({found.machine})",
            bar.promised,
            f"{bar.measured:.2f}",
            bar.holds if found.here else None,
        )


R = TypeVar("R", Result, StepResult)


@dataclass(frozen=True)
class Found(Generic[R]):
    """What a command wrote."""

    machine: str
    """Its folder."""
    here: bool
    """It is this one."""
    result: R


def _newest_full(benchmark: str, kind: type[R]) -> Found[R] | None:
    """Of this machine's results at full size the newest, or else of all."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here = {Machine.here(torch.device(device)).folder for device in devices}
    paths = sorted(
        (
            path
            for root in (RESULTS, Path("runs/benchmarks"))
            for path in root.glob(f"*/{benchmark}.json")
        ),
        key=lambda path: (path.parent.name in here, path.stat().st_mtime),
    )
    for path in reversed(paths):
        result = kind.model_validate_json(path.read_text(encoding="utf-8"))
        if not result.quick:
            return Found(path.parent.name, path.parent.name in here, result)
    return None


SECTIONS = (
    accuracy,
    float32_logits,
    traffic,
    work,
    memory,
    compiled,
    emulated,
    peers,
    products,
    step,
)


if __name__ == "__main__":
    typer.run(main)
