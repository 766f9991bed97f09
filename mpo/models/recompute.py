"""Which activations of a block are kept for backward, and which are computed again there."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

# By name: an operator of flash-attn is there once it is imported.
_PRODUCTS = {"aten::mm", "aten::addmm"}
_ATTENTION = {
    "aten::_flash_attention_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
}


def enable(model: PreTrainedModel, how: Literal[True, "selective"]) -> None:
    """Recomputes each block in backward: all of it, or (`selective`) what lies between its matrix
    products and attention.

    Selective keeps what is expensive, the outputs of the products and of attention, and recomputes
    what is large and cheap: norms, rotary embeddings, activation functions. Of a Llama block's 11 D
    + 4 I numbers per token it keeps about 5 D + 2 I.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        # The way down from the wide layer is a block's last product, and then its output is needed
        # by no gradient of the block. Gemma-2 and -3 have a norm behind it.
        norm_behind = any(
            name.endswith("post_feedforward_layernorm") for name, _ in model.named_modules()
        )
        unneeded_width = None if norm_behind else model.config.intermediate_size

        def contexts() -> tuple[_Keeping, _Replaying]:
            kept: deque = deque()
            written: set[int] = set()
            return _Keeping(kept, written, unneeded_width), _Replaying(
                kept, written, unneeded_width
            )

        options["context_fn"] = contexts
    # transformers renamed it, and warns of the old name.
    turn_on = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    turn_on(options)


def disable(model: PreTrainedModel) -> None:
    """Keeps everything again."""
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


class _Selective(TorchDispatchMode):
    """Torch's own selective contexts want every operator of the forward pass again in the
    recomputation, which ZeRO-3's gathers are not.

    `written` holds the addresses of memory that was written to in place. A kept output among them
    is no longer what its operator gave, and the recomputation would write to it a second time:
    under ZeRO-3, DeepSpeed's linear layer adds its bias to the product like that.
    """

    def __init__(self, kept: deque, written: set[int], unneeded_width: int | None) -> None:
        super().__init__()
        self._kept, self._written, self._unneeded_width = kept, written, unneeded_width

    def _keeps(self, operator: Any, args: tuple) -> bool:
        """Products but for those whose input, their last operand but one, is `unneeded_width` wide;
        and attention."""
        name = operator.name()
        return name in _ATTENTION or (
            name in _PRODUCTS and args[-2].shape[-1] != self._unneeded_width
        )


class _Keeping(_Selective):
    """In the forward pass: keeps outputs, in their order."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._keeps(func, args):
            self._kept.append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
            self._written -= _addresses(out)  # the memory may have been another tensor's before
        elif func._schema.is_mutable:
            self._written |= _addresses(args[:1])
        return out


class _Replaying(_Selective):
    """In the recomputation: hands them out instead of computing them again, but for those that were
    written to."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._keeps(func, args):
            out = self._kept.popleft()
            if not self._written & _addresses(out):
                return out
        return func(*args, **(kwargs or {}))


def _addresses(out: Any) -> set[int]:
    """Of the memory behind tensors."""
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in tree_leaves(out)
        if isinstance(tensor, torch.Tensor)
    }
