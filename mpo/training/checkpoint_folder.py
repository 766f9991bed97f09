"""The checkpoints of a run as folders: their names, whether they are whole, which is the newest.

Nothing here opens what DeepSpeed wrote. `step-00000040` is a whole checkpoint after 40 optimizer
steps, `step-00000040.incomplete` one that is being written, and `step-00000040.portable` its form
for any ranks and any ZeRO stage. `state.json` in it tells how large each file is, so that one that
was damaged later is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.runtime.errors import UserError
from mpo.runtime.files import read_object, remove

STATE = "state.json"
PORTABLE = ".portable"
INCOMPLETE = ".incomplete"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `step` optimizer steps were done."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int

    @property
    def portable(self) -> Path:
        """Where its portable form is, or would be."""
        return self.folder.with_name(self.folder.name + PORTABLE)


def name_of(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step-{step:08d}"


def newest(checkpoints: Path, log: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest whole checkpoint in the folder, or None where there is none at all. Says which
    damaged ones it passes over.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged = []
    for name in reversed(names(checkpoints)):
        try:
            return _read(checkpoints / name)
        except _Damaged as problem:
            damaged.append(f"{name} ({problem})")
            log(
                f"WARNING: The checkpoint {checkpoints / name} is damaged: {problem}. The one"
                " before it is taken."
            )
    if damaged:
        raise UserError(
            f"Every checkpoint in {checkpoints} is damaged: {', '.join(damaged)}. Restore the"
            f" files, or delete the folder {checkpoints} to begin again with the first step."
        )
    return None


def named(checkpoints: Path, name: str) -> Checkpoint | None:
    """The checkpoint of that name, or None where there is none. Raises UserError where it is
    damaged."""
    if name not in names(checkpoints):
        return None
    try:
        return _read(checkpoints / name)
    except _Damaged as problem:
        raise UserError(
            f"The checkpoint {checkpoints / name} is damaged: {problem}. Name another one, or"
            " restore the file."
        ) from problem


def names(checkpoints: Path) -> list[str]:
    """Names of the checkpoints in the folder, whole or damaged, oldest first."""
    return sorted(p.name for p in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files have the sizes that they were written with."""
    try:
        state = read_object(folder / STATE)
    except UserError as error:
        raise _Damaged(
            f"{STATE} is missing" if not (folder / STATE).exists() else str(error)
        ) from error
    numbers: list[Any] = [state.get(key) for key in ("step", "world_size", "zero_stage")]
    files = state.get("files")
    if (
        not all(isinstance(number, int) for number in numbers)
        or not isinstance(files, dict)
        or name_of(numbers[0]) != folder.name
    ):
        raise _Damaged(f"{STATE} is no description of {folder.name}")
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise _Damaged(f"{name} is missing" if not path.exists() else f"{name} is no file")
        if path.stat().st_size != size:
            raise _Damaged(f"{name} has {path.stat().st_size} bytes and was written with {size}")
    return Checkpoint(folder, *numbers)


def remove_incomplete(checkpoints: Path) -> None:
    """Removes what killed runs left half written."""
    _remove_all_of(checkpoints.glob(f"*{INCOMPLETE}"))


def remove_old(checkpoints: Path, step: int, keep: int) -> None:
    """Leaves the newest `keep` checkpoints up to `step`. Later ones are damaged: the run went on
    from before them."""
    there = names(checkpoints)
    done = [name for name in there if name <= name_of(step)]
    gone = [name for name in there if name not in done[-keep:]]
    _remove_all_of(checkpoints / f"{name}{form}" for name in gone for form in ("", PORTABLE))


def _remove_all_of(paths: Iterable[Path]) -> None:
    for path in list(paths):
        remove(path)


def remove_all(checkpoints: Path) -> None:
    """Removes all of them, and their folder if nothing else is in it. A link in its place, to
    another disk for instance, stays."""
    _remove_all_of(checkpoints.glob("step-*"))
    with suppress(OSError):
        checkpoints.rmdir()


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever unpickling raises within the block, for files whose sizes are right, into a
    UserError that names the checkpoint."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise UserError(
            f"The checkpoint {checkpoint.folder} cannot be read ({type(error).__name__}:"
            f" {lines[0]}). If its files are damaged, delete that folder: the same command takes"
            " the one before it."
        ) from error
