"""Whole runs on GPUs against the CPU's, and every attention kernel against float64: `python -m
pytest -m gpu`. What does for any device runs on the CPU too."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import flash
import pytest
import torch
import yaml
from devices import EVERYWHERE, needs
from test_attention import plain_attention
from tiny import mpo_command, native_rows, save_model, write_rows

from mpo.models import attention
from mpo.models.documents import Documents
from mpo.training.run_folder import read_metrics

SEES_GPUS = True


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("gpu")
    save_model(root / "model", tokenizer)
    write_rows(root / "train.jsonl", native_rows(dominants=4))
    configuration = {
        "output_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"], "eval_rows_per_language": 1, "max_length": 256},
        "train": {
            "epochs": 1,
            "pairs_per_step": 4,
            "pairs_per_micro_batch": 2,
            "learning_rate": 3e-4,
        },
        "checkpoint": {"export": False},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(configuration))
    return root


def on(device):
    """Environment of a process that computes there."""
    return {"DS_ACCELERATOR": device, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def run(project, name, device, *overrides, ranks=1):
    """The rows of metrics of a run in its own folder on a device."""
    out = project / name
    options = (f"output_dir={out}", *overrides)
    result = mpo_command(
        "train", str(project / "run.yaml"), *options, ranks=ranks, timeout=600, **on(device)
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return read_metrics(out / "metrics.jsonl")


def apart(ours, theirs):
    """The largest distance of two runs' losses, of what the reference run's are at most."""
    assert len(ours) == len(theirs)
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) / max(
        row["loss"] for row in theirs
    )


@pytest.fixture(scope="module")
def on_the_cpu(project):
    return run(project, "cpu", "cpu", "zero.stage=0")


RUNS = [
    *((f"float32, stage {stage}", ("float32", stage, "packed")) for stage in range(4)),
    *((f"bfloat16, stage {stage}", ("bfloat16", stage, "packed")) for stage in range(1, 4)),
    ("float32, eager", ("float32", 2, "eager")),
]


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs(n)) for n in (1, 2)])
@pytest.mark.parametrize(("dtype", "stage", "how"), [r for _, r in RUNS], ids=[n for n, _ in RUNS])
def test_losses_are_the_cpus(project, on_the_cpu, ranks, dtype, stage, how):
    """To half of the dtype's digits: the others are what sums in other orders may cost."""
    more = (f"model.dtype={dtype}", f"zero.stage={stage}", f"model.attention={how}")
    found = run(project, f"{dtype}-{stage}-{how}-{ranks}", "cuda", *more, ranks=ranks)
    assert apart(found, on_the_cpu) < torch.finfo(getattr(torch, dtype)).eps ** 0.5


@pytest.mark.parametrize("device", EVERYWHERE)
def test_deterministic_runs_are_the_same_bit_for_bit(project, device):
    more = ("train.deterministic=true", "model.dtype=bfloat16", "zero.stage=1", "train.max_steps=2")
    one, two = (run(project, f"same-{device}-{i}", device, *more) for i in range(2))
    names = ("loss", "l1", "l2", "grad_norm")
    assert [[a[n] for n in names] for a in one] == [[b[n] for n in names] for b in two]


ROW_BY_ROW = ("train.pairs_per_step=1", "train.pairs_per_micro_batch=1")


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_and_keeps_what_every_other_does(project, device, dtype):
    """Whatever its row's length: operators, values that the host reads, bytes; and no kernel is
    compiled for a new shape."""
    out, counts = project / f"steps-{device}-{dtype}", project / f"steps-{device}-{dtype}.json"
    worker = str(Path(__file__).with_name("steps_worker.py"))
    # a gradient is multiplied only where it is clipped
    more = ("zero.stage=1", "train.max_grad_norm=1e30", *ROW_BY_ROW)
    result = subprocess.run(
        [
            *(sys.executable, worker, str(counts), str(project / "run.yaml")),
            *(f"output_dir={out}", f"model.dtype={dtype}", *more),
        ],
        **{"capture_output": True, "text": True, "check": False, "timeout": 600},
        env={**os.environ, **on(device)},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    _, _, third, *later = json.loads(counts.read_text())
    assert len(later) == 5 and len({step["tokens"] for step in later}) == 3
    for step in later:
        assert {**step, "tokens": 0} == {**third, "tokens": 0, "compiled": 0}


SHAPES = Documents.of([(3, 2, 4), (20, 130, 7), (1, 1), (64, 64, 65)])
FLASHES = ((flash.PYTORCHS, None), (flash.FLASH_ATTN, None), (flash.FLASH_ATTN, 1.5))
CASES = [("SDPA, span by span", None), ("SDPA, span by span", 1.5), *FLASHES]


def plainly(tensors, upstream, softcap, window):
    """The output and the gradients of plain attention in the tensors' own precision."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = plain_attention(*leaves, SHAPES, softcap, window)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("kernel", "softcap"), CASES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_equals_float64(device, kernel, softcap, window, dtype, monkeypatch):
    """To what plain attention in that dtype is off, and a rounding of the result more. On a CPU the
    kernels' definitions stand in for them."""
    if device == "cuda" and kernel == flash.FLASH_ATTN and attention.flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    generator, rows = torch.Generator().manual_seed(0), sum(map(sum, SHAPES.lengths))
    tensors = [torch.randn(h, rows, 16, generator=generator).to(dtype) for h in (4, 2, 2)]
    upstream = torch.randn(rows, 4, 16, generator=generator).to(dtype)
    wanted, plain = (
        plainly([x.to(precision) for x in tensors], upstream.to(precision), softcap, window)
        for precision in (torch.float64, dtype)
    )
    given = [x.to(device).requires_grad_() for x in tensors]
    monkeypatch.setattr(attention, "kernel_of", lambda *_, **__: kernel)
    with flash.standing_in(kernel) if device == "cpu" else contextlib.nullcontext():
        got = attention.packed_attention(
            None,
            *(x[None] for x in given),
            None,
            documents=SHAPES.to(torch.device(device)),
            softcap=softcap,
            sliding_window=window,
        )[0][0]
        found = (got.detach(), *torch.autograd.grad(got, given, upstream.to(device)))
    for one, rounded, want in zip(found, plain, wanted, strict=True):
        allowed = (rounded.double() - want).norm() / want.norm() + torch.finfo(dtype).eps / 2
        assert (one.cpu().double() - want).norm() / want.norm() <= allowed
