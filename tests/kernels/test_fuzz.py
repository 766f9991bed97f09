"""A few seconds of the fuzzer on either backend. For longer: `python tests/kernels/fuzz.py --seconds 3600 --seed 1`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import INTERPRETED

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
@pytest.mark.parametrize(("backend", "interpret"), [("torch", "0"), ("triton", "1")], ids=["torch", "interpreter"])
def test_problems_drawn_at_random(backend, interpret):
    environment = {**os.environ, "MPO_KERNELS_BACKEND": backend, "TRITON_INTERPRET": interpret}
    result = subprocess.run(
        [sys.executable, str(FUZZ), "--seconds", "8"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=FUZZ.parents[2],
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all agree with the oracle" in result.stdout
