"""`mpo train` and what goes with a run: its reference store, its checkpoints, its picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpo.commands.shared import (
    AsJson,
    ConfigFile,
    Overrides,
    RunFolder,
    aside,
    is_main,
    load,
    note,
    print_json,
    print_report,
    warn_of_missing_numbers,
)
from mpo.runtime.errors import Status, UserError
from mpo.runtime.files import home


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, show steps and memory, load no weights."),
    ] = False,
    overfit_batch: Annotated[
        bool,
        typer.Option(
            "--overfit-batch",
            help="Train on the first step's rows only: loss must fall, MPO's to 0.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Trains a model and shows its reward gaps before and after.

    One process: `mpo train demo`

    With changes: `mpo train demo train.max_steps=5 output_dir=runs/short`

    What it would do and take: `mpo train llama-3.1-8b --dry-run`

    Several GPUs: `deepspeed --num_gpus 8 --module mpo train llama-3.1-8b`

    An interrupted run goes on with the same command.
    """
    overfit = ["train.overfit_batch=true"] if overfit_batch else []
    checked = load(config, [*(overrides or []), *overfit])
    if dry_run:
        with aside(as_json):
            from mpo.training.dry_run import DryRun, describe

            report = describe(checked)
        print_report(report, DryRun.show, as_json)
        return
    with aside(as_json):
        # after the configuration: the libraries behind it take seconds to import
        from mpo.training.train import train

        result = train(checked)
    warn_of_missing_numbers(result)
    if as_json and is_main():
        print_json(result)


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="A loss, with fields of its own: simpo or simpo,beta=10,train.learning_rate=1e-6."
            " Once for each.",
            show_default=False,
        ),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help='What starts the ranks of each run, e.g. "deepspeed --num_gpus 8 --module".',
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Trains several losses from the same model on the same rows, and shows them in one table.

    `mpo compare demo --loss mpo --loss dpo --loss simpo,beta=10,gamma=5 output_dir=runs/losses`

    Each loss is a run in a folder of output_dir. Finished ones are loaded, an interrupted one goes
    on, one that fails leaves the others (exit status 1). compare.md, compare.json and compare.png
    hold what came of them.
    """
    with aside(as_json):
        # after the options: the libraries behind it take seconds to import
        from mpo.runtime.progress import Progress
        from mpo.training.compare import Launcher, compare
        from mpo.training.comparison import Comparison

        to = sys.stderr.fileno() if as_json else None
        log = Progress(enabled=is_main()).log
        report = compare(config, loss or [], overrides or [], Launcher.of(launcher, log, to))
    print_report(report, Comparison.show, as_json)
    if report.failures:
        raise typer.Exit(Status.FOUND)


def precompute(config: ConfigFile, overrides: Overrides = None) -> None:
    """Builds the reference store, which training otherwise builds on first use. Any number of runs
    and ranks may share it.

    `mpo precompute llama-3.1-8b reference.store=stores/llama`

    `deepspeed --num_gpus 8 --module mpo precompute llama-3.1-8b reference.store=stores/llama`
    """
    checked = load(config, overrides)
    from mpo.training.precompute import precompute

    folder = precompute(checked)
    if is_main():
        print(f"Reference store: {folder}")


def convert(run: RunFolder) -> None:
    """Makes the newest checkpoint of an interrupted run fit any number of ranks and any ZeRO stage.

    `mpo convert runs/demo`, then the training command again, with other ranks or zero.stage
    """
    from mpo.training.portable import convert

    print(f"Portable checkpoint: {convert(run, note)}")


def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Such as step-00000040. By default the newest.", show_default=False),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with adapters write a whole model.")
    ] = False,
) -> None:
    """Writes a Hugging Face model folder from a run's checkpoint, also of a run that is not
    finished.

    `mpo export runs/demo --to models/at-40 --checkpoint step-00000040`
    """
    from mpo.training.export import export_checkpoint

    to = Path(home(str(to)))
    export_checkpoint(run, checkpoint, to, merge, note)
    print(f"Model: {to}")


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs, finished or not.")],
    to: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("mpo.png"),
) -> None:
    """Draws loss curves and reward gaps per language of one run, or of several on top of each
    other.

    `mpo plot runs/demo runs/second --to compare.png`
    """
    from mpo.training.curves import plot_runs

    picture = _new_picture(to)
    plot_runs(runs, picture)
    print(f"Plot: {picture}")


def _new_picture(to: Path) -> Path:
    """A place for a picture, whose folder is made. Raises UserError if it cannot be one."""

    to = Path(home(str(to)))
    if to.is_dir():
        raise UserError(f"--to {to} is a folder. Name a file in it, such as {to / 'mpo.png'}.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--to {to}: its folder cannot be made: {error}. Name another place."
        ) from error
    return to
