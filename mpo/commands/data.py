"""`mpo data build` and `mpo validate`: making rows, and looking at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo.commands.shared import (
    AsJson,
    ConfigFile,
    Overrides,
    aside,
    is_main,
    load,
    note,
    print_report,
)
from mpo.runtime.errors import Status


def build(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file of the build; docs/data.md has one for each translator."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Fields to set, e.g. languages=[sw,zh] (`mpo fields build` has all).",
            show_default=False,
        ),
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
    with aside(as_json):
        from mpo.data_build.build import build
        from mpo.data_build.report import show
        from mpo.runtime.progress import Progress

        report = build(checked, Progress(enabled=is_main()))
    print_report(report, show, as_json)


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

    `mpo validate demo`

    `mpo validate published data.train=[llama_mpo_data.json] --json > report.json`
    """
    checked = load(config, overrides)
    with aside(as_json):
        from mpo.data.inspection import inspect, show
        from mpo.models.inputs import load_inputs

        inputs = load_inputs(checked, note)
        note(f"Loss: {checked.loss.in_words()}")
        report = inspect(inputs.examples, inputs.tokenizer, inputs.data)
    print_report(report, show, as_json)
    if strict and (report.suspicious or report.dropped):
        raise typer.Exit(Status.FOUND)
