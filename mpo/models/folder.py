"""Model folders as `from_pretrained` opens them: a whole model, its adapters, or both as one. Each
appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo.models import lora
from mpo.runtime.files import new_folder


def write_whole(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes weights as safetensors, config and tokenizer.

    state: the whole state dict, where the model itself is partitioned.
    Raises:
        UserError: the folder cannot be written.
    """
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)


def write_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """As `write_whole`, but the adapters of the model alone."""
    with new_folder(folder) as temporary:
        lora.save(model, temporary, state)
        tokenizer.save_pretrained(temporary)


def write_merged(
    base: PreTrainedModel, adapters: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """As `write_whole`, the base model with the adapters of a folder added to its weights."""
    write_whole(lora.merged(base, str(adapters)), tokenizer, folder)
