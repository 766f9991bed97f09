"""Every benchmark on a GPU: `python -m pytest -m gpu`. Nobody is timed; ours must be right."""

import subprocess
import sys

import pytest
from devices import A_GPU

from benchmarks.options import RESULTS
from benchmarks.output import Result

TABLES = ("linear", "logits", "engines", "scaling")


def ours_that_failed(result):
    """Rows of ours that are not right."""
    rows = [row for comparison in result.comparisons for row in comparison.rows if row.ours]
    assert rows
    return [f"{row.candidate}: {row.reason}" for row in rows if row.status != "ok"]


@pytest.mark.parametrize(
    "file",
    [file for name in TABLES for file in sorted(RESULTS.glob(f"*/{name}.json"))],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_filed_results_are_right(file):
    assert not ours_that_failed(Result.model_validate_json(file.read_text()))


@pytest.mark.parametrize("name", [pytest.param(name, marks=A_GPU) for name in TABLES])
def test_on_a_gpu(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    result = Result.model_validate_json((tmp_path / f"{name}.json").read_text())
    assert not result.machine.device.startswith("CPU") and not ours_that_failed(result)
