"""What a person sees on terminals of every width, on one that cannot move its cursor, and in a
log."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

import mpo
from mpo.evaluation.gaps import GapRow, GapTable
from mpo.runtime.terminal import distinct_names
from mpo.training import memory
from mpo.training.result import RunResult

LANGUAGES = ("ar", "bn", "ja", "ko", "sw", "zh")
LONG = "/home/someone/experiments/2026/multilingual/gemma/second-attempt"
SHOWS = f"""
from mpo.runtime.progress import Progress
gaps = [f"{{language}} +1.23" for language in {LANGUAGES}]
details = ["loss 0.5156", "L1 0.4000", "L2 1.23e-05", "2.00 pairs/s", f"gap {{gaps[0]}}", *gaps[1:]]
progress = Progress(enabled=True)
with progress.steps(2400, 0, 1) as show:
    show(7, details)
with progress.task("Gaps of {LONG}/model", 321) as advance:
    advance(123)
with progress.task("日本語のモデル" * 9, 5) as advance:
    advance(5)
"""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(columns=None, **environment):
    """The last state of each line, from a terminal of so many columns, or from a pipe."""
    here = str(Path(mpo.__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": here,
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": str(columns or 100),
        **environment,
    }
    if columns is None:
        process = subprocess.run(
            [sys.executable, "-c", SHOWS], env=env, capture_output=True, check=True
        )
        return process.stdout.decode()
    terminal, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SHOWS], env=env, stdin=slave, stdout=slave, stderr=slave
    ) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                output += os.read(terminal, 1 << 16)
            except OSError:  # the last writer is gone
                break
    os.close(terminal)
    assert process.returncode == 0, output.decode()
    return output.decode()


def drawn(output):
    """What is left of each line that was drawn again and again."""
    return [
        CODES.sub("", line.rsplit("\r", 1)[-1]) for line in output.replace("\r\n", "\n").split("\n")
    ]


@pytest.mark.parametrize("columns", [34, 40, 60, 80, 100, 140, 200])
def test_the_step_the_time_and_the_loss_come_first(columns):
    lines = drawn(run(columns))
    assert all(cell_len(line) <= columns for line in lines)
    (training,) = [line for line in lines if "/2400" in line]
    assert re.search(r"^(Training  )?7/2400  0:00:\d\d( <-:--:--)?  loss 0\.5156", training)
    for needed, seen in (
        (60, "Training"),
        (80, "L1 0.4000"),
        (80, "L2 1.23e-05"),
        (100, "2.00 pairs/s"),
        (140, "ar +1.23"),
        (200, "zh +1.23"),
    ):
        assert columns < needed or seen in training
    assert training.rstrip().endswith("…") == ("zh +1.23" not in training)
    assert not re.search(r"\+1\.?2?(  …)?$", training.rstrip())  # no number is cut
    (gap,) = [line for line in lines if "123/321" in line]
    assert re.search(r"123/321  0:00:\d\d", gap)
    assert columns == 34 or "…" in gap or f"{LONG}/model" in gap
    assert columns < 60 or (gap.startswith("Gaps of") and "/model" in gap)
    assert ("━" in training) == (columns == 200)


@pytest.mark.parametrize(
    ("columns", "environment"), [(None, {}), (80, {"TERM": "dumb"}), (None, {"FORCE_COLOR": "1"})]
)
def test_a_log_has_whole_lines(columns, environment):
    """Also where a terminal cannot move its cursor, and where a pipe asks for colours."""
    output = CODES.sub("", run(columns, **environment)).replace("\r\n", "\n")
    assert "\r" not in output and "━" not in output
    gap = " ".join(f"{language} +1.23" for language in LANGUAGES)
    assert "step 7/2400  loss 0.5156  L1 0.4000  L2 1.23e-05  2.00 pairs/s  gap" in output
    assert gap.replace(" +", "+") in " ".join(output.split()).replace(" +", "+")
    assert f"Gaps of {LONG}/model: 123/321 sequences in" in output


def console(columns):
    return Console(file=io.StringIO(), width=columns, highlight=False, markup=False)


def gap_table(paths):
    row = GapRow(
        n=100,
        target_gap=1.2345,
        target_gap_interval=(1.1, 1.3),
        dominant_gap=-0.5,
        distance=0.25,
        distance_interval=(0.125, 0.5),
        sign_accuracy=0.625,
    )
    return GapTable(1.0, {path: dict.fromkeys((*LANGUAGES, "all"), row) for path in paths})


PATHS = [
    (f"{LONG}/model", f"{LONG.replace('second', 'third')}/model"),
    (f"{LONG}/first/model", f"{LONG}/second/model"),
    (f"{LONG}/{'a' * 90}1", f"{LONG}/{'a' * 90}2"),
    (LONG, f"{LONG}/model"),
    ("meta-llama/Llama-3.1-8B-Instruct", "mlabonne/Llama-3.1-8B-Instruct"),
    ("runs/[old]/model", "runs/[/x]/model"),
    ("runs/a", "runs/a/"),
]


@pytest.mark.parametrize("paths", PATHS, ids=[str(i) for i in range(len(PATHS))])
def test_models_that_differ_have_names_that_differ(paths):
    """At every width; and every number is whole."""
    names = distinct_names(paths)
    assert len(set(names)) == 2
    assert all(
        path.rstrip("/").endswith(name.rstrip("/")) for name, path in zip(names, paths, strict=True)
    )
    for columns in range(20, 170, 7):
        out = console(columns)
        gap_table(paths).show(out)
        text = out.file.getvalue()
        cells = re.sub(r"[\s│┃]", "", text)
        for name, path in zip(names, paths, strict=True):
            assert all(name[i : i + 40] in cells for i in range(0, len(name), 40)), columns
            assert name == path or f"{name}: {path}" in text
        for number in ("+1.234", "[+1.100,", "+1.300]", "-0.500", "0.250", "[0.125,", "62%"):
            assert text.count(number) == 2 * 7, (number, columns)


def test_names_are_as_short_as_they_can_be():
    assert distinct_names(["runs/a/model", "runs/b/model"]) == ["a/model", "b/model"]
    assert distinct_names(["runs/a", "other/b"]) == ["a", "b"]
    assert distinct_names(["x/run", "x/run/model"]) == ["run", "model"]
    assert distinct_names(["only/one"]) == ["one"]
    assert distinct_names(["/r/x", "r/x"]) == ["/r/x", "r/x"]


def result():
    before = GapRow(6, 0.25, (0.0, 0.0), 0.25, 0.25, (0.0, 0.0), 0.5)
    after = GapRow(6, 1.5, (0.0, 0.0), 1.5, 1.5, (0.0, 0.0), 1.0)
    languages = (*LANGUAGES, "all")
    models = {"before": dict.fromkeys(languages, before), "after": dict.fromkeys(languages, after)}
    return RunResult("mpo", GapTable(1.0, models), l2=0.001, l2_relative=0.01)


def test_every_number_of_a_table_is_whole_at_any_width():
    sizes = memory.Size(
        parameters=10**9, trained=10**6, vocab=11, hidden=8, intermediate=20, layers=3
    )
    parts = ("weights", "gradients", "optimizer", "buckets", "activations", "head", "total")
    rows = [{"gpus": n, **dict.fromkeys(parts, 14.25)} for n in (1, 2, 4)]
    for columns in range(20, 150, 5):
        out = console(columns)
        result().show(out)
        text = out.file.getvalue()
        assert text.count("+0.250") == text.count("+1.500") == 2 * 7 and text.count("100%") == 7, (
            columns
        )
        assert all(re.search(rf"\b{language}\b", text) for language in (*LANGUAGES, "all"))
        out = console(columns)
        memory.show(rows, sizes, 100, out)
        assert out.file.getvalue().count("14.25") == 3 * len(parts), columns
