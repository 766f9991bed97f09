"""`mpo fields`, `mpo recipes` and `mpo env`: what a configuration may hold, those that ship with
mpo, and the machine that it runs on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpo.commands.shared import AsJson, print_json
from mpo.runtime.errors import UserError
from mpo.runtime.files import to_json
from mpo.runtime.terminal import console, show_table

if TYPE_CHECKING:
    from mpo.runtime.fields import FieldText, SectionText
    from mpo.runtime.settings import Section

BUILD = "build"
"""The name before the sections of `mpo data build`."""
LONG = 60
"""Columns of a default that are shown; a translator's prompt is longer."""


def fields(
    section: Annotated[
        str | None,
        typer.Argument(
            help="Such as loss, loss=dpo, model.lora, train.seed, or build.translator.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Shows the fields of a run's configuration: what each takes, its default and what it does.

    All: `mpo fields`

    Of one section: `mpo fields loss`

    Of a loss that is not mpo: `mpo fields loss=dpo`

    Of a data build: `mpo fields build`
    """
    chosen = _chosen(section)
    if as_json:
        print_json([asdict(field) for part in chosen for field in part.fields])
    else:
        _show_fields(chosen, console())


def _chosen(wanted: str | None) -> list[SectionText]:
    """The sections that were asked for. Raises UserError, with the nearest name, if there are
    none."""
    from mpo.config import Config
    from mpo.data_build.config import BuildConfig
    from mpo.runtime.fields import describe, select

    if wanted is None:
        return describe(Config)
    if wanted == BUILD:
        return describe(BuildConfig)
    if wanted.startswith("loss="):
        return describe(_loss_section(wanted.removeprefix("loss=")), "loss")
    prefix = f"{BUILD}." if wanted.startswith(f"{BUILD}.") else ""
    sections = describe(BuildConfig if prefix else Config)
    name = wanted.removeprefix(prefix)
    if chosen := select(sections, name):
        return chosen
    if near := _nearest(name, sections):
        hint = f"did you mean '{prefix}{near}'?"
    else:
        known = [f"{prefix}{section.name}" for section in sections if section.name]
        hint = f"known sections: {', '.join([*known, *([] if prefix else [BUILD])])}."
    raise UserError(f"{wanted}: unknown section or field; {hint}")


def _loss_section(name: str) -> type[Section]:
    """The section that loss.name makes it. Raises UserError where it means no loss."""
    from mpo.loss_config import LossConfig, MPOLoss
    from mpo.losses import section_of

    try:
        return MPOLoss if name == "mpo" else section_of(name, LossConfig)
    except ValueError as error:
        raise UserError(f"loss={name}: {error}") from error


def _nearest(name: str, sections: Sequence[SectionText]) -> str | None:
    """The section or field whose whole or last name is the most like it."""
    names = [s.name for s in sections if s.name] + [f.name for s in sections for f in s.fields]
    by_last = {whole.rsplit(".", 1)[-1]: whole for whole in reversed(names)}
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1)
    near = difflib.get_close_matches(name, names, n=1) or [by_last[found] for found in last]
    return near[0] if near else None


def _show_fields(sections: Sequence[SectionText], to: Console) -> None:
    """A line with a section's name and meaning, then its fields."""
    for place, section in enumerate(sections):
        if place:
            to.print()
        to.print(Text.assemble((section.name, "bold"), "  " if section.name else "", section.about))
        table = _two_columns()
        for field in section.fields:
            takes = Text(f"{field.type}; {_default(field)}\n", "dim")
            meaning = takes.append(Text(field.about, "not dim"))
            table.add_row(field.name.removeprefix(f"{section.name}."), meaning)
        show_table(table, to)
    to.print("\nSet one with SECTION.FIELD=VALUE behind a command, or in the YAML file.")


def _default(field: FieldText) -> str:
    if field.required:
        return "required"
    text = field.default if isinstance(field.default, str) else to_json(field.default)
    return f"default {text if len(text) <= LONG else text[:LONG].rstrip() + ' ...'}"


def recipes(as_json: AsJson = False) -> None:
    """Lists the configurations that ship with mpo.

    `mpo recipes`, then `mpo train demo`, or a copy of the file that it names
    """
    from mpo.config import recipes

    found = [
        {"name": name, "about": _first_comment(path), "file": str(path)}
        for name, path in recipes().items()
    ]
    if as_json:
        print_json(found)
    else:
        _show_recipes(found, console())


def _first_comment(path: Path) -> str:
    """The first line of a recipe, which says what it is for."""
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    return first.removeprefix("# ")


def _show_recipes(found: Sequence[dict[str, str]], to: Console) -> None:
    table = _two_columns()
    for recipe in found:
        table.add_row(recipe["name"], recipe["about"])
    show_table(table, to)
    to.print(
        "\nRun one: mpo train demo, or with changes: mpo train demo loss.beta=1.5\n"
        f"Or copy its file from {Path(found[0]['file']).parent}",
        soft_wrap=True,
    )


def env(as_json: AsJson = False) -> None:
    """Shows versions, devices, and which kernels are chosen for them: for the report of a fault.

    It names neither you nor your files: `mpo env`
    """
    from mpo.models.environment import environment

    found = environment()
    if as_json:
        print_json(found)
        return
    table = _two_columns()
    for section, facts in found.items():
        table.add_row(Text(section, "bold underline"), "")
        for name, fact in facts.items():
            table.add_row(name, "none" if fact is None else str(fact))
    show_table(table, console())


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("about")
    return table
