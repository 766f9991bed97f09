"""`mpo gaps`: what models do on the measured rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo.commands.shared import AsJson, ConfigFile, Overrides, aside, load, note, print_report
from mpo.runtime.files import home


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

    `mpo gaps demo`

    `mpo gaps demo --model runs/a/model --model runs/b/model --json`
    """
    checked = load(config, overrides)
    with aside(as_json):
        from mpo.evaluation.comparison import compare_models
        from mpo.evaluation.gaps import GapTable
        from mpo.models.inputs import load_inputs
        from mpo.models.loading import resolve_model
        from mpo.runtime.progress import Progress

        inputs = load_inputs(checked, note)
        trained = Path(checked.output_dir) / "model"
        models = [resolve_model(home(name), note) for name in model or []] or [
            inputs.model.path,
            *([str(trained)] if trained.is_dir() else []),
        ]
        table = compare_models(checked, inputs, models, Progress(enabled=True))
    print_report(table, GapTable.show, as_json)
