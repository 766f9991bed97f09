"""Whole runs on GPUs against the CPU's, and every attention kernel against float64: `python -m
pytest -m gpu`. What does for any device runs on the CPU too."""

import contextlib
import statistics

import flash
import pytest
import torch
import yaml
from devices import A_GPU, EVERYWHERE, needs
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


def run(project, name, device, *overrides, ranks=1):
    """The rows of metrics of a run in its own folder on a device."""
    chosen = {"DS_ACCELERATOR": device}
    if device == "cpu":
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    out = project / name
    result = mpo_command(
        "train",
        str(project / "run.yaml"),
        f"output_dir={out}",
        *overrides,
        ranks=ranks,
        timeout=600,
        **chosen,
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
    """float32 to rounding; bfloat16 as far as it rounds."""
    more = (f"model.dtype={dtype}", f"zero.stage={stage}", f"model.attention={how}")
    found = run(project, f"{dtype}-{stage}-{how}-{ranks}", "cuda", *more, ranks=ranks)
    assert apart(found, on_the_cpu) < (1e-3 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_deterministic_runs_are_the_same_bit_for_bit(project, device):
    more = ("train.deterministic=true", "model.dtype=bfloat16", "zero.stage=1", "train.max_steps=2")
    one, two = (run(project, f"same-{device}-{i}", device, *more) for i in range(2))
    names = ("loss", "l1", "l2", "grad_norm")
    assert [[a[n] for n in names] for a in one] == [[b[n] for n in names] for b in two]


def slowest(seconds):
    """The longest step from the fourth on, in multiples of the median."""
    return max(seconds[3:]) / statistics.median(seconds[3:])


def test_what_slowest_sees():
    """Steps that build plans for new shapes take ten times as long."""
    assert slowest([9.0, 1.0, 0.1, 0.1, 0.12, 0.11, 0.1]) < 2
    assert slowest([9.0, 1.0, 0.1, 0.1, 0.12, 1.1, 0.1]) > 9


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=A_GPU) for d in ("float32", "bfloat16")])
def test_steps_take_as_long_as_each_other(project, dtype):
    """No kernel is compiled, and no plan built, for each new shape. The one test that looks at a
    clock: nothing else shows it."""
    more = ("train.pairs_per_step=1", "train.epochs=8", "zero.stage=1", f"model.dtype={dtype}")
    rows = run(project, f"flat-{dtype}", "cuda", *more)
    assert slowest([row["seconds"] for row in rows]) < 10


SHAPES = Documents.of([(3, 2, 4), (20, 130, 7), (1, 1), (64, 64, 65)])
FLASHES = ((flash.PYTORCHS, None), (flash.FLASH_ATTN, None), (flash.FLASH_ATTN, 1.5))
CASES = [("SDPA, span by span", None), ("SDPA, span by span", 1.5), *FLASHES]


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("kernel", "softcap"), CASES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_equals_float64(device, kernel, softcap, window, dtype, monkeypatch):
    """On a CPU the kernels' definitions stand in for them."""
    if device == "cuda" and kernel == flash.FLASH_ATTN and attention.flash_attn() is None:
        pytest.skip("flash-attn is not installed")
    generator, rows = torch.Generator().manual_seed(0), sum(map(sum, SHAPES.lengths))
    tensors = [torch.randn(h, rows, 16, generator=generator).to(dtype) for h in (4, 2, 2)]
    upstream = torch.randn(rows, 4, 16, generator=generator).to(dtype)
    exact = [x.double().requires_grad_() for x in tensors]
    out = plain_attention(*exact, SHAPES, softcap, window)
    wanted = (out.detach(), *torch.autograd.grad(out, exact, upstream.double()))
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
    for one, want in zip(found, wanted, strict=True):
        assert float((one.cpu().double() - want).norm() / want.norm()) < 2e-2
