"""Checkpoints to go on from, through DeepSpeed.

Of a model with adapters a checkpoint holds what trains; the frozen weights are read from the base
model again. A checkpoint is written under a name ending in `.incomplete` and renamed when every
rank has finished and all of it is on the disk, so that a folder `step-00000040` is always whole.
DeepSpeed writes and reads its own (pickled) files in there: go on only from checkpoints that you
trust.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist

from mpo.runtime.errors import UserError
from mpo.runtime.files import publish, remove, sync_file, write_json
from mpo.runtime.ranks import first_failure, of_every_rank, on_main
from mpo.training import portable
from mpo.training.checkpoint_folder import (
    INCOMPLETE,
    STATE,
    Checkpoint,
    name_of,
    names,
    reading,
    remove_incomplete,
    remove_old,
)
from mpo.training.cpu_adam import go_on_counting


def save(
    engine: deepspeed.DeepSpeedEngine, checkpoints: Path, step: int, zero_stage: int, keep: int
) -> str | None:
    """Writes a checkpoint after `step` optimizer steps and removes all but the newest `keep`.
    Called by all ranks.

    Returns None, or on every rank why it could not be written, such as a full disk; older
    checkpoints are then as they were.
    """
    incomplete = checkpoints / f"{name_of(step)}{INCOMPLETE}"
    problem = on_main(_make_room, incomplete)
    files: dict[str, int] = {}
    if problem is None:
        with _writes_of(engine) as (written, failures):
            engine.save_checkpoint(
                str(checkpoints),
                tag=incomplete.name,
                client_state={"mpo": {"step": step}},
                save_latest=False,
                exclude_frozen_parameters=_is_partly_frozen(engine),
            )
        problem = first_failure(failures[0] if failures else None)
        files = {path: size for theirs in of_every_rank(written) for path, size in theirs.items()}
    if problem is None:
        state = {
            "step": step,
            "world_size": dist.get_world_size(),
            "zero_stage": zero_stage,
            "files": files,
        }
        problem = on_main(_publish, incomplete, state, keep)
    return None if problem is None else on_main(_give_up, incomplete, step, problem)


def _make_room(incomplete: Path) -> str | None:
    """Makes the folder to write to. Returns None, or why that cannot be done."""
    remove_incomplete(incomplete.parent)
    try:
        incomplete.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _publish(incomplete: Path, state: dict[str, Any], keep: int) -> str | None:
    """Gives a checkpoint whose files are all written its name, and removes what is older than the
    newest `keep`. Returns None, or why that cannot be done."""
    checkpoints, step = incomplete.parent, state["step"]
    try:
        write_json(incomplete / STATE, state)
        publish(incomplete, checkpoints / name_of(step))
        remove_old(checkpoints, step, keep)
    except (OSError, UserError) as error:
        return str(error)
    return None


def _give_up(incomplete: Path, step: int, problem: str) -> str:
    """Removes what was written so far, and says what that means."""
    remove(incomplete)
    there = names(incomplete.parent)
    older = f"The newest one is {there[-1]}." if there else "There is no older one."
    return (
        f"The checkpoint after step {step} could not be written to {incomplete.parent}: {problem}."
        f" {older}"
    )


@contextmanager
def _writes_of(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Within the block what this rank cannot write is noted instead of raised: the ranks must go
    through DeepSpeed's collectives together.

    Yields name and size of each file, when it is on the disk, and the list of failures.
    """
    written: dict[str, int] = {}
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
        yield written, failures
    finally:
        del writer.save, engine._copy_recovery_script


def _is_partly_frozen(engine: deepspeed.DeepSpeedEngine) -> bool:
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, zero_stage: int) -> int:
    """Restores weights and optimizer state and returns the number of steps done.

    What is computed from there on is what would have been computed without the interruption.

    Raises:
        UserError: the checkpoint was written by another number of ranks or another ZeRO stage.
    """
    world = dist.get_world_size()
    if (checkpoint.world_size, checkpoint.zero_stage) != (world, zero_stage):
        if checkpoint.portable.exists():
            step = portable.load(engine, checkpoint.portable, zero_stage)
            go_on_counting(engine)
            return step
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
        go_on_counting(engine)
        return int(state["mpo"]["step"])
