"""The fuzzer on either backend: some hundred problems by default, ten thousand and more in the slow
set.

For longer: `python tests/kernels/fuzz.py --seconds 3600 --seed 100000`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import INTERPRETED

FUZZ = Path(__file__).with_name("fuzz.py")
FEW = [("torch", 0, 250), ("triton", 0, 30)]
MANY = [
    ("torch", 1_000, 5_000),
    ("torch", 6_000, 5_000),
    ("triton", 1_000, 900),
    ("triton", 1_900, 900),
]


def agree(backend, first, problems):
    environment = {
        **os.environ,
        "MPO_KERNELS_BACKEND": backend,
        "TRITON_INTERPRET": str(int(backend == "triton")),
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(FUZZ),
        "--seed",
        str(first),
        "--problems",
        str(problems),
        "--all",
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=FUZZ.parents[2],
        timeout=3600,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert (
        f"{problems} problems, numbers {first} to {first + problems - 1}: all agree with the oracle"
        in result.stdout
    )


@pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
@pytest.mark.parametrize(("backend", "first", "problems"), FEW)
def test_problems_drawn_at_random(backend, first, problems):
    agree(backend, first, problems)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
@pytest.mark.parametrize(("backend", "first", "problems"), MANY)
def test_many_problems(backend, first, problems):
    agree(backend, first, problems)
