"""KTO as `mpo train` does it, beside plain training: its KL is of the whole step, whatever
micro-batches and ranks the step is cut into. With both pairs and L2 it is in test_exactness.py too.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from plain_training import train_plainly
from safetensors.torch import load_file, save_file
from test_exactness import RECOMPUTE, compute, outcome, stage
from tiny import apart, commands, native_rows, save_model, write_rows

from mpo.config import load_config

ADAPTERS = ["model.lora.rank=2", "train.learning_rate=3e-3"]
RUNS = {  # by the number of ranks
    1: {
        "plain": stage(0),
        "zero2-alone": stage(2),
        "zero3-tokens": [*stage(3), "train.tokens_per_micro_batch=500", *RECOMPUTE["recomputed"]],
        "logits": [*stage(1), "loss.head=logits", "train.pairs_per_micro_batch=3"],
        "adapters": [*ADAPTERS, *stage(0)],
        "row-by-row": [*stage(2), "train.pairs_per_step=1"],
    },
    2: {
        "zero2": [*stage(2), *RECOMPUTE["selective"]],
        "zero3": [*stage(3), "train.pairs_per_micro_batch=2"],
        "adapters-live": [*ADAPTERS, *stage(3), "reference.mode=live"],
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("kto")
    save_model(root / "llama", tokenizer)
    write_rows(root / "train.jsonl", native_rows(dominants=4))
    configuration = {
        "output_dir": str(root / "run"),
        "model": {"path": "llama", "dtype": "float32"},
        # some answers are cut, and more of those to other prompts
        "data": {"train": ["train.jsonl"], "eval_rows_per_language": 1, "max_length": 90},
        "loss": {
            **{"name": "kto", "beta": 0.3},
            **{"desirable_weight": 1.5, "undesirable_weight": 0.7},
        },
        # 10 pairs of 8 rows in steps of 3, 3, 3 and 1: on two ranks one of them gets a filler
        "train": {
            **{"epochs": 1.25, "pairs_per_step": 3, "seed": 5, "max_grad_norm": 0.9},
            **{"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
            **{"weight_decay": 1.0, "adam_betas": [0.8, 0.95]},
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(configuration))
    return root


@pytest.fixture(scope="module")
def computed(project):
    for ranks, runs in RUNS.items():
        compute(project, ranks, [{"name": n, "overrides": of} for n, of in runs.items()])
    return project


def check_close(ours, steps, moments, weights, pairs=(3, 3, 3, 1)):
    """Loss and KL of every step, first moments in the norm of each parameter, and what training
    added to the weights."""
    assert [row["pairs"] for row in ours.steps] == [*pairs]
    for one, two in zip(ours.steps, steps, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4), one["step"]
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-3, abs=1e-4), one["step"]
    for name in ours.moments:
        assert (ours.moments[name] - moments[name]).norm() <= 1e-3 * moments[name].norm(), name
    assert apart(ours.weights, weights, ours.start) <= 1e-3


def test_the_plainest_run_is_plain_training(computed):
    config = load_config(computed / "run.yaml", RUNS[1]["plain"])
    steps, moments, weights = train_plainly(config)
    plain = outcome(computed / "plain")
    check_close(plain, steps, moments, {name: weights[name] for name in plain.weights})
    # known before training; and the KL of later steps is none that could as well be left out
    assert plain.steps[0]["loss"] == pytest.approx((1.5 + 0.7) / 4, rel=1e-5)
    assert max(row["kl"] for row in plain.steps) > 0.5


def test_a_step_of_one_row_is_plain_training(computed):
    """Its KL is of that row's two answers to other prompts."""
    steps, moments, weights = train_plainly(
        load_config(computed / "run.yaml", RUNS[1]["row-by-row"])
    )
    ours = outcome(computed / "row-by-row")
    check_close(ours, steps, moments, {name: weights[name] for name in ours.weights}, [1] * 10)
    assert len({round(row["kl"], 4) for row in ours.steps}) > 3


@pytest.mark.parametrize(
    ("run", "other"),
    [
        *((name, "plain") for name in ("zero3-tokens", "logits", "zero2", "zero3")),
        ("adapters-live", "adapters"),
    ],
)
def test_no_split_changes_the_result(computed, run, other):
    plain, ours = outcome(computed / other), outcome(computed / run)
    check_close(ours, plain.steps, plain.moments, plain.weights)
    assert any(row["kl"] > 0 for row in plain.steps)
    for one, two in zip(ours.steps, plain.steps, strict=True):
        assert one["gap"] == pytest.approx(two["gap"], abs=1e-5) and one["gap"]


def test_an_interrupted_run_ends_bit_equal(computed):
    stops, out = computed / "stops.json", computed / "interrupted"
    stops.write_text(json.dumps([["first step", "SIGTERM"]]))
    worker = [sys.executable, str(Path(__file__).with_name("stopped_worker.py"))]
    options = [*RUNS[1]["zero2-alone"], f"output_dir={out}"]
    result = subprocess.run(
        [*worker, str(computed / "run.yaml"), str(stops), *options],
        **{"capture_output": True, "text": True, "check": False, "timeout": 300},
    )
    assert "Stopped after step 1 of 4" in result.stdout, result.stdout[-3000:] + result.stderr
    whole = computed / "zero2-alone"
    for key in ("loss", "kl", "gap"):
        ours, theirs = (
            [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (out, whole)
        )
        assert ours == theirs
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stores_and_refusals(project):
    """Runs of other losses share what is theirs, runs of another seed have other answers; a store
    of another model is found before the first step, rows that cannot be dealt before anything."""
    run, store = str(project / "run.yaml"), project / "stores" / "shared"
    shared = ["train.max_steps=1", "checkpoint.export=false", f"reference.store={store}"]

    def train(name, *more):
        return ["mpo", "train", run, f"output_dir={project / name}", *shared, *more]

    rows = native_rows(dominants=4)
    for row in rows[1:6]:
        row["target"]["prompt"] = rows[0]["target"]["prompt"]
    write_rows(project / "alike.jsonl", rows)
    both = ["train.seed=5", "loss.pairs=both"]
    steps = [
        ["mpo", "precompute", run, *shared[2:]],
        train("first"),
        train("seed", "train.seed=6"),
        train("both", *both),
        train("dpo", "loss.name=dpo"),
        ["mpo", "train", run, "--dry-run", "--json"],
        train("alike", "data.train=[alike.jsonl]"),
        ["mpo", "train", run, "data.train=[alike.jsonl]", "--dry-run"],
    ]
    precomputed, first, seed, both, dpo, dry, *alike = commands(steps, project)
    for done in (precomputed, first, seed, both, dpo):
        assert done["status"] == 0, done["text"]
    places = sorted(path.name for path in store.parent.glob("shared*") if "gaps" not in path.name)
    mismatched = [f"mismatched-{of}" for of in ("dominant-5", "target-5", "target-6")]
    assert places == ["shared", *(f"shared-{name}" for name in (*mismatched, "target"))]
    assert "Reference store of answers to other target prompts" in precomputed["text"]
    assert "Reference store" not in first["text"] + dpo["text"]
    assert "answers to other target prompts" in seed["text"]
    assert "store of target pairs" not in seed["text"] and "loss 0.5500" in both["text"]
    assert "Reference store:" in both["text"] and "other dominant prompts" in both["text"]
    assert "target p" not in both["text"].split("Reference store", 1)[1].split("step 1")[0]
    assert "loss 0.5500" in first["text"] and "KL 0.000" in first["text"]
    assert "trains on chosen and rejected target answers" in first["text"]
    assert json.loads(dry["text"].strip().splitlines()[-1])["reference_sequences"] == 32
    for refused in alike:
        assert refused["status"] == 2
        assert "6 of 8 training rows have the same target prompt, e.g. alike.jsonl" in (
            refused["text"].replace(f"{project}/", "")
        )
    assert not (project / "alike").exists()
    values = store.with_name("shared-mismatched-target-5") / "values.safetensors"
    kept = load_file(values)
    save_file({**kept, "mean_logp": kept["mean_logp"] - 0.5}, values, metadata={"store": ""})
    (planted,) = commands([train("planted")], project)
    assert planted["status"] == 2
    assert "answers to other prompts are up to 0.5000 nats per token away" in planted["text"]
