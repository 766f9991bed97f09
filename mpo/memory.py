"""How much GPU memory a run takes, computed from the model's configuration: no weight is loaded, nothing is measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from mpo.config import Config, ModelConfig

GIB = 2**30
WORLDS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_CHUNK = 512 << 20
"""Bytes of logits that the linear loss holds at a time unless loss.chunk_bytes says otherwise."""


class Size(NamedTuple):
    """What of the model decides about memory."""

    parameters: int
    trained: int
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    linear: int = 0
    """Parameters of linear layers other than the head: what model.quantize stores in few bits."""


def size_of(model: ModelConfig) -> Size:
    """Counts parameters on the meta device."""
    hf = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(hf, trust_remote_code=model.trust_remote_code)
    total = sum(p.numel() for p in empty.parameters())
    linear = sum(m.weight.numel() for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head")
    trained = total
    if model.lora is not None:
        from mpo.lora import trainable_parameters

        trained = trainable_parameters(empty, model.lora)
    return Size(total, trained, hf.vocab_size, hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, linear)


def per_gpu(config: Config, size: Size, tokens: int, world: int) -> dict[str, float]:
    """Bytes per GPU by purpose, for `tokens` packed tokens in the longest micro-batch.

    weights, gradients and optimizer are divided over `world` by the ZeRO stage; AdamW keeps two fp32 moments and under bfloat16 an fp32
    master copy; what is offloaded is counted by `on_host`. Activations: about 11 D + 4 intermediate numbers per token and layer;
    selective checkpointing keeps 5 D + 2 intermediate of them, full checkpointing one input per layer, and both recompute a layer at a
    time. head: a chunk of logits, and the fp32 gradient of a head that is trained.
    """
    stage, bytes_each = config.zero.stage, 2 if config.model.dtype == "bfloat16" else 4
    divided = {purpose: world if stage >= needed else 1 for purpose, needed in (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    master = 4 if bytes_each == 2 else 0
    offloaded = config.zero.offload_optimizer
    optimizer = 0 if offloaded else size.trained * (8 + master) / divided["optimizer"]
    gradients = 0 if offloaded and stage >= 2 else size.trained * 4 / divided["gradients"]  # accumulated in host memory bucket by bucket
    in_few_bits = {None: bytes_each, "nf4": 0.5 + 4 / 64, "int8": 1}[config.model.quantize]  # nf4: an fp32 scale for each 64
    stored = (size.parameters - size.linear) * bytes_each + size.linear * in_few_bits
    weights = 0 if config.zero.offload_parameters else stored / divided["weights"]
    if config.model.quantize:
        weights += size.hidden * size.intermediate * bytes_each  # a layer's, as numbers
    whole = 11 * size.hidden + 4 * size.intermediate  # numbers per token of one layer
    kept = {False: whole, "selective": 5 * size.hidden + 2 * size.intermediate, True: size.hidden}[config.model.activation_checkpointing]
    recomputed = whole - kept  # of one layer at a time
    activations = tokens * bytes_each * (kept * size.layers + recomputed)
    head_gradient = size.vocab * size.hidden * 4 if config.model.lora is None else 0
    return {
        "weights": weights + (size.vocab * size.hidden * bytes_each if stage == 3 else 0),  # stage 3 gathers the head
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "head": (config.loss.chunk_bytes or DEFAULT_CHUNK) + head_gradient,
    }


def on_host(config: Config, size: Size, world: int) -> float:
    """Bytes of host memory per GPU that offloading takes: an fp32 copy of what trains, two moments and the gradient; and the weights."""
    each = 2 if config.model.dtype == "bfloat16" else 4
    optimizer = size.trained * 16 / world if config.zero.offload_optimizer else 0
    return optimizer + (size.parameters * each / world if config.zero.offload_parameters else 0)


def table(config: Config, size: Size, tokens: int) -> list[dict[str, Any]]:
    """`per_gpu` in GiB for each number of GPUs, with its sum, and `host` where something is offloaded."""
    rows = []
    for world in WORLDS:
        parts = {name: value / GIB for name, value in per_gpu(config, size, tokens, world).items()}
        host = on_host(config, size, world) / GIB
        rows.append({"gpus": world, **parts, "total": sum(parts.values()), **({"host": host} if host else {})})
    return rows


def show(rows: list[dict[str, Any]], report: dict[str, Any], console: Console) -> None:
    """The table for people; it says that it is computed. `report` is that of the dry run."""
    size = report["size"]
    made = Table(
        title=f"COMPUTED memory per GPU in GiB, {size['parameters'] / 1e9:.2f} billion parameters, {size['trained'] / 1e6:.1f} million "
        f"trained, micro-batches of {report['tokens_per_micro_batch']['max']} tokens"
    )
    for name in rows[0]:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*(str(value) if isinstance(value, int) else f"{value:.2f}" for value in row.values()))
    console.print(made)
    if torch.cuda.is_available():
        console.print(f"This machine's GPU has {torch.cuda.get_device_properties(0).total_memory / GIB:.0f} GiB.")
