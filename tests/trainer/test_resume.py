"""Runs that die at any moment and go on: killed, out of disk, half-written checkpoints, a rank that
dies."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import (
    SAME,
    interrupt,
    losses,
    project,  # noqa: F401  (a fixture)
    run,
    untrained,
    weights,
)
from tiny import apart, mpo_command, mpo_process

from mpo.training import checkpoint_folder
from mpo.training.run_folder import read_metrics

OPTIONS = ["zero.stage=2", "train.epochs=16", "checkpoint.every=2", "checkpoint.keep=2"]


ZERO3 = [
    "zero.stage=3",
    "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    *OPTIONS[1:],
]


@pytest.fixture(scope="module")
def whole(project):  # noqa: F811
    """The run that nothing interrupts."""
    return run(project, "uninterrupted", *OPTIONS)[0]


def begin(project, out, options, ranks):  # noqa: F811
    """One process per rank, without a launcher that would end the others. What they print goes to
    files beside the run's folder."""
    command = ["train", str(project / "run.yaml"), f"output_dir={out}", *options]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        with open(out.with_name(f"{out.name}-rank{rank}.log"), "w") as log:
            processes.append(
                mpo_process(*command, environment=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def killed_again_and_again(project, name, times, seed, options=OPTIONS, ranks=1, early=True):  # noqa: F811
    """Starts a run, kills it after a random time, starts it again...; at last lets it end. Returns
    its folder and the number of kills.

    Of several ranks one dies up to a third of a second before the next.
    """
    rng = random.Random(seed)
    out = project / name
    kills = 0
    while kills < times and not (out / "result.json").exists():
        processes = begin(project, out, options, ranks)
        # Some die while libraries load or the reference is built, most a few steps further in
        # training.
        target, began = _last_step(out) + rng.randint(1, 8), time.monotonic()
        patience = rng.choice([rng.uniform(0, 5), None, None]) if early else None
        while all(process.poll() is None for process in processes):
            if patience is not None and time.monotonic() - began > patience:
                break
            if patience is None and _last_step(out) >= target:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.002)
        if any(process.poll() is not None for process in processes):
            assert [process.wait(60) for process in processes] == [0] * ranks, out.with_name(
                f"{name}-rank0.log"
            ).read_text()[-3000:]
            break
        for process in rng.sample(processes, ranks):
            process.send_signal(signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.3) if ranks > 1 else 0)
        for process in processes:
            process.wait()
        kills += 1
    if not (out / "result.json").exists():
        run(project, name, *options, ranks=ranks)
    return out, kills


def _last_step(out):
    metrics = out / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    return rows[-1]["step"] if rows else 0


def same(out, whole):
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [
        row["step"] for row in read_metrics(whole / "metrics.jsonl")
    ]
    assert torch.equal(losses(out), losses(whole))
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((out / "result.json").read_text()) == json.loads(
        (whole / "result.json").read_text()
    )
    assert json.loads((out / "config.json").read_text())["threads"] == 1


def test_killed_at_random_moments_the_run_ends_bit_equal(project, whole):  # noqa: F811
    out, kills = killed_again_and_again(project, "killed-3", 3, seed=1, early=False)
    assert kills == 3
    same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments_the_run_ends_bit_equal(project, whole, seed):  # noqa: F811
    """Seven points for each of four seeds."""
    out, kills = killed_again_and_again(project, f"killed-many-{seed}", 7, seed=100 + seed)
    assert kills >= 5
    same(out, whole)


@pytest.mark.slow
def test_two_ranks_under_zero3_killed_at_many_random_moments_end_bit_equal(project):  # noqa: F811
    """Weights, gradients and optimizer are spread over the two, so a checkpoint is whole only with
    the files of both."""
    out, kills = killed_again_and_again(project, "killed-zero3", 7, seed=7, options=ZERO3, ranks=2)
    assert kills >= 6
    same(out, run(project, "uninterrupted-zero3", *ZERO3, ranks=2)[0])


STOPS = [  # where, what is met there, what ends the run, and the step of the newest checkpoint then
    *(
        ("rows", "SIGINT", "KeyboardInterrupt", None),
        ("weights", "SIGTERM", "KeyboardInterrupt", None),
    ),
    *(
        ("engine", "SIGINT", "KeyboardInterrupt", None),
        ("reference", "SIGTERM", "KeyboardInterrupt", None),
    ),
    *(
        ("gaps before", "SIGINT", "KeyboardInterrupt", None),
        ("self-check", "SIGTERM", "KeyboardInterrupt", None),
    ),
    ("first step", "SIGINT", "Interrupted: Stopped after step 1 of 4. The same command goes on", 1),
    ("second step", "FULL", "UserError: The checkpoint after step 2 could not be written", 1),
    ("last step", "SIGTERM", "Interrupted: Stopped after step 4 of 4. The same command goes on", 4),
    *(
        ("gaps after", "SIGINT", "KeyboardInterrupt", 4),
        ("gaps after", "SIGTERM", "KeyboardInterrupt", 4),
    ),
    *(
        ("export", "SIGTERM", "KeyboardInterrupt", 4),
        ("export", "ENOSPC", "OSError", 4),
        ("summary", "SIGINT", "KeyboardInterrupt", 4),
    ),
    *(("picture", "SIGTERM", "KeyboardInterrupt", 4), ("picture", "ENOSPC", "OSError", 4)),
    *(("result", "SIGINT", "KeyboardInterrupt", 4), ("result", "ENOSPC", "OSError", 4)),
]


def test_stopped_at_every_place_in_turn_the_run_ends_bit_equal(project):  # noqa: F811
    """By a signal, or by a disk that is full there. What was done is not done again, least of all
    the training."""
    options = ["zero.stage=2", "train.max_steps=4"]
    whole, out = run(project, "not-stopped", *options)[0], project / "stopped-everywhere"
    (project / "stops.json").write_text(json.dumps([stop[:2] for stop in STOPS]))
    worker = [
        sys.executable,
        str(Path(__file__).with_name("stopped_worker.py")),
        str(project / "run.yaml"),
        str(project / "stops.json"),
    ]
    result = subprocess.run(
        [*worker, f"output_dir={out}", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    seen = [
        json.loads(line.removeprefix("STOPPED "))
        for line in result.stdout.splitlines()
        if line.startswith("STOPPED ")
    ]
    for (place, how, raised, step), found in zip(STOPS, seen[:-1], strict=True):
        assert found["raised"] is not None and found["raised"].startswith(raised), (
            place,
            how,
            found,
        )
        assert (found["step"], found["result"]) == (step, False), (place, how, found)
    assert seen[-1]["raised"] is None and seen[-1]["result"]
    assert seen[-1]["step"] is None  # no checkpoints were asked for, and the model is exported
    assert result.stdout.count("4 of 4 steps done") == 1 + sum(step == 4 for *_, step in STOPS[:-1])
    same(out, whole)


def test_half_written_checkpoints_are_passed_over(project, whole):  # noqa: F811
    """A folder that a crash left before its rename, and one that lost its state file."""
    out = project / "half"
    code, _ = interrupt(project, out, 9, signal.SIGKILL, *OPTIONS)
    assert code == -signal.SIGKILL
    newest = checkpoint_folder.newest(out / "checkpoints")
    shutil.copytree(newest.folder, out / "checkpoints" / "step-00000099.incomplete")
    shutil.copytree(newest.folder, out / "checkpoints" / "step-00000098")
    (out / "checkpoints" / "step-00000098" / "state.json").unlink()
    assert checkpoint_folder.newest(out / "checkpoints") == newest
    shutil.rmtree(out / "checkpoints" / "step-00000098")
    run(project, "half", *OPTIONS)
    same(out, whole)
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == [
        "step-00000042",
        "step-00000043",
    ]


FULL_WHEN_TRAINING_BEGINS = """
import resource, mpo.training.train
before_training = mpo.training.train.self_check
def then_full(*arguments):
    before_training(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
mpo.training.train.self_check = then_full
from mpo.__main__ import main
main()
"""


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(project):  # noqa: F811
    """No file may grow beyond 20 kB, as on a full disk; the model's own file, which is larger, is
    left out."""
    out = project / "full"
    options = ["zero.stage=2", "checkpoint.every=2", "checkpoint.export=false", f"output_dir={out}"]
    command = [
        sys.executable,
        "-c",
        FULL_WHEN_TRAINING_BEGINS,
        "train",
        str(project / "run.yaml"),
        *options,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    text = result.stdout + result.stderr
    assert (
        "The checkpoint after step 2 could not be written" in text
        and "There is no older one. The run goes on." in text
    )
    assert len(read_metrics(out / "metrics.jsonl")) == 6
    assert not list((out / "checkpoints").glob("step-*"))


def test_a_rank_that_dies_ends_the_others(project):  # noqa: F811
    """Under torch's launcher the other rank is ended instead of waiting for ever."""
    out = project / "dies"
    options = [f"output_dir={out}", "zero.stage=3", "train.epochs=400"]
    process = mpo_process(
        "train", str(project / "run.yaml"), *options, ranks=2, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 90
    while _last_step(out) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 2
    subprocess.run(["kill", "-9", children[1]], check=True)
    output, _ = process.communicate(timeout=90)
    assert (process.returncode != 0 and "SIGKILL" in output) or "exitcode  : -9" in output
    assert not (out / "result.json").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (3, 2)),
        *(
            pytest.param(*places, marks=pytest.mark.slow)
            for places in (((3, 2), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (2, 1)))
        ),
    ],
    ids=lambda place: f"zero{place[0]}x{place[1]}",
)
def test_another_stage_and_world_size_go_on_from_a_converted_checkpoint(project, before, after):  # noqa: F811
    """A run of 12 steps stops after 4; converted, the other 8 are the same as without the stop, to
    rounding.

    They also have another number of threads, which is said: with these a run on a CPU is the same
    to rounding, too.
    """
    name = "from-{}x{}".format(*before)
    options = ["train.epochs=4", "train.max_steps=12", "checkpoint.keep=9"]
    plain, _ = run(project, f"{name}-whole", *options, f"zero.stage={after[0]}", ranks=after[1])
    out, _ = run(
        project, name, *options, f"zero.stage={before[0]}", "checkpoint.every=4", ranks=before[1]
    )
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    for finished in ("result.json", "result.png"):
        (out / finished).unlink()
    other = [*options, f"zero.stage={after[0]}"]
    _, refused = run(project, name, *other, ranks=after[1], expect=1 if after[1] > 1 else 2)
    assert f"mpo convert {out}" in refused.stderr
    converted = mpo_command("convert", str(out))
    assert converted.returncode == 0 and "step-00000004.portable" in converted.stdout
    _, process = run(project, name, *other, ranks=after[1], OMP_NUM_THREADS="2")
    assert "4 of 12 steps done" in process.stdout
    assert (
        "This run began with 1 CPU thread(s) a rank and goes on with 2" in process.stdout
        and "OMP_NUM_THREADS=1" in process.stdout
    )
    torch.testing.assert_close(losses(out), losses(plain), rtol=5e-3, atol=5e-5)
    assert apart(weights(out), weights(plain), untrained(project)) < SAME
