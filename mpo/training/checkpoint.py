"""Checkpoints to go on from, and the finished model as a Hugging Face folder.

Of a model with adapters a checkpoint holds what trains; the frozen weights are read from the base
model again.

A checkpoint is written under a name ending in `.incomplete` and renamed when every rank has
finished and all of it is on the disk, so that a folder `step-00000040` is always whole. Its
`state.json` tells how large each file is, so that one that was damaged later is passed over.
DeepSpeed writes and reads its own (pickled) files in there: go on only from checkpoints that you
trust.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo.config import ModelConfig
from mpo.models import lora
from mpo.models.loading import load_model
from mpo.runtime.errors import UserError
from mpo.runtime.files import new_folder, publish, read_object, remove, sync_file, write_json
from mpo.runtime.ranks import is_main, on_main

STATE = "state.json"
PORTABLE = ".portable"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `step` optimizer steps were done."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int


def newest(checkpoints: Path, log: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest whole checkpoint in the folder, or None where there is none at all. Says which
    damaged ones it passes over.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged = []
    for name in reversed(_names(checkpoints)):
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
    if name not in _names(checkpoints):
        return None
    try:
        return _read(checkpoints / name)
    except _Damaged as problem:
        raise UserError(
            f"The checkpoint {checkpoints / name} is damaged: {problem}. Name another one, or"
            " restore the file."
        ) from problem


def _names(checkpoints: Path) -> list[str]:
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
        or f"step-{numbers[0]:08d}" != folder.name
    ):
        raise _Damaged(f"{STATE} is no description of {folder.name}")
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise _Damaged(f"{name} is missing" if not path.exists() else f"{name} is no file")
        if path.stat().st_size != size:
            raise _Damaged(f"{name} has {path.stat().st_size} bytes and was written with {size}")
    return Checkpoint(folder, *numbers)


def save(
    engine: deepspeed.DeepSpeedEngine, checkpoints: Path, step: int, zero_stage: int, keep: int
) -> str | None:
    """Writes a checkpoint after `step` optimizer steps and removes all but the newest `keep`.
    Called by all ranks.

    Returns None, or on every rank why it could not be written, such as a full disk; older
    checkpoints are then as they were.
    """
    name = f"step-{step:08d}"
    incomplete = checkpoints / f"{name}.incomplete"

    def prepare() -> str | None:
        _remove(checkpoints.glob("*.incomplete"))
        try:
            incomplete.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return None

    problem = on_main(prepare)
    written: dict[str, int] = {}
    if problem is None:
        with _writes_of(engine, written) as failures:
            engine.save_checkpoint(
                str(checkpoints),
                tag=incomplete.name,
                client_state={"mpo": {"step": step}},
                save_latest=False,
                exclude_frozen_parameters=_is_partly_frozen(engine),
            )
        of_ranks: list[tuple[list[str], dict[str, int]]] = [(failures, written)]
        if dist.get_world_size() > 1:
            of_ranks = [([], {})] * dist.get_world_size()
            torch.distributed.all_gather_object(of_ranks, (failures, written))
        problem = next((failure for theirs, _ in of_ranks for failure in theirs), None)
        written = {path: size for _, theirs in of_ranks for path, size in theirs.items()}

    def finish() -> str | None:
        failure = problem
        if failure is None:
            try:
                state = {
                    "step": step,
                    "world_size": dist.get_world_size(),
                    "zero_stage": zero_stage,
                    "files": written,
                }
                write_json(incomplete / STATE, state)
                publish(incomplete, checkpoints / name)
                _remove_old(checkpoints, step, keep)
                return None
            except (OSError, UserError) as error:
                failure = str(error)
        _remove([incomplete])
        names = _names(checkpoints)
        older = f"The newest one is {names[-1]}." if names else "There is no older one."
        return (
            f"The checkpoint after step {step} could not be written to {checkpoints}: {failure}."
            f" {older}"
        )

    return on_main(finish)


@contextmanager
def _writes_of(engine: deepspeed.DeepSpeedEngine, written: dict[str, int]) -> Iterator[list[str]]:
    """Within the block what this rank cannot write is noted instead of raised: the ranks must go
    through DeepSpeed's collectives together.

    Yields the list of failures. `written` gets name and size of each file, when it is on the disk.
    """
    failures: list[str] = []
    writer = engine.checkpoint_engine
    original = writer.save

    def save_noting(state_dict: Any, path: str) -> None:
        try:
            original(state_dict, path)
            sync_file(Path(path))
            written[Path(path).name] = Path(path).stat().st_size
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            failures.append(str(error).splitlines()[0])

    # the script does what `mpo export` does
    writer.save, engine._copy_recovery_script = save_noting, lambda folder: None
    try:
        yield failures
    finally:
        del writer.save, engine._copy_recovery_script


def _is_partly_frozen(engine: deepspeed.DeepSpeedEngine) -> bool:
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def _remove_old(checkpoints: Path, step: int, keep: int) -> None:
    """Leaves the newest `keep` checkpoints up to `step`. Later ones are damaged: the run went on
    from before them."""
    names = _names(checkpoints)
    done = [name for name in names if name <= f"step-{step:08d}"]
    gone = [name for name in names if name not in done[-keep:]]
    _remove(checkpoints / f"{name}{form}" for name in gone for form in ("", PORTABLE))


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        remove(path)


def remove_all(checkpoints: Path) -> None:
    """Removes all of them, and their folder if nothing else is in it. A link in its place, to
    another disk for instance, stays."""
    _remove(checkpoints.glob("step-*"))
    with suppress(OSError):
        checkpoints.rmdir()


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, zero_stage: int) -> int:
    """Restores weights and optimizer state and returns the number of steps done.

    Raises:
        UserError: the checkpoint was written by another number of ranks or another ZeRO stage.
    """
    world = dist.get_world_size()
    if (checkpoint.world_size, checkpoint.zero_stage) != (world, zero_stage):
        from mpo.training import portable as convert  # it reads checkpoints itself

        if convert.portable(checkpoint).exists():
            return convert.load(engine, convert.portable(checkpoint), zero_stage)
        run = checkpoint.folder.parent.parent
        raise UserError(
            f"{checkpoint.folder} was written by {checkpoint.world_size} rank(s) under"
            f" ZeRO-{checkpoint.zero_stage}; this is {world} rank(s) under ZeRO-{zero_stage}. Go on"
            " with the same number of ranks and stage, or convert it and repeat this command:\n "
            f" mpo convert {run}"
        )
    strict = not _is_partly_frozen(engine)
    with reading(checkpoint):
        path, state = engine.load_checkpoint(
            str(checkpoint.folder.parent), tag=checkpoint.folder.name, load_module_strict=strict
        )
        if path is None or state is None:
            raise ValueError("DeepSpeed finds nothing in it")
        return int(state["mpo"]["step"])


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


def export(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    zero_stage: int,
    config: ModelConfig,
) -> None:
    """Writes the model, or its adapters, as safetensors with config and tokenizer;
    `from_pretrained` opens the folder. Called by all ranks.

    Merged adapters are also kept alone, in `adapter` beside the folder: the base model is loaded
    again to take them in.
    """
    model: PreTrainedModel = engine.module
    state = (
        _consolidated_state_dict(engine, trained_only=config.lora is not None)
        if zero_stage == 3
        else None
    )
    merge = config.lora is not None and config.lora.export == "merged"
    target = folder.with_name("adapter") if merge else folder
    if is_main():
        with new_folder(target) as temporary:
            if config.lora is None:
                model.save_pretrained(temporary, state_dict=state)
            else:
                lora.save(model, temporary, state)
            tokenizer.save_pretrained(temporary)
        if merge:
            base = load_model(
                config.model_copy(update={"lora": None, "activation_checkpointing": False})
            )
            lora.export_merged(base, target, tokenizer, folder)
    dist.barrier()


def _consolidated_state_dict(engine: deepspeed.DeepSpeedEngine, trained_only: bool) -> dict | None:
    """The whole weights on rank 0's CPU under ZeRO-3, in their own dtype. DeepSpeed has no public
    call that does not pickle them."""
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)
