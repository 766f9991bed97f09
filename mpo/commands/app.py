"""The command line: `mpo`, `python -m mpo`, and under a launcher `deepspeed --num_gpus N --module
mpo train CONFIG`. Which commands there are, and with which status one ends."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from mpo.commands import data, evaluation, reference, training
from mpo.commands.shared import is_main, note, print_to_stderr
from mpo.runtime.errors import Status, UserError, installed, mendable, unexpected
from mpo.runtime.interruption import SENTENCE, Interrupted, requested
from mpo.runtime.terminal import Streams

PANELS = {
    "Training": (
        training.train,
        training.compare,
        training.precompute,
        training.convert,
        training.export,
        training.plot,
    ),
    "Evaluation": (evaluation.gaps,),
    "Data": (data.validate,),
    "Reference": (reference.recipes, reference.fields, reference.env),
}
"""The commands as `mpo --help` groups them; the name of each is that of its function."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)

data_app = typer.Typer(no_args_is_help=True, help="Makes rows to train on.")
data_app.command()(data.build)
app.add_typer(data_app, name="data", rich_help_panel="Data")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"mpo-kernels {installed('mpo-kernels')}")
        raise typer.Exit


@app.callback()
def options(
    # The deepspeed launcher puts --local_rank=N before the command; the environment says the same.
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_say_version),
    ] = False,
) -> None:
    """Multilingual reward gap optimization: makes a language model as safe in its weaker languages
    as in its dominant one.

    Begin with: `mpo train demo`
    """
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


def execute() -> None:
    """The entry point: runs the process's command line and ends with the status of `status_of`."""
    streams = Streams()
    status = status_of()
    lost = streams.lost()
    if lost is not None:
        note(
            f"Error: standard output could not be written ({lost}): part of it is lost. Files that"
            " were named are whole."
        )
        status = status or Status.MENDABLE
    sys.exit(status)


def status_of(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns its exit status. Whatever
    goes wrong becomes a sentence."""
    try:
        app(arguments)
    except SystemExit as done:
        return _status_of_exit(done)
    except UserError as error:
        # once on each node: the others may have failed alike, or not
        if is_main() or os.environ.get("LOCAL_RANK", "0") == "0":
            print_to_stderr(f"Error: {error}")
        return _traced(Status.MENDABLE)
    except Interrupted as stop:  # on every rank
        _leave_the_group()
        return _interrupted(str(stop))
    except KeyboardInterrupt:
        return _interrupted(SENTENCE)
    except Exception as error:
        if requested():  # such as a connection to a rank that has ended already
            return _interrupted(SENTENCE)
        words = mendable(error)
        if words is None:
            return _unexpected(error)
        print_to_stderr(f"Error: {words}")  # on every rank: it may be the only one that knows
        return _traced(Status.MENDABLE)
    return Status.DONE


def _status_of_exit(done: SystemExit) -> int:
    """How typer, or a command, ended."""
    if not done.code:
        _leave_the_group()
        return Status.DONE
    if done.code == Status.INTERRUPTED:  # what becomes of a KeyboardInterrupt within a command
        return _interrupted(SENTENCE)
    return done.code if isinstance(done.code, int) else _unexpected(done)


def _leave_the_group() -> None:
    if group := sys.modules.get("mpo.runtime.ranks"):
        group.leave()


def _interrupted(sentence: str) -> int:
    note(sentence)
    return _traced(Status.INTERRUPTED)


def _unexpected(error: BaseException) -> int:
    print_to_stderr(unexpected(error))
    return _traced(Status.UNEXPECTED)


def _traced(status: Status) -> int:
    """The status, after the traceback for those who ask for it."""
    if os.environ.get("MPO_TRACEBACK"):
        traceback.print_exc()
    return status
