"""Runs every candidate on the same inputs, in one process, interleaved; checks each against float64
before it is timed.

A workload gives fresh inputs and the exact results; a candidate turns inputs into a scalar loss. A
candidate whose loss or gradient is wrong keeps its times but is marked `wrong` and ranks after all
right ones; one that cannot be imported or needs another device is `absent`.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, computed_field
from torch.profiler import ProfilerActivity, profile

from benchmarks.instruments.accuracy import relative_error
from benchmarks.instruments.operators import Flops

# torch's profiler would write lines of its own between the tables
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

UPSTREAM = 1.7
"""Gradient of the loss in every backward; not 1, for which some implementations have a shortcut."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest relative L2 error against float64 of a right answer; rounding the logits to bf16 alone
costs up to 1e-2."""

Inputs = Mapping[str, torch.Tensor]
Loss = Callable[[Inputs], torch.Tensor]


class Absent(Exception):
    """Raised by a candidate's `build` with the reason why it cannot run here."""


class Workload(Protocol):
    """What is computed."""

    name: str
    product_flops: int
    """FLOPs of one matrix product of the scored rows with the head; 0 where there is none."""
    dtype: torch.dtype
    device: torch.device

    def settings(self) -> dict[str, str | int | float]:
        """Sizes, for the report."""

    def inputs(self) -> Inputs:
        """New leaves; made outside the timing."""

    def exact(self) -> dict[str, torch.Tensor]:
        """`loss` and the gradient of each input that is trained, float64, for the upstream gradient
        UPSTREAM."""

    def gradients(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """What a backward left in `inputs`."""

    def bound(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """The least work of a forward and of a backward, timed beside the candidates."""


W = TypeVar("W", bound=Workload)


@dataclass(frozen=True)
class Candidate(Generic[W]):
    """`build(workload)` imports what it needs and returns the loss function, or raises Absent."""

    name: str
    build: Callable[[W], Loss]
    ours: bool = False


class Timing(BaseModel):
    """Seconds over the repetitions."""

    median: float
    p20: float
    p80: float
    repetitions: int


class Row(BaseModel):
    """One candidate in one comparison. `peak_bytes` is above the inputs and includes the
    gradients."""

    candidate: str
    status: Literal["ok", "wrong", "absent", "failed", "bound"]
    ours: bool = False
    reason: str = ""
    errors: dict[str, float] = {}
    forward: Timing | None = None
    backward: Timing | None = None
    both: Timing | None = None
    peak_bytes: int | None = None
    products: float | None = None
    """Matrix products that forward and backward make, in multiples of one over the scored rows."""


class Comparison(BaseModel):
    """All candidates on one workload, best first."""

    workload: str
    settings: dict[str, str | int | float]
    rows: list[Row]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def times_least_work(self) -> dict[str, float]:
        """Time of each candidate over that of the least work, forward and backward."""
        least = next((r.both.median for r in self.rows if r.status == "bound" and r.both), None)
        timed = {r.candidate: r.both.median for r in self.rows if r.status != "bound" and r.both}
        return {} if least is None else {name: time / least for name, time in timed.items()}

    def row(self, candidate: str) -> Row:
        """The row of a candidate by its name."""
        return next(row for row in self.rows if row.candidate == candidate)

    def fastest(self, ours: bool) -> Row | None:
        """The right row with the smallest time, of ours or of the others."""
        return min(
            (r for r in self.rows if r.status == "ok" and r.ours == ours), key=_both, default=None
        )


def compare(
    workload: W, candidates: Sequence[Candidate[W]], repetitions: int = 20, seconds: float = 5.0
) -> Comparison:
    """Each candidate is built, checked, its memory counted, and then timed: `repetitions` rounds,
    or fewer where one takes `seconds`.

    Every round runs all candidates in the same order, so that a machine that slows down does so for
    all.
    """
    # compiled candidates stop compiling after so many workloads of other sizes
    torch.compiler.reset()
    exact = workload.exact()
    rows, losses = [], {}
    for candidate in candidates:
        row, loss = _check(workload, candidate, exact)
        rows.append(row)
        if loss is not None:
            losses[candidate.name] = loss
            row.peak_bytes = peak_bytes(workload, loss)
            _run(loss, workload.inputs())  # a compiler may specialise anew after the profiler
    spent = dict.fromkeys(losses, 0.0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    bound: list[tuple[float, float]] = []
    clock = _Clock(workload.device)
    for round_number in range(repetitions):
        running = [name for name in losses if round_number < 1 or spent[name] < seconds]
        if not running:
            break
        for name in running:
            times[name].append(_once(workload, losses[name], clock))
            spent[name] += sum(times[name][-1])
        forward, backward = workload.bound()
        bound.append((clock(forward)[0], clock(backward)[0]))
    for row in rows:
        if row.candidate in times:
            row.forward, row.backward, row.both = _timings(times[row.candidate])
            row.products = matrix_products(workload, losses[row.candidate])
    if bound:
        forward_time, backward_time, both_time = _timings(bound)
        rows.append(
            Row(
                candidate="least work",
                status="bound",
                forward=forward_time,
                backward=backward_time,
                both=both_time,
            )
        )
    order = {"bound": 0, "ok": 1, "wrong": 2, "failed": 3, "absent": 4}
    rows.sort(key=lambda row: (order[row.status], _both(row)))
    return Comparison(workload=workload.name, settings=workload.settings(), rows=rows)


def peak_bytes(workload: Workload, loss: Loss) -> int:
    """Most bytes that one forward and backward hold at once above its inputs, the gradients
    included."""
    inputs = workload.inputs()
    gc.collect()
    if workload.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(loss, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return allocations(lambda: _run(loss, inputs))


def allocations(work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's CPU allocator has handed out at once while `work` runs, above what
    it had before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def matrix_products(workload: Workload, loss: Loss) -> float | None:
    """Of compiled code those of the code as it is written, which is what a counter sees. None of an
    operator that hides them."""
    if not workload.product_flops:
        return None
    with torch.compiler.set_stance("force_eager"), Flops() as counter:
        _run(loss, workload.inputs())
    return counter.total / workload.product_flops or None


def _check(workload: W, candidate: Candidate[W], exact: Inputs) -> tuple[Row, Loss | None]:
    row = Row(candidate=candidate.name, status="ok", ours=candidate.ours)
    try:
        loss = candidate.build(workload)
        for _ in range(2):  # the second run is warm and must be as right as the first
            inputs = workload.inputs()
            value = _run(loss, inputs)
        found = {"loss": value, **workload.gradients(inputs)}
    except (Absent, ImportError) as reason:
        row.status, row.reason = "absent", _line(reason)
        return row, None
    except Exception as reason:  # a peer may fail in any way; its row says how
        row.status, row.reason = "failed", _line(reason)
        return row, None
    bar = TOLERANCE[workload.dtype]
    for name, want in exact.items():
        row.errors[name] = _error_of(found[name], want) if name in found else float("inf")
    worst = max(row.errors, key=lambda name: row.errors[name])
    if not row.errors[worst] <= bar:
        row.status = "wrong"
        row.reason = f"{worst} is off by {row.errors[worst]:.1e}, more than {bar:.0e}"
    return row, loss


def _run(loss: Loss, inputs: Inputs) -> torch.Tensor:
    value = loss(inputs)
    value.backward(torch.full_like(value, UPSTREAM))
    return value.detach()


def _once(workload: Workload, loss: Loss, clock: _Clock) -> tuple[float, float]:
    inputs = workload.inputs()
    forward, value = clock(lambda: loss(inputs))
    upstream = torch.full_like(value, UPSTREAM)
    backward, _ = clock(lambda: value.backward(upstream))
    return forward, backward


class _Clock:
    """Seconds that a call takes, and its result. On a GPU by events, after the L2 cache was
    overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self._gpu else None

    def __call__(self, function: Callable[[], Any]) -> tuple[float, Any]:
        if self._flush is None:
            start = time.perf_counter()
            result = function()
            return time.perf_counter() - start, result
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result


def _timings(times: list[tuple[float, float]]) -> tuple[Timing, Timing, Timing]:
    forward = timing([f for f, _ in times])
    backward = timing([b for _, b in times])
    return forward, backward, timing([f + b for f, b in times])


def timing(seconds: list[float]) -> Timing:
    """Median with 20th and 80th percentile."""
    if len(seconds) < 2:
        return Timing(median=seconds[0], p20=seconds[0], p80=seconds[0], repetitions=1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(
        median=statistics.median(seconds), p20=fifths[0], p80=fifths[3], repetitions=len(seconds)
    )


def _error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 distance; of another shape or with NaN, which are wrong by any bar, infinite."""
    if found.shape != exact.shape:
        return float("inf")
    error = relative_error(found.detach().to(exact.device), exact)
    return float("inf") if math.isnan(error) else error


def _both(row: Row) -> float:
    return row.both.median if row.both is not None else float("inf")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160] if not isinstance(error, Absent) else text
