"""What several commands share: arguments, and how they report. Imports nothing that takes time."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo.runtime.files import not_finite, to_json
from mpo.runtime.terminal import console

if TYPE_CHECKING:
    from mpo.config import Config

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file of the run, or the name of a recipe (`mpo recipes`).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fields to set, e.g. loss.beta=1.5 train.max_steps=20 (`mpo fields` has all).",
        show_default=False,
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run's output folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def load(config: Path, overrides: list[str] | None) -> Config:
    """The checked configuration of a run. Help is shown without the libraries that check it."""
    from mpo.config import load_config

    return load_config(config, overrides)


def is_main() -> bool:
    """Whether this process is rank 0, which speaks for all. Asked before there is a process
    group."""
    return os.environ.get("RANK", "0") == "0"


def aside(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Within the block whatever prints to standard output, such as DeepSpeed's logger, goes to
    standard error if JSON is to come."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_report(report: Any, show: Any, as_json: bool) -> None:
    """A report as JSON on standard output, or as tables by `show(report, console)`. One that is no
    dictionary says with `as_dict()` what its JSON is."""
    if not is_main():
        return
    values = report if isinstance(report, dict) else report.as_dict()
    warn_of_missing_numbers(values)
    if as_json:
        print_json(values)
        return
    show(report, console())


def print_json(report: Any) -> None:
    """One line, in letters that standard output has."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(to_json(report, ascii_only=not encoding.startswith("utf")))


def warn_of_missing_numbers(report: Any) -> None:
    """Says where a report has no number: JSON has null there."""
    places = not_finite(report)
    if places:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        note(
            f"WARNING: {', '.join(places[:3])}{more} came out as no number: the model gives NaN or"
            " infinities for some rows. JSON has null there. Check the model's weights, or try"
            " model.dtype=float32."
        )


def note(line: str) -> None:
    """A line from rank 0 to standard error, so that --json is all that standard output holds."""
    if is_main():
        print_to_stderr(line)


def print_to_stderr(message: str) -> None:
    """A line from whichever rank this is."""
    print(message, file=sys.stderr, flush=True)
