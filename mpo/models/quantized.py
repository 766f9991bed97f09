"""Frozen weights in 4 or 8 bits through bitsandbytes, on a GPU or (slowly) on a CPU.

Both kinds store few bits and compute in the model's own dtype: a layer's weights are turned back
into numbers for its matrix product and then dropped. The LM head and the embeddings keep their
dtype, because the loss reads the head's weight itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from mpo.runtime.errors import UserError

Kind = Literal["nf4", "int8"]
OLDEST = "0.48.0"
"""First release whose 8-bit models may be moved, with kernels for the CPU in both kinds."""


def options(kind: Kind, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained that quantize while loading.

    Raises:
        UserError: bitsandbytes is not installed, or too old.
    """
    if not is_bitsandbytes_available(OLDEST):
        raise UserError(
            f"model.quantize={kind} needs bitsandbytes {OLDEST} or newer: pip install"
            f" 'bitsandbytes>={OLDEST}'."
        )
    head = {"llm_int8_skip_modules": ["lm_head"]}  # of both kinds, whatever it is called
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **head)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **head
        )
    }


def kind_of(model: PreTrainedModel) -> str | None:
    """`nf4` or `int8`, or None for a model that is not quantized."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    return "int8" if settings.load_in_8bit else str(settings.bnb_4bit_quant_type)


def prepare(model: PreTrainedModel) -> None:
    """Gives the quantized layers the product below.

    bitsandbytes' own forward would round the activations of `int8` as well, with outliers looked
    for over all rows, so that a sequence's result would depend on its packed neighbours; on CPUs it
    computes differently in training and evaluation, and there repacks `nf4` for good into a form
    that has no backward; and it keeps the weights that ZeRO-3 gathered until the backward.
    """
    for _, layer in _layers(model):
        layer.forward = MethodType(_forward, layer)


def _forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = _Product.apply(x, self)
    return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x (..., in) times a layer's frozen weights. What is kept for the backward is the layer
    itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, _weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ _weight(ctx.layer, gradient.dtype), None


def _weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in): the layer's weights as numbers."""
    import bitsandbytes as bnb

    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB.to(weight.device)).to(
        dtype
    )


def _layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    import bitsandbytes as bnb

    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    ]


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain layers of the same values, in its own dtype and on the CPU: it may not
    fit the GPU."""
    for name, layer in _layers(model):
        plain = torch.nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        plain.weight = torch.nn.Parameter(_weight(layer, model.dtype).cpu(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        model.set_submodule(name, plain)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft asks for these
        setattr(model, mark, False)
    return cast(Any, model).to("cpu")
