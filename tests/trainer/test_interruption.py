"""Requests to stop, wherever they come: Ctrl-C, SIGTERM, a launcher that passes them on or is
killed itself."""

import os
import signal
import subprocess
import sys

import pytest
from test_train import project  # noqa: F401  (project is a fixture)

from mpo.runtime import interruption
from mpo.runtime.interruption import MOMENT, SENTENCE, SIGNALS, interruptions
from mpo.training.run_folder import read_metrics

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def clock(monkeypatch):
    """The time that handlers see: seconds in a list, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(interruption, "monotonic", lambda: now[0])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield now
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(INT, signal.default_int_handler)


# What comes, seconds after the first; and which of them ends a deferred block, if any.
REQUESTS = {
    "one": ([(INT, 0)], None),
    "as-a-launcher-passes-it-on": ([(INT, 0), (TERM, 0.1)], None),
    "as-torchrun-does": ([(INT, 0), (INT, 0.2), (INT, MOMENT - 0.1)], None),
    "as-a-batch-system-does": ([(TERM, 0), (TERM, 30), (TERM, 60)], None),
    "a-terminal-that-closes": ([(HUP, 0), (HUP, 5), (TERM, 9)], None),
    "a-person-who-is-in-a-hurry": ([(INT, 0), (INT, MOMENT + 0.1)], 1),
    "a-person-after-a-batch-system": ([(TERM, 0), (INT, 10)], 1),
    "after-the-launcher": ([(INT, 0), (TERM, 0.1), (INT, 0.2), (INT, 5)], 3),
}


@pytest.mark.parametrize(("signals", "ends"), REQUESTS.values(), ids=REQUESTS.keys())
def test_several_signals_are_one_request_until_a_person_asks_again(clock, capfd, signals, ends):
    ended = None
    with interruptions() as state, state.deferred("soon"):
        assert not state.requested
        for i, (number, after) in enumerate(signals):
            clock[0] = 100.0 + after
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                ended = i
                break
        assert state.requested
    assert ended == ends
    assert capfd.readouterr().err.count("Stopping soon. Ctrl-C again ends it at once.") == 1
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 3


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_deferred_block_it_ends_at_once_and_only_once(clock, number):
    with interruptions() as state:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert state.requested and interruption.requested()
        for again in SIGNALS:  # while what was open is being closed
            os.kill(os.getpid(), again)
        with pytest.raises(KeyboardInterrupt):
            state.heed()
    assert not interruption.requested()


def test_a_block_within_a_block_shares_it_and_what_is_ignored_stays_so(clock):
    signal.signal(HUP, signal.SIG_IGN)  # as under nohup
    with interruptions() as outer:
        with interruptions() as inner, inner.deferred("soon"):
            os.kill(os.getpid(), HUP)
            assert not inner.requested
            os.kill(os.getpid(), TERM)
        assert inner is outer and outer.requested
    assert signal.getsignal(HUP) == signal.SIG_IGN


def at(module: str, *numbers: signal.Signals) -> str:
    """A program that is the `mpo` command and gets the signals when it begins to import the
    module."""
    return f"""
import os, signal, sys
# a shell may have it ignored for what runs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(Finder)
            for number in {[int(n) for n in numbers]}:
                os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder)
from mpo.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "numbers"),
    [
        ("mpo.commands.app", (INT,)),
        ("typer", (TERM,)),
        ("omegaconf", (INT, TERM)),
        ("torch", (INT,)),
        ("transformers", (TERM, INT)),
        ("deepspeed", (HUP,)),
    ],
)
def test_a_signal_while_libraries_load_ends_in_one_sentence(project, module, numbers):  # noqa: F811
    command = [
        sys.executable,
        "-c",
        at(module, *numbers),
        "train",
        str(project / "run.yaml"),
        f"output_dir={project / 'unborn'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 130, result.stderr[-3000:]
    assert [line for line in result.stderr.splitlines() if "WARNING" not in line] == [SENTENCE]
    assert not (project / "unborn").exists()


AT_WEIGHTS_AND_EXIT = """
import atexit, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import mpo.training.run
def load_model(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
mpo.training.run.load_model = load_model
def stop_again():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
atexit.register(stop_again)
from mpo.__main__ import main
main()
"""


def test_signals_while_weights_load_and_while_the_process_ends_are_one_sentence(
    project,  # noqa: F811
):
    command = [
        sys.executable,
        "-c",
        AT_WEIGHTS_AND_EXIT,
        "train",
        str(project / "run.yaml"),
        f"output_dir={project / 'weightless'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 130 and result.stderr.count(SENTENCE) == 1, result.stderr[-3000:]
    assert (
        "Traceback" not in result.stderr and not (project / "weightless" / "checkpoints").exists()
    )


def test_a_rank_whose_launcher_was_killed_ends_with_a_checkpoint(project):  # noqa: F811
    out = project / "orphan"
    launcher = f"""
import os, subprocess, sys
place = {{
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}}
options = ["train", {str(project / "run.yaml")!r}, "output_dir={out}", "train.epochs=300"]
subprocess.run([sys.executable, "-u", "-m", "mpo", *options], env={{**os.environ, **place}})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", launcher],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    shown = []
    for line in process.stdout:  # to the end of the rank, which holds the pipe
        shown.append(line)
        if line.startswith("step 2/"):
            process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and "The same command goes on from" in shown[-1], (
        shown[-5:]
    )
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert (out / "checkpoints" / f"step-{steps[-1]:08d}").is_dir() and len(steps) < 800


def test_ctrl_c_under_the_launcher_of_deepspeed_leaves_a_checkpoint(project):  # noqa: F811
    """The terminal sends SIGINT to all of its processes; DeepSpeed's launcher gets it too, and
    sends its ranks SIGTERM."""
    out = project / "launched"
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from"
        " deepspeed.launcher.runner import main; main()"
    )
    run = [
        "--num_gpus",
        "2",
        "--module",
        "mpo",
        "train",
        str(project / "run.yaml"),
        f"output_dir={out}",
        "zero.stage=2",
        "train.epochs=300",
    ]
    command = [sys.executable, "-u", "-c", script, *run]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.startswith("step 2/"):
            os.killpg(process.pid, INT)
    process.wait()
    stopped = [line for line in shown if line.startswith("Stopped after step ")]
    assert len(stopped) == 1 and "The same command goes on from" in stopped[0], "".join(shown)[
        -3000:
    ]
    step = int(stopped[0].split()[3])
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not any("mpo/" in line for line in shown if line.strip().startswith("File ")), "".join(
        shown
    )[-3000:]
