"""A model folder out of a run: from the engine when training ends, or from a checkpoint, in one
process and without an engine, whatever ranks and stage wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo.config import Config, ModelConfig
from mpo.models.folder import write_adapters, write_merged, write_whole
from mpo.models.loading import load_model, load_tokenizer, resolve_model
from mpo.runtime.errors import UserError
from mpo.runtime.ranks import is_main
from mpo.training import checkpoint_folder
from mpo.training.checkpoint_folder import Checkpoint
from mpo.training.reference import model_identity
from mpo.training.run_folder import OutputFolder


def export_engine(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    zero_stage: int,
    config: ModelConfig,
) -> None:
    """Writes the model that an engine trains, or its adapters. Called by all ranks.

    Merged adapters are also kept alone, in `adapter` beside the folder: the base model is loaded
    again to take them in.
    """
    has_adapters = config.lora is not None
    state = _consolidated(engine, trained_only=has_adapters) if zero_stage == 3 else None
    if is_main():
        if config.lora is None:
            write_whole(engine.module, tokenizer, folder, state)
        elif config.lora.export == "adapter":
            write_adapters(engine.module, tokenizer, folder, state)
        else:
            alone = folder.with_name("adapter")
            write_adapters(engine.module, tokenizer, alone, state)
            plain = config.base().model_copy(update={"activation_checkpointing": False})
            write_merged(load_model(plain), alone, tokenizer, folder)
    dist.barrier()


def _consolidated(engine: deepspeed.DeepSpeedEngine, trained_only: bool) -> dict | None:
    """The whole weights on rank 0's CPU under ZeRO-3, in their own dtype. DeepSpeed has no public
    call that does not pickle them."""
    return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)


def export_checkpoint(
    run: Path, name: str | None, to: Path, merge: bool, log: Callable[[str], None]
) -> None:
    """Writes the model, or the adapters, of a checkpoint of `run` to `to`.

    name: such as `step-00000040`; None: the newest.
    merge: of a run with adapters write a whole model, and the adapters alone beside it.
    Raises:
        UserError: no run, no such checkpoint, `to` is not empty, --merge without adapters, or the
            model that the run began with is no longer where it was.
    """
    folder = OutputFolder(run)
    kept = folder.read()
    trained = Config.model_validate(kept["config"]).model
    alone = to.with_name(f"{to.name}-adapter") if merge else to
    _refuse_what_is_there(to, alone)
    if merge and trained.lora is None:
        raise UserError(
            f"{run} trained all weights; there are no adapters to merge. Leave out --merge."
        )
    found = _find(folder.checkpoints, name, log)
    path = resolve_model(trained.path, log)
    config = trained.model_copy(update={"path": path, "activation_checkpointing": False})
    model, tokenizer = load_model(config), load_tokenizer(config)
    _refuse_another_model(run, kept.get("model"), config, tokenizer)
    _put(model, found, config.path)
    if config.lora is None:
        write_whole(model, tokenizer, to)
        return
    write_adapters(model, tokenizer, alone)
    if merge:
        write_merged(load_model(config.base()), alone, tokenizer, to)


def _refuse_what_is_there(*folders: Path) -> None:
    for folder in folders:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(
                f"{folder} is {'not empty' if folder.is_dir() else 'a file'}. Name another folder"
                " with --to."
            )


def _find(checkpoints: Path, name: str | None, log: Callable[[str], None]) -> Checkpoint:
    found = (
        checkpoint_folder.newest(checkpoints, log)
        if name is None
        else checkpoint_folder.named(checkpoints, name)
    )
    if found is None:
        raise UserError(
            f"{checkpoints} holds no whole checkpoint{f' {name}' if name else ''}. Set"
            " checkpoint.every when training."
        )
    return found


def _refuse_another_model(
    run: Path, noted: Any, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What the exported weights are read with must be as it was; adapters also need the weights of
    their base."""
    read_by = ("config", "chat_template", "vocabulary")
    parts = read_by if config.lora is None else ("weights", *read_by)
    changed = _changes(noted, model_identity(config, tokenizer), parts)
    if changed:
        raise UserError(
            f"{config.path} is not the model that {run} began with: its"
            f" {' and '.join(changed)} changed, and the checkpoint is of what it was. Restore it."
        )


def _put(model: PreTrainedModel, found: Checkpoint, path: str) -> None:
    """Gives the model the trained weights of a checkpoint: all of them, and no other."""
    with checkpoint_folder.reading(found):
        state = _weights(found)
    missing, unknown = model.load_state_dict(
        {key: value.to(model.dtype) for key, value in state.items()}, strict=False
    )
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown or trained & set(missing):
        raise UserError(
            f"{found.folder} does not fit the model {path}:"
            f" {(unknown or sorted(trained & set(missing)))[:3]}."
        )


def _changes(theirs: Any, mine: dict[str, Any], parts: Sequence[str]) -> list[str]:
    """Which parts of a model are not those that a run noted."""
    noted = theirs if isinstance(theirs, dict) else {}
    return [
        name.replace("_", " ") for name in parts if name in noted and noted[name] != mine.get(name)
    ]


def _weights(found: Checkpoint) -> dict[str, torch.Tensor]:
    """The whole state dict of a checkpoint. DeepSpeed's files are pickles: they are opened because
    the user names them."""
    if found.zero_stage > 0:
        return get_fp32_state_dict_from_zero_checkpoint(
            str(found.folder.parent), tag=found.folder.name
        )
    (path,) = [p for p in found.folder.glob("*model_states.pt") if re.match(r"mp_rank_00", p.name)]
    return torch.load(path, map_location="cpu", weights_only=False)["module"]
