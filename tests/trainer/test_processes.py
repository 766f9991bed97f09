"""A command in a process of its own: it gets the signals, and says why it failed."""

import signal
import subprocess
import sys
import textwrap

import pytest

from mpo.runtime.errors import UserError
from mpo.runtime.processes import run

CHILD = """
    import sys, time
    from mpo.runtime.interruption import interruptions
    with interruptions() as state, state.deferred("after this step"):
        print("ready", flush=True)
        while not state.requested:
            time.sleep(0.01)
        time.sleep(0.3)
    print("saved", file=sys.stderr)
    sys.exit(130)
"""
PARENT = """
    import sys
    from mpo.runtime.processes import run
    try:
        run([sys.executable, "-c", sys.argv[1]])
    except KeyboardInterrupt:
        print("stopped")
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_gets_every_signal_and_is_waited_for(number):
    """As if it were the terminal's: it stops when it is ready to, and says so once."""
    child, parent = map(textwrap.dedent, (CHILD, PARENT))
    process = subprocess.Popen(
        [sys.executable, "-c", parent, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "stopped\n"
    assert stderr.split("\n") == [
        "",
        "Stopping after this step. Ctrl-C again ends it at once.",
        "saved",
        "",
    ]


ENDS = [
    ("exit 0", 0, None),
    ("echo 'Error: the disk is full' >&2; echo 'Error: so it ends' >&2; exit 2", 2, "the disk"),
    ("echo 'Unexpected error (X: y). Report it.' >&2; exit 70", 70, "Unexpected error"),
    ("echo hello >&2; exit 5", 5, "exit status 5, without a word"),
    ("kill -9 $$", -9, "killed by signal 9"),
    # what it says is shown and no more, where it went well
    ("echo 'Error: passed over' >&2; exit 0", 0, None),
]


@pytest.mark.parametrize(("script", "status", "why"), ENDS)
def test_how_it_ended(capfd, script, status, why):
    ended = run(["sh", "-c", f"echo shown; {script}"])
    assert ended.status == status
    assert ended.failure is None if why is None else ended.failure.startswith(why)
    shown = capfd.readouterr()
    assert shown.out == "shown\n"
    assert shown.err.count("\n") == script.count(">&2")


def test_its_output_goes_aside_where_it_is_asked_to(capfd):
    run(["sh", "-c", "echo shown"], stdout=2)
    assert capfd.readouterr() == ("", "shown\n")


def test_a_program_that_is_not_there():
    with pytest.raises(UserError, match="no-such-program cannot be started"):
        run(["no-such-program"])
