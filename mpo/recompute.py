"""Which activations of a block are kept for backward, and which are computed again there."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def enable(model: PreTrainedModel, how: Literal[True, "selective"]) -> None:
    """Recomputes each block in backward: all of it, or (`selective`) what lies between its matrix products and attention.

    Selective keeps what is expensive, the outputs of the products and of attention, and recomputes what is large and cheap: norms, rotary
    embeddings, activation functions. Of a Llama block's 11 D + 4 I numbers per token it keeps about 5 D + 2 I.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        # The way down from the wide layer is a block's last product, and then its output is needed by no gradient of the block.
        # Gemma-2 and -3 have a norm behind it.
        norm_behind = any(name.endswith("post_feedforward_layernorm") for name, _ in model.named_modules())
        policy = functools.partial(_keeps, unneeded_width=None if norm_behind else model.config.intermediate_size)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _keeps(ctx: Any, operator: Any, *args: Any, unneeded_width: int | None, **kwargs: Any) -> CheckpointPolicy:
    """Keeps products and attention, but for products whose input (the last operand but one) is `unneeded_width` wide."""
    kept = operator in _ATTENTION or (operator in _PRODUCTS and args[-2].shape[-1] != unneeded_width)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
