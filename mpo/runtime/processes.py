"""A command as a process of its own, that ends as if it were this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mpo.runtime.errors import Status, UserError
from mpo.runtime.interruption import interruptions

SAID = ("Error: ", "Unexpected error")
"""How the lines begin in which a command says what went wrong."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Its exit status; below 0 the signal that killed it."""
    said: str | None
    """The first line that said what went wrong, without the word Error."""

    @property
    def failure(self) -> str | None:
        """Why it failed, or None if it did not."""
        if self.status == Status.DONE:
            return None
        if self.said is not None:
            return self.said
        if self.status < 0:
            return f"killed by signal {-self.status} (9 is often a machine without memory left)"
        return f"exit status {self.status}, without a word why"


def run(command: Sequence[str], stdout: int | None = None) -> Ended:
    """Runs a command to its end. What it prints goes where this process prints, and every signal
    that comes goes on to it.

    run([sys.executable, "-m", "mpo", "train", "demo"]).status

    The command has a session of its own, so that a Ctrl-C comes to it once, through here.

    Args:
        stdout: file descriptor that its standard output goes to; None: that of this process.
    Raises:
        UserError: there is no such program.
        KeyboardInterrupt: this process was asked to stop, and the command has ended.
    """
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int) -> None:
        if process is not None:
            process.send_signal(number)

    with interruptions() as interruption:
        with interruption.passed_on(pass_on):
            process = _start(command, stdout)
            if interruption.requested:  # before there was anything to pass it on to
                process.terminate()
            said = _read(process)
            status = process.wait()
        interruption.heed()
    return Ended(status, said)


def _start(command: Sequence[str], stdout: int | None) -> subprocess.Popen[str]:
    sys.stdout.flush()  # what is said here comes before what is said there
    try:
        return subprocess.Popen(
            command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(
            f"{command[0]} cannot be started: {error}. Name a program that is on the PATH."
        ) from error


def _read(process: subprocess.Popen[str]) -> str | None:
    """Shows what a command says on standard error. Returns the line that said what went wrong."""
    said = None
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        if said is None and line.startswith(SAID):
            said = line.strip().removeprefix(SAID[0])
    return said
