"""The bars of the whole step are read from what the step's own command wrote."""

import os

import pytest
import torch

from benchmarks import bars, step
from benchmarks.output import Machine


def written(folder, *, quick, measured, age):
    bar = step.Bar(
        what="speed", side="mpo", promised=">= 1.8", measured=measured, holds=measured >= 1.8
    )
    result = step.StepResult(
        machine=Machine.here(torch.device("cpu")), quick=quick, configurations=[], bars=[bar]
    )
    folder.mkdir(parents=True)
    path = folder / "step.json"
    path.write_text(result.model_dump_json(), encoding="utf-8")
    os.utime(path, (1e9 - age, 1e9 - age))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_full_result_counts(nowhere):
    written(nowhere / "results" / "old", quick=False, measured=1.0, age=20)
    written(nowhere / "runs" / "benchmarks" / "new", quick=False, measured=1.914, age=10)
    written(nowhere / "runs" / "benchmarks" / "hasty", quick=True, measured=0.5, age=0)
    assert list(bars.step(False)) == [("step, speed, mpo (new)", ">= 1.8", "1.91", True)]


def test_nothing_measured_is_neither_held_nor_missed(nowhere):
    written(nowhere / "runs" / "benchmarks" / "hasty", quick=True, measured=0.5, age=0)
    (bar,) = bars.step(False)
    assert bar.holds is None and "benchmarks.step" in bar.measured
