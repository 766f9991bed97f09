"""Whole runs in real processes: `python -m mpo train`, one rank and two, every ZeRO stage,
interruption, resume, refusals."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny import apart, mpo_command, mpo_process, native_rows, save_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo.training.run_folder import read_metrics


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    """A folder with a tiny model, rows and a configuration."""
    root = tmp_path_factory.mktemp("project")
    save_model(root / "model", tokenizer)
    write_rows(root / "train.jsonl", native_rows(dominants=4))
    write_rows(root / "eval.jsonl", native_rows(dominants=2))
    configuration = {
        "output_dir": str(root / "run"),
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"], "eval": ["eval.jsonl"], "max_length": 256},
        "train": {
            "epochs": 2,
            "pairs_per_step": 3,
            "pairs_per_micro_batch": 2,
            "learning_rate": 3e-4,
            "seed": 5,
        },
        "zero": {"stage": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(configuration))
    return root


def run(project, name, *overrides, ranks=1, expect=0, **environment):
    """One run into its own folder. Returns (output folder, process)."""
    out = project / name
    result = mpo_command(
        "train",
        str(project / "run.yaml"),
        f"output_dir={out}",
        *overrides,
        ranks=ranks,
        **environment,
    )
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result


def losses(out):
    rows = read_metrics(out / "metrics.jsonl")
    return torch.tensor(
        [
            [row["loss"], row["l1"], row["l2"], row["gap"].get("sw", 0), row["gap"].get("zh", 0)]
            for row in rows
        ]
    )


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


def untrained(project, model="model"):
    return AutoModelForCausalLM.from_pretrained(project / model).state_dict()


SAME = 5e-3
"""How far runs may be apart that differ in how the work is split, as a share of what training did.
The learning rate off by 1 % is 1e-2."""


@pytest.fixture(scope="module")
def baseline(project):
    """One process, no ZeRO, one pair per micro-batch: the plainest run."""
    return run(project, "baseline", "train.pairs_per_micro_batch=1")


def test_a_run_leaves_everything_it_promises(baseline, project):
    out, process = baseline
    rows = read_metrics(out / "metrics.jsonl")
    # 8 rows x 2 epochs in steps of 3: the last has one pair
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["pairs"] for row in rows] == [3, 3, 3, 3, 3, 1]
    assert rows[-1]["epoch"] == 2
    assert all(set(row["gap"]) <= {"sw", "zh"} for row in rows) and set(rows[0]["gap"])
    assert rows[0]["l2"] == pytest.approx(0, abs=1e-9) and rows[-1]["l2"] > 0
    # a rate is a quotient of two numbers of its line; a tiny model takes the memory of its
    # libraries
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.01)
        assert 0.05 < row["peak_memory_gib"] < 64

    result = json.loads((out / "result.json").read_text())
    assert set(result["languages"]) == {"sw", "zh"} and result["all"]["n"] == 4
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "Reward gaps on the measured rows" in process.stdout and "step 6/6" in process.stdout

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    original = untrained(project)
    trained = weights(out)
    assert trained.keys() == original.keys() and tokenizer.chat_template
    assert any(not torch.equal(trained[k], original[k]) for k in trained)


def test_result_is_what_the_exported_model_does(baseline, project):
    """The `after` numbers come from the trained weights: measured again from the exported folder
    they are the same."""
    out, _ = baseline
    again, _ = run(
        project,
        "again",
        f"model.path={out / 'model'}",
        "train.max_steps=1",
        "train.learning_rate=1e-12",
        "checkpoint.export=false",
    )
    first, second = (json.loads((o / "result.json").read_text()) for o in (out, again))
    for language in ("sw", "zh"):
        after = first["languages"][language]["target_gap"]["after"]
        before = second["languages"][language]["target_gap"]["before"]
        assert after == pytest.approx(before, abs=1e-5)
    # Checkpoints that nobody asked for serve to go on; they stay where the trained weights are
    # nowhere else.
    assert not (out / "checkpoints").exists() and (again / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        ("micro", 1, ["train.pairs_per_micro_batch=3"]),
        ("logits", 1, ["loss.head=logits"]),
        ("z1", 1, ["zero.stage=1"]),
        ("z2", 1, ["zero.stage=2"]),
        (
            "z3",
            1,
            [
                "zero.stage=3",
                "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
            ],
        ),
        ("z0x2", 2, ["zero.stage=0"]),
        ("z2x2", 2, ["zero.stage=2"]),
        (
            "z3x2",
            2,
            [
                "zero.stage=3",
                "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
            ],
        ),
    ],
)
def test_same_losses_and_weights_however_the_work_is_split(
    baseline, project, name, ranks, overrides
):
    out, _ = run(project, name, *overrides, ranks=ranks)
    torch.testing.assert_close(losses(out), losses(baseline[0]), rtol=2e-3, atol=2e-5)
    ours, theirs = weights(out), weights(baseline[0])
    assert ours.keys() == theirs.keys()
    assert apart(ours, theirs, untrained(project)) < SAME


def test_tied_embeddings_and_soft_caps_under_every_stage(project, tokenizer):
    """Gemma-2: the head is the embedding, logits and attention are soft-capped, and ZeRO-3
    partitions all of it."""
    folder = save_model(project / "gemma2", tokenizer, "gemma2")
    plain, _ = run(project, "gemma-z0", f"model.path={folder}")
    for stage, ranks in ((2, 2), (3, 2)):
        settings = (
            "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
            if stage == 3
            else "loss.beta=1.0"
        )
        out, _ = run(
            project,
            f"gemma-z{stage}",
            f"model.path={folder}",
            f"zero.stage={stage}",
            settings,
            ranks=ranks,
        )
        torch.testing.assert_close(losses(out), losses(plain), rtol=2e-3, atol=2e-5)
        ours, theirs = weights(out), weights(plain)
        assert ours.keys() == theirs.keys() and ours["lm_head.weight"] is not None
        assert apart(ours, theirs, untrained(project, "gemma2")) < SAME
        assert json.loads((out / "model" / "config.json").read_text()).get("use_cache", True)


def test_bfloat16_runs_and_moves_fp32_masters(project):
    """At this learning rate a bf16 weight would not move at all in one step; the fp32 master adds
    the steps up."""
    out, process = run(
        project, "bf16", "model.dtype=bfloat16", "zero.stage=2", "train.epochs=4", "log_every=4"
    )
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [4, 8, 11]
    assert re.findall(r"^step (\d+)/11", process.stdout, flags=re.MULTILINE) == ["4", "8", "11"]
    result = json.loads((out / "result.json").read_text())
    assert result["all"]["distance"]["after"] < result["all"]["distance"]["before"]
    assert all(value.dtype == torch.bfloat16 for value in weights(out).values())


def interrupt(project, out, after_step, number, *overrides):
    """Starts a run and sends it a signal as soon as `after_step` is logged."""
    process = mpo_process("train", str(project / "run.yaml"), f"output_dir={out}", *overrides)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(read_metrics(metrics)) >= after_step:
            process.send_signal(number)
            break
        time.sleep(0.002)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout + stderr


LONG = ["zero.stage=2", "train.epochs=20"]


@pytest.fixture(scope="module")
def whole(project):
    """A longer run that nothing interrupts."""
    return run(project, "whole", *LONG)[0]


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(project, whole):
    distance = json.loads((whole / "result.json").read_text())["all"]["distance"]
    assert distance["after"] < 0.5 * distance["before"]  # it learns
    out = project / "stopped"
    code, text = interrupt(project, out, 5, signal.SIGTERM, *LONG)
    assert code == 130 and "The same command goes on" in text, text
    assert not (out / "result.json").exists()
    _, process = run(project, "stopped", *LONG)
    assert "Going on from" in process.stdout
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 55))
    assert torch.equal(losses(out), losses(whole))
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_sigkill_leaves_the_previous_checkpoint(project, whole):
    options = [*LONG, "checkpoint.every=2", "checkpoint.keep=1"]
    out = project / "killed"
    code, _ = interrupt(project, out, 9, signal.SIGKILL, *options)
    assert code == -signal.SIGKILL
    run(project, "killed", *options)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 55))
    assert len(list((out / "checkpoints").glob("step-????????"))) == 1
    assert torch.equal(losses(out), losses(whole))


def test_a_finished_and_another_run_are_refused(baseline, project):
    _, process = run(project, "baseline", "train.pairs_per_micro_batch=1", expect=2)
    assert "holds the finished run of this configuration" in process.stderr
    _, process = run(
        project, "baseline", "train.pairs_per_micro_batch=1", "loss.beta=1.5", expect=2
    )
    assert "holds another run: loss.beta is 1.0 there and 1.5 here" in process.stderr.replace(
        "config.", ""
    )
    (project / "holiday").mkdir()
    (project / "holiday" / "photo.jpg").touch()
    _, process = run(project, "holiday", expect=2)
    assert "is not empty and holds no MPO run" in process.stderr


def test_non_finite_gradients_skip_and_then_stop(project):
    broken = AutoModelForCausalLM.from_pretrained(project / "model")
    with torch.no_grad():
        # a token that no row has: the log-probs of every row become NaN
        broken.lm_head.weight[7, 3] = float("inf")
    broken.save_pretrained(project / "broken")
    AutoTokenizer.from_pretrained(project / "model").save_pretrained(project / "broken")
    _, process = run(project, "nan", f"model.path={project / 'broken'}", expect=2)
    assert "non-finite log-probabilities" in process.stderr


REFERENCE_OFF = """
import mpo.training.reference
gap = mpo.training.reference.ReferenceStore.gap
mpo.training.reference.ReferenceStore.gap = lambda *arguments: gap(*arguments) + 0.01
from mpo.__main__ import main
main()
"""


def test_a_reference_whose_gap_the_model_does_not_have_is_refused(project):
    """Its pooled states are those of the model, so only the other half of the check before the
    first step can tell."""
    out = project / "other-gap"
    command = [
        sys.executable,
        "-c",
        REFERENCE_OFF,
        "train",
        str(project / "run.yaml"),
        f"output_dir={out}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2 and "Step-0 self-check failed" in result.stderr, result.stderr[
        -3000:
    ]
    assert "relative L2 is 0.00e+00" in result.stderr and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_an_exploding_run_stops_with_finite_weights(project, stage):
    out, process = run(
        project,
        f"explode{stage}",
        f"zero.stage={stage}",
        "train.learning_rate=10",
        "train.weight_decay=100",  # which multiplies the weights by -999 at each step
        "train.epochs=20",
        "train.schedule=constant",
        expect=2,
    )
    assert "3 steps in a row had non-finite gradients" in process.stderr
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows[-3:]] == [True] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.deepspeed={gradient_clipping: 5}"], "contradicts 1.0"),
        (["data.train=[nowhere.jsonl]"], "nowhere.jsonl"),
        (["model.path=nowhere"], "neither a model folder nor a hub id"),
        (["model.path=pypi:unknown"], "pypi:SmolLM2-135M-Instruct"),
        (["loss.betta=1"], "did you mean 'beta'?"),
        (["data.max_length=12"], "response_truncated_away"),
        (
            ["model.attention=flex_attention"],
            "flex_attention has no backward pass on a CPU. Set model.attention=packed",
        ),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(project, overrides, message):
    out, process = run(project, "refused", *overrides, expect=2)
    assert message in process.stderr and "Traceback" not in process.stderr
    assert not out.exists()


def test_launcher_of_deepspeed_is_understood(project):
    """The launcher puts --local_rank before the command."""
    result = mpo_command("--local_rank=0", "train", str(project / "nowhere.yaml"))
    assert result.returncode == 2 and "No configuration file" in result.stderr
