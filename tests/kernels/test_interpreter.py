"""Runs the kernel tests once more with the Triton kernels themselves, in a process where triton
interprets them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize(
    "file",
    [
        "test_logits.py",
        "test_tokens.py",
        "test_linear.py",
        "test_float32_logits.py",
        "test_pool.py",
        "test_bytes.py",
        "test_strides.py",
        "test_rows.py",
        "test_sequence_losses.py",
    ],
)
def test_triton_kernels_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MPO_KERNELS_BACKEND": "triton"}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            str(HERE / file),
            "-o",
            "addopts=",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 0
