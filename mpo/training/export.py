"""A model folder from a checkpoint, in one process and without an engine, whatever ranks and stage
wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from mpo.config import Config
from mpo.models import lora
from mpo.models.loading import load_model, load_tokenizer
from mpo.models.pypi import resolve_model
from mpo.runtime.errors import UserError
from mpo.runtime.files import new_folder
from mpo.training import checkpoint_folder, reference
from mpo.training.checkpoint_folder import Checkpoint
from mpo.training.run_folder import OutputFolder


def export_checkpoint(
    run: Path, name: str | None, to: Path, merge: bool, log: Callable[[str], None]
) -> None:
    """Writes the model, or the adapters, of a checkpoint of `run` to `to`.

    Raises:
        UserError: no run, no such checkpoint, `to` is not empty, --merge without adapters, or the
            model that the run began with is no longer where it was.
    """
    folder = OutputFolder(run)
    kept = folder.read()
    config = Config.model_validate(kept["config"])
    adapter = to.with_name(f"{to.name}-adapter") if merge else to
    for place in (to, adapter):
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise UserError(
                f"{place} is {'not empty' if place.is_dir() else 'a file'}. Name another folder"
                " with --to."
            )
    if merge and config.model.lora is None:
        raise UserError(
            f"{run} trained all weights; there are no adapters to merge. Leave out --merge."
        )
    found = (
        checkpoint_folder.newest(folder.checkpoints, log)
        if name is None
        else checkpoint_folder.named(folder.checkpoints, name)
    )
    if found is None:
        raise UserError(
            f"{folder.checkpoints} holds no whole checkpoint{f' {name}' if name else ''}. Set"
            " checkpoint.every when training."
        )
    model_config = config.model.model_copy(
        update={"path": resolve_model(config.model.path, log), "activation_checkpointing": False}
    )
    model, tokenizer = load_model(model_config), load_tokenizer(model_config)
    # what the exported weights are read with; adapters also need their base's weights
    read_by = ("config", "chat_template", "vocabulary")
    changed = _changes(
        kept.get("model"),
        reference.model_identity(model_config, tokenizer),
        read_by if config.model.lora is None else ("weights", *read_by),
    )
    if changed:
        raise UserError(
            f"{model_config.path} is not the model that {run} began with: its"
            f" {' and '.join(changed)} changed, and the checkpoint is of what it was. Restore it."
        )
    with checkpoint_folder.reading(found):
        state = _weights(found)
    missing, unknown = model.load_state_dict(
        {key: value.to(model.dtype) for key, value in state.items()}, strict=False
    )
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown or trained & set(missing):
        raise UserError(
            f"{found.folder} does not fit the model {model_config.path}:"
            f" {(unknown or sorted(trained & set(missing)))[:3]}."
        )
    with new_folder(adapter) as temporary:
        if model_config.lora is None:
            model.save_pretrained(temporary)
        else:
            lora.save(model, temporary, None)
        tokenizer.save_pretrained(temporary)
    if merge:
        lora.export_merged(
            load_model(model_config.model_copy(update={"lora": None})), adapter, tokenizer, to
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
