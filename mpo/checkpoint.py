"""Checkpoints to go on from, and the finished model as a Hugging Face folder.

Of a model with adapters a checkpoint holds what trains; the frozen weights are read from the base model again.

A checkpoint is written under a name ending in `.incomplete` and renamed when every rank has finished, so that a folder `step-00000040` is
always whole. DeepSpeed writes and reads its own (pickled) files in there: go on only from checkpoints that you trust.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo import lora
from mpo.config import ModelConfig
from mpo.distributed import is_main, on_main
from mpo.errors import UserError
from mpo.files import new_folder, read_json, write_json
from mpo.model import load_model


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `step` optimizer steps were done."""

    folder: Path
    step: int
    world_size: int
    zero_stage: int


def newest(checkpoints: Path) -> Checkpoint | None:
    """The newest whole checkpoint in the folder, or None."""
    return next((found for name in reversed(_names(checkpoints)) if (found := named(checkpoints, name)) is not None), None)


def _names(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def named(checkpoints: Path, name: str) -> Checkpoint | None:
    """The checkpoint of that name, or None where there is none."""
    folder = checkpoints / name
    if not (folder / "state.json").is_file():
        return None
    state = read_json(folder / "state.json")
    return Checkpoint(folder, state["step"], state["world_size"], state["zero_stage"])


def save(engine: deepspeed.DeepSpeedEngine, checkpoints: Path, step: int, zero_stage: int, keep: int) -> str | None:
    """Writes a checkpoint after `step` optimizer steps and removes all but the newest `keep`. Called by all ranks.

    Returns None, or on every rank why it could not be written, such as a full disk; older checkpoints are then as they were.
    """
    name = f"step-{step:08d}"
    incomplete = checkpoints / f"{name}.incomplete"
    on_main(lambda: _remove(checkpoints.glob("*.incomplete")))
    failure = None
    try:
        engine.save_checkpoint(
            str(checkpoints),
            tag=incomplete.name,
            client_state={"mpo": {"step": step}},
            save_latest=False,
            exclude_frozen_parameters=_is_partly_frozen(engine),
        )
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        failure = str(error).splitlines()[0]
    failures: list[str | None] = [failure]
    if dist.get_world_size() > 1:
        failures = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(failures, failure)

    def finish() -> str | None:
        problem = next((f for f in failures if f), None)
        if problem is None:
            try:
                state = {"step": step, "world_size": dist.get_world_size(), "zero_stage": zero_stage}
                write_json(incomplete / "state.json", state)
                shutil.rmtree(checkpoints / name, ignore_errors=True)
                os.replace(incomplete, checkpoints / name)
                _remove(checkpoints / old for old in _names(checkpoints)[:-keep])
                return None
            except OSError as error:
                problem = str(error)
        _remove([incomplete])
        kept = newest(checkpoints)
        older = f"The newest whole one is {kept.folder.name}." if kept else "There is no older one."
        return f"The checkpoint after step {step} could not be written to {checkpoints}: {problem}. {older}"

    return on_main(finish)


def _is_partly_frozen(engine: deepspeed.DeepSpeedEngine) -> bool:
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, zero_stage: int) -> int:
    """Restores weights and optimizer state and returns the number of steps done.

    Raises:
        UserError: the checkpoint was written by another number of ranks or another ZeRO stage.
    """
    world = dist.get_world_size()
    if (checkpoint.world_size, checkpoint.zero_stage) != (world, zero_stage):
        from mpo import convert  # it reads checkpoints itself

        if (convert.portable(checkpoint) / convert.VALUES).is_file():
            return convert.load(engine, convert.portable(checkpoint), zero_stage)
        run = checkpoint.folder.parent.parent
        raise UserError(
            f"{checkpoint.folder} was written by {checkpoint.world_size} rank(s) under ZeRO-{checkpoint.zero_stage}; this is {world} "
            f"rank(s) under ZeRO-{zero_stage}. Go on with the same number of ranks and stage, or convert it and repeat this command:\n"
            f"  mpo convert {run}"
        )
    strict = not _is_partly_frozen(engine)
    path, state = engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name, load_module_strict=strict)
    if path is None or state is None:
        raise UserError(f"DeepSpeed could not load {checkpoint.folder}. Delete that folder to go on from the one before it.")
    return state["mpo"]["step"]


def export(
    engine: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, zero_stage: int, config: ModelConfig
) -> None:
    """Writes the model, or its adapters, as safetensors with config and tokenizer; `from_pretrained` opens the folder. Called by all ranks.

    Merged adapters are also kept alone, in `adapter` beside the folder: the base model is loaded again to take them in.
    """
    model: PreTrainedModel = engine.module
    state = _consolidated_state_dict(engine, trained_only=config.lora is not None) if zero_stage == 3 else None
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
            base = load_model(config.model_copy(update={"lora": None, "activation_checkpointing": False}))
            lora.export_merged(base, target, tokenizer, folder)
    dist.barrier()


def _consolidated_state_dict(engine: deepspeed.DeepSpeedEngine, trained_only: bool) -> dict | None:
    """The whole weights on rank 0's CPU under ZeRO-3, in their own dtype. DeepSpeed has no public call that does not pickle them."""
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)
