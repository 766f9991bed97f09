"""Low-rank adapters through peft: attached to the model in place, so that its forward, its names
and ZeRO's hooks stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from mpo.config import LoraConfig
from mpo.models import quantized
from mpo.models.weights import damaged, first_line, refuse_differences
from mpo.runtime.errors import UserError

ADAPTER_FILE = "adapter_config.json"


def attach(model: torch.nn.Module, config: LoraConfig) -> None:
    """Adds the adapters, in the model's dtype, and freezes everything else. The LM head stays
    frozen, which saves its gradient's GEMM.

    Raises:
        UserError: peft is not installed, or no module has a name of `target_modules`.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("model.lora needs peft: pip install peft.") from error
    wanted = (
        config.target_modules
        if config.target_modules == "all-linear"
        else list(config.target_modules)
    )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        names = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise UserError(
            f"model.lora.target_modules {wanted}: {error}. This model's linear modules are"
            f" {', '.join(names)}."
        ) from error
    if isinstance(model, PreTrainedModel):
        for parameter in model.parameters():
            if parameter.requires_grad:  # peft makes those of 8-bit layers in fp32
                parameter.data = parameter.data.to(model.dtype)
    _keep_frozen_out_of_state_dict(model)


def _keep_frozen_out_of_state_dict(model: torch.nn.Module) -> None:
    """DeepSpeed's checkpoints leave out frozen parameters, but neither a tied head nor the scales
    of quantized weights."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def leave_out(
        module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        for name in [name for name in state if name.removeprefix(prefix) not in trained]:
            del state[name]

    model.register_state_dict_post_hook(leave_out)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Within the block the model is what it was before training. Which parameters train is as
    before afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Writes the adapters as peft opens them; `state` is the model's whole state dict where the
    model itself is partitioned."""
    import peft

    tensors = peft.get_peft_model_state_dict(model, state_dict=state)
    # Adapters that were put into the model itself lack the name of the wrapper that peft opens them
    # with.
    named = {
        f"base_model.model.{name.removeprefix('base_model.model.')}": tensor
        for name, tensor in tensors.items()
    }
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()},
        folder / "adapter_model.safetensors",
    )
    settings = model.peft_config["default"]
    # A relative path would hold in one working folder only.
    base = Path(str(model.name_or_path))
    settings.base_model_name_or_path = str(base.resolve()) if base.exists() else model.name_or_path
    settings.inference_mode = True
    settings.save_pretrained(folder)
    settings.inference_mode = False


def is_adapter(path: str) -> bool:
    """Whether the folder holds adapters instead of a whole model."""
    return (Path(path) / ADAPTER_FILE).is_file()


def base_of(path: str) -> str:
    """The model that the adapters in the folder belong to. Raises UserError where the folder does
    not say."""
    base = _settings(path).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{Path(path) / ADAPTER_FILE} names no base_model_name_or_path: the model that the"
            " adapters belong to."
        )
    if is_adapter(base):
        raise UserError(
            f"The adapters in {path} belong to {base}, which holds adapters itself: merge those"
            " into their model first."
        )
    return base


def _settings(path: str) -> Any:
    import peft

    file = Path(path) / ADAPTER_FILE
    try:
        settings = peft.PeftConfig.from_pretrained(path)
    # a damaged file makes the libraries raise whatever they happen to trip over
    except Exception as error:
        raise UserError(
            f"{file} cannot be read: {first_line(error)}.{damaged(Path(path))}"
        ) from error
    if settings.peft_type != peft.PeftType.LORA:
        raise UserError(
            f"{file} is of type {settings.peft_type}; only LoRA adapters can be measured and"
            " merged."
        )
    return settings


def empty(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def check(path: str, base: PreTrainedModel) -> None:
    """Raises UserError if the folder does not hold exactly the adapters that its configuration puts
    on `base`, which is changed."""
    import peft

    settings = _settings(path)
    try:
        model = peft.PeftModel(base, settings, low_cpu_mem_usage=True)
        expected = {
            name: list(tensor.shape)
            for name, tensor in peft.get_peft_model_state_dict(model).items()
        }
        found = {
            name: list(tensor.shape)
            for name, tensor in peft.utils.load_peft_weights(path, device="cpu").items()
        }
    # a damaged file makes the libraries raise whatever they happen to trip over
    except Exception as error:
        raise UserError(
            f"The adapters in {path} cannot be put on their model:"
            f" {first_line(error)}.{damaged(Path(path))}"
        ) from error
    shapes = {
        name: f"{found[name]} there, {shape} in the model"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    }
    refuse_differences(
        f"The adapters in {path}",
        expected.keys() - found.keys(),
        found.keys() - expected.keys(),
        shapes,
    )


def _with_adapters(base: PreTrainedModel, adapter: str) -> Any:
    """peft's own loader says nothing of adapters that it does not find in the file."""
    import peft

    check(adapter, empty(base.config))
    return peft.PeftModel.from_pretrained(base, adapter)


def merged(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The base model with the adapters of a folder added to its weights.

    Quantized weights become numbers first: the adapters were trained on those, and their sum is not
    rounded to few bits again.
    """
    whole = base if quantized.kind_of(base) is None else quantized.dequantized(base)
    return _with_adapters(whole, adapter).merge_and_unload()


def beside(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The base model with the adapters of a folder attached, frozen, and its weights as they
    are."""
    return cast(PreTrainedModel, _with_adapters(base, adapter).get_base_model())
