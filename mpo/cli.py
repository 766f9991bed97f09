"""The command line: `mpo`, `python -m mpo`, and under a launcher `deepspeed --num_gpus N --module mpo train CONFIG`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpo.config import load_config
from mpo.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback()
def main(
    # The deepspeed launcher puts --local_rank=N before the command; the environment says the same.
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Multilingual reward gap optimization: makes a language model as safe in its weaker languages as in its dominant one."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to set, e.g. loss.beta=1.5 train.max_steps=20.", show_default=False)
    ] = None,
) -> None:
    """Trains a model and shows its reward gaps before and after.

    One process: `mpo train mpo/recipes/demo.yaml`

    With changes: `mpo train mpo/recipes/demo.yaml train.max_steps=5 output_dir=runs/short`

    Several GPUs: `deepspeed --num_gpus 8 --module mpo train mpo/recipes/llama-3.1-8b.yaml`

    An interrupted run goes on with the same command.
    """
    checked = load_config(config, overrides)
    from mpo.train import train as run  # after the configuration: the libraries behind it take seconds to import

    run(checked)


def run() -> None:
    """Entry point: the errors that a user can mend become a message and status 2, an interruption becomes status 130."""
    from mpo.interruption import Interrupted

    try:
        app()
    except UserError as error:
        _complain(f"Error: {error}")
        sys.exit(2)
    except Interrupted as stop:
        _complain(str(stop))
        sys.exit(130)
    except KeyboardInterrupt:
        _complain("Interrupted. What was checkpointed is kept; the same command goes on from there.")
        sys.exit(130)


def _complain(message: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
