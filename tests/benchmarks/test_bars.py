"""Bars that take long to measure are read from what the commands wrote."""

import os

import pytest
import torch

from benchmarks import bars, step
from benchmarks.harness import Comparison, Row, Timing
from benchmarks.options import RESULTS
from benchmarks.output import Machine, Result

HERE = Machine.here(torch.device("cpu"))


def written(folder, *, quick, measured, age):
    bar = step.Bar(
        what="speed", side="mpo", promised=">= 1.8", measured=measured, holds=measured >= 1.8
    )
    write(
        folder / "step.json",
        step.StepResult(machine=HERE, quick=quick, configurations=[], bars=[bar]),
        age,
    )


def write(path, result, age):
    path.parent.mkdir(parents=True)
    path.write_text(result.model_dump_json(), encoding="utf-8")
    os.utime(path, (1e9 - age, 1e9 - age))


def panel(milliseconds, *, tokens=64, loss="MPO"):
    """The linear loss in a panel whose products take 100 ms."""

    def row(name, status, time):
        return Row(
            candidate=name,
            status=status,
            both=Timing(median=time / 1e3, p20=time / 1e3, p80=time / 1e3, repetitions=1),
        )

    sizes = {"pairs": 1, "tokens": tokens, "hidden": 8, "vocab": 9, "scored": 0.625}
    return Comparison(
        workload="from hidden states",
        settings={"loss": loss, **sizes, "head": "trainable"},
        rows=[row("least work", "bound", 100), row("mpo_kernels", "ok", milliseconds)],
    )


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_full_result_counts(nowhere):
    here = HERE.folder
    written(nowhere / "results" / here, quick=False, measured=1.0, age=20)
    written(nowhere / "runs" / "benchmarks" / here, quick=False, measured=1.914, age=10)
    assert list(bars.step(False)) == [(f"step, speed, mpo ({here})", ">= 1.8", "1.91", True)]


@pytest.mark.parametrize("measured", [1.0, 1.914])
def test_another_machines_result_is_shown_and_not_judged(nowhere, measured):
    written(nowhere / "results" / "older", quick=False, measured=1.5, age=20)
    written(nowhere / "results" / "another", quick=False, measured=measured, age=10)
    written(nowhere / "runs" / "benchmarks" / HERE.folder, quick=True, measured=0.5, age=0)
    (bar,) = bars.step(False)
    assert bar == ("step, speed, mpo (another)", ">= 1.8", f"{measured:.2f}", None)


def test_nothing_measured_is_neither_held_nor_missed(nowhere):
    written(nowhere / "runs" / "benchmarks" / "hasty", quick=True, measured=0.5, age=0)
    (bar,) = bars.step(False)
    assert bar.holds is None and "benchmarks.step" in bar.measured


def test_this_machines_result_comes_before_a_newer_one_of_another(nowhere):
    written(nowhere / "results" / HERE.folder, quick=False, measured=1.0, age=20)
    written(nowhere / "results" / "another", quick=False, measured=1.914, age=10)
    assert list(bars.step(False)) == [
        (f"step, speed, mpo ({HERE.folder})", ">= 1.8", "1.00", False)
    ]


@pytest.mark.parametrize(("worst", "holds"), [(110.0, True), (111.0, False)])
def test_the_worst_panel_of_more_than_64_scored_rows_counts(nowhere, worst, holds):
    panels = [
        *(panel(105.0), panel(worst, tokens=256)),
        *(panel(150.0, tokens=51), panel(200.0, loss="DPO")),  # 64 rows; another function
    ]
    result = Result(benchmark="linear", machine=HERE, quick=False, comparisons=panels)
    write(nowhere / "results" / HERE.folder / "linear.json", result, age=0)
    (bar,) = bars.products(False)
    assert bar.holds is holds and bar.what.endswith(f"({HERE.folder})")
    assert bar.measured == (
        f"{worst / 100:.2f} at tokens 256, hidden 8, vocab 9, scored 0.625, head trainable;"
        f" {1 + holds} of 2 panels hold"
    )


def test_products_that_nobody_measured_are_neither_held_nor_missed(nowhere):
    (bar,) = bars.products(False)
    assert bar.holds is None and "benchmarks.linear" in bar.measured


def test_committed_results_are_read():
    """Those of before a panel named its loss too."""
    assert list(RESULTS.glob("*/linear.json"))
    (bar,) = bars.products(False)
    assert bar.measured.endswith("panels hold")


def test_the_head_makes_the_products_that_the_mathematics_needs_for_every_loss():
    assert [(bar.measured, bar.holds) for bar in bars.work(True)] == [("3", True), ("2", True)]


def test_float32_logits_are_known_to_float32_and_their_gradients_are_rounded_once():
    assert [bar.holds for bar in bars.float32_logits(True)] == [True, True]


def test_rounded_logits_would_miss_that_bar(monkeypatch):
    measure = bars.numerics.logprob_errors
    monkeypatch.setattr(
        bars.numerics, "logprob_errors", lambda dtype, _, **sizes: measure(dtype, None, **sizes)
    )
    assert [bar.holds for bar in bars.float32_logits(True)] == [False, False]
