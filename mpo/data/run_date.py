"""The date of a run. Some chat templates print it, so that the tokens of the same rows are others
on the next day.

A run keeps the date of its first start in its folder, a reference store that of its own beside its
values, and whatever goes on from either prints that date again.
"""

from __future__ import annotations

import os
import re
import string
from datetime import datetime
from pathlib import Path

from mpo.config import Config
from mpo.runtime.errors import UserError
from mpo.runtime.files import read_object, to_json


def with_date(config: Config) -> Config:
    """The configuration with its data.date settled: the given one, else the one that its folder
    keeps, else the one of the store that it shares with other runs, else now.

    Raises:
        UserError: the file that holds it is damaged.
    """
    if config.data.date is not None:
        return config
    date = _kept(config) or datetime.now().replace(microsecond=0)
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date})})


def _kept(config: Config) -> datetime | None:
    places = [Path(config.output_dir) / "config.json"]
    if config.reference.mode == "stored" and config.reference.store is not None:
        store = Path(os.path.realpath(config.reference.store))
        seed = config.train.seed
        stores = (store, target_folder(store), mismatched_folder(store, "target", seed))
        places += [f / "manifest.json" for s in stores for f in (s, parts_folder(s))]
    for path in places:
        kept = read_object(path).get("date") if path.is_file() else None
        if kept is not None:
            try:
                return datetime.fromisoformat(kept)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{path}: its date {kept!r} is none. Restore the file, or delete the folder"
                    f" {path.parent}."
                ) from error
    return None


def parts_folder(store: Path) -> Path:
    """Where the finished parts of a reference store lie while it is being built."""
    return store.with_name(f".{store.name}.parts")


def target_folder(store: Path) -> Path:
    """Where the store of target pairs lies, beside that of the dominant ones."""
    return store.with_name(f"{store.name}-target")


def mismatched_folder(store: Path, side: str, seed: int) -> Path:
    """Where the store of answers to other prompts of that side lies, as that seed deals them."""
    return store.with_name(f"{store.name}-mismatched-{side}-{seed}")


def dated(template: str, date: datetime) -> str:
    """The chat template with its clock stopped: `strftime_now` formats `date`, whenever the
    template is rendered.

    A macro of that name hides the function that transformers offers to templates.
    """
    if "strftime_now" not in template:
        return template
    directives = sorted(
        {f"%{letter}" for letter in string.ascii_letters}
        | set(re.findall(r"%[-_0^#]+[A-Za-z]", template))
    )
    text = "format" + "".join(
        f" | replace({to_json(each)}, {to_json(date.strftime(each))})" for each in directives
    )
    return (
        f'{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}{{{{ "" }}}}' + template
    )
