"""The command line: `mpo`, `python -m mpo`, and under a launcher `deepspeed --num_gpus N --module
mpo train CONFIG`."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from mpo.config import home, load_config
from mpo.runtime.errors import Status, UserError, mendable, unexpected
from mpo.runtime.files import not_finite, to_json
from mpo.runtime.interruption import SENTENCE, Interrupted, requested
from mpo.runtime.terminal import Streams, console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

data = typer.Typer(no_args_is_help=True, help="Makes rows to train on.")
app.add_typer(data, name="data")

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file of the run, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fields to set, e.g. loss.beta=1.5 train.max_steps=20.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def main(
    # The deepspeed launcher puts --local_rank=N before the command; the environment says the same.
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = None,
) -> None:
    """Multilingual reward gap optimization: makes a language model as safe in its weaker languages
    as in its dominant one."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
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
            "--overfit-batch", help="Train on the first step's rows only: loss must go to 0."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Trains a model and shows its reward gaps before and after.

    One process: `mpo train mpo/recipes/demo.yaml`

    With changes: `mpo train mpo/recipes/demo.yaml train.max_steps=5 output_dir=runs/short`

    What it would do and take: `mpo train mpo/recipes/llama-3.1-8b.yaml --dry-run`

    Several GPUs: `deepspeed --num_gpus 8 --module mpo train mpo/recipes/llama-3.1-8b.yaml`

    An interrupted run goes on with the same command.
    """
    checked = load_config(
        config, [*(overrides or []), *(["train.overfit_batch=true"] if overfit_batch else [])]
    )
    if dry_run:
        with _aside(as_json):
            from mpo.training.dry_run import describe, show

            report = describe(checked)
        _print(report, show, as_json)
        return
    with _aside(as_json):
        # after the configuration: the libraries behind it take seconds to import
        from mpo.training.train import train as run

    with _aside(as_json):
        result = run(checked)
    _warn_of_missing_numbers(result)
    if as_json and _is_main():
        _print_json(result)


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with status 1 if rows look suspicious or were dropped."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Reads the rows and says what is in them: counts and lengths per language, suspicious rows,
    and what is scored.

    `mpo validate mpo/recipes/demo.yaml`

    `mpo validate mpo/recipes/published.yaml data.train=[llama_mpo_data.json] --json > report.json`
    """
    checked = load_config(config, overrides)
    with _aside(as_json):
        from mpo.data.inspection import examine, show
        from mpo.models.inputs import prepare

        report = examine(checked, prepare(checked, _note))
    _print(report, show, as_json)
    if strict and (report["suspicious"] or report["dropped"]):
        raise typer.Exit(Status.FOUND)


@app.command()
def precompute(config: ConfigFile, overrides: Overrides = None) -> None:
    """Builds the reference store, which training otherwise builds on first use. Any number of runs
    and ranks may share it.

    `mpo precompute mpo/recipes/llama-3.1-8b.yaml reference.store=stores/llama`

    `deepspeed --num_gpus 8 --module mpo precompute mpo/recipes/llama-3.1-8b.yaml
    reference.store=stores/llama`
    """
    checked = load_config(config, overrides)
    from mpo.training.train import precompute as run

    folder = run(checked)
    if _is_main():
        print(f"Reference store: {folder}")


@app.command()
def gaps(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, adapter folder or hub id; several are shown side by side.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measures reward gaps per language on the configuration's rows: by default of its model and,
    if there is one, of the trained one.

    `mpo gaps mpo/recipes/demo.yaml`

    `mpo gaps mpo/recipes/demo.yaml --model runs/a/model --model runs/b/model --json`
    """
    checked = load_config(config, overrides)
    with _aside(as_json):
        from mpo.evaluation.gaps import compare_models, show
        from mpo.models.inputs import prepare
        from mpo.models.pypi import resolve_model
        from mpo.runtime.progress import Progress

        prepared = prepare(checked, _note)
        trained = Path(checked.output_dir) / "model"
        models = [resolve_model(home(name), _note) for name in model or []] or [
            prepared.model.path,
            *([str(trained)] if trained.is_dir() else []),
        ]
        report = compare_models(checked, prepared, models, Progress(enabled=True))
    _print(report, show, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's output folder.")],
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
    export_checkpoint(run, checkpoint, to, merge, _note)
    print(f"Model: {to}")


@app.command()
def convert(run: Annotated[Path, typer.Argument(help="A run's output folder.")]) -> None:
    """Makes the newest checkpoint of an interrupted run fit any number of ranks and any ZeRO stage.

    `mpo convert runs/demo`, then the training command again, with other ranks or zero.stage
    """
    from mpo.training.portable import convert as work

    print(f"Portable checkpoint: {work(run, _note)}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs, finished or not.")],
    to: Annotated[Path, typer.Option(help="PNG to write.")] = Path("mpo.png"),
) -> None:
    """Draws loss curves and reward gaps per language of one run, or of several on top of each
    other.

    `mpo plot runs/demo runs/second --to compare.png`
    """
    from mpo.evaluation.report import plot_runs

    picture = _new_picture(to)
    plot_runs(runs, picture)
    print(f"Plot: {picture}")


@data.command("build")
def data_build(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file of the build; docs/data.md has one for each translator."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Fields to set, e.g. languages=[sw,zh].", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Makes rows to train on from preference pairs in one language: translates them, and drops what
    came out wrong.

    By a model here: `mpo data build build.yaml`

    Other languages: `mpo data build build.yaml languages=[sw,yo] output=rows-africa.jsonl`

    By a server: `mpo data build build.yaml translator.server.base_url=http://localhost:8000/v1
    --json > report.json`

    An interrupted build goes on with the same command, and translates nothing twice.
    """
    from mpo.data_build.config import load_build_config

    checked = load_build_config(config, overrides)
    with _aside(as_json):
        from mpo.data_build.build import build
        from mpo.data_build.report import show
        from mpo.runtime.progress import Progress

        report = build(checked, Progress(enabled=_is_main()))
    _print(report, show, as_json)


def run() -> None:
    """Entry point: ends with the status of `status_of`."""
    streams = Streams()
    status = status_of()
    lost = streams.lost()
    if lost is not None:
        _complain(
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
        if not done.code:
            _leave_the_group()
        if done.code == Status.INTERRUPTED:  # what becomes of a KeyboardInterrupt within a command
            return _interrupted(SENTENCE)
        return (
            done.code
            if isinstance(done.code, int)
            else Status.DONE
            if done.code is None
            else _unexpected(done)
        )
    except UserError as error:
        # once on each node: the others may have failed alike, or not
        if _is_main() or os.environ.get("LOCAL_RANK", "0") == "0":
            _print_to_stderr(f"Error: {error}")
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
        _print_to_stderr(f"Error: {words}")  # on every rank: it may be the only one that knows
        return _traced(Status.MENDABLE)
    return Status.DONE


def _leave_the_group() -> None:
    if group := sys.modules.get("mpo.runtime.ranks"):
        group.leave()


def _interrupted(sentence: str) -> int:
    _complain(sentence)
    return _traced(Status.INTERRUPTED)


def _unexpected(error: BaseException) -> int:
    _print_to_stderr(unexpected(error))
    return _traced(Status.UNEXPECTED)


def _traced(status: Status) -> int:
    """The status, after the traceback for those who ask for it."""
    if os.environ.get("MPO_TRACEBACK"):
        traceback.print_exc()
    return status


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _aside(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Within the block whatever prints to standard output, such as DeepSpeed's logger, goes to
    standard error if JSON is to come."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _print(report: Any, show: Any, as_json: bool) -> None:
    """A report as JSON on standard output, or as tables."""
    if not _is_main():
        return
    _warn_of_missing_numbers(report)
    if as_json:
        _print_json(report)
        return
    show(report, console())


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


def _print_json(report: Any) -> None:
    """One line, in letters that standard output has."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(to_json(report, ascii_only=not encoding.startswith("utf")))


def _warn_of_missing_numbers(report: Any) -> None:
    places = not_finite(report)
    if places:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        _complain(
            f"WARNING: {', '.join(places[:3])}{more} came out as no number: the model gives NaN or"
            " infinities for some rows. JSON has null there. Check the model's weights, or try"
            " model.dtype=float32."
        )


def _note(line: str) -> None:
    """Progress goes to standard error, so that --json is all that standard output holds."""
    _complain(line)


def _complain(message: str) -> None:
    if _is_main():
        _print_to_stderr(message)


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
