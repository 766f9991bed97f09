"""What a reader relies on without running anything: style, types, and that the kernels import
without the trainer's libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linted_and_typed(command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_import_without_the_trainer_or_triton():
    """`import mpo_kernels` loads torch, and triton only once a kernel is launched."""
    script = (
        "import sys, mpo_kernels\nunwanted = {'triton', 'deepspeed', 'transformers', 'pydantic',"
        " 'omegaconf', 'typer', 'rich', 'datasets', 'matplotlib', 'mpo'}\nnames ="
        " {name.split('.')[0] for name in sys.modules}\nsys.exit(', '.join(unwanted & names) or"
        " None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_command_line_starts_fast_and_shows_examples():
    """Help and configuration errors come before the heavy imports."""
    script = (
        "import sys, mpo.commands.app; sys.exit(', '.join({'torch', 'deepspeed', 'transformers'} &"
        " set(sys.modules)) or None)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
    result = subprocess.run(
        [sys.executable, "-m", "mpo", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "train.max_steps=5" in result.stdout


def test_without_the_trainer_extra_the_command_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; from mpo.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (
        result.returncode == 2
        and "pip install 'mpo-kernels[train]'" in result.stderr
        and "Traceback" not in result.stderr
    )
