"""How much GPU memory a run takes, computed from the model's configuration: no weight is loaded,
nothing is measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from mpo.config import Config, ModelConfig
from mpo.models import lora
from mpo.models.loading import read_hf_config
from mpo.runtime.terminal import show_table
from mpo_kernels.ops.chunks import DEFAULT_CHUNK_BYTES

GIB = 2**30
WORLDS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at a time unless zero.deepspeed sets
zero_optimization.reduce_bucket_size."""


class Size(NamedTuple):
    """What of the model decides about memory."""

    parameters: int
    """All, those of adapters among them. A head that is tied to the embeddings counts once."""
    trained: int
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    linear: int = 0
    """Parameters of linear layers other than the head: what model.quantize stores in few bits."""
    linear_rows: int = 0
    """Rows of their weights."""


def size_of(model: ModelConfig) -> Size:
    """Counts parameters on the meta device, where a tied head is made as it is when weights are
    loaded."""
    hf = read_hf_config(model)
    empty = lora.empty(hf)
    linear = [
        m.weight
        for name, m in empty.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    if model.lora is not None:
        lora.attach(empty, model.lora)
    total = sum(p.numel() for p in empty.parameters())
    trained = sum(p.numel() for p in empty.parameters() if p.requires_grad)
    rows = sum(weight.shape[0] for weight in linear)
    return Size(
        total,
        trained,
        hf.vocab_size,
        hf.hidden_size,
        hf.intermediate_size,
        hf.num_hidden_layers,
        sum(w.numel() for w in linear),
        rows,
    )


def per_gpu(config: Config, size: Size, tokens: int, world: int) -> dict[str, float]:
    """Bytes per GPU by purpose, for `tokens` packed tokens in the longest micro-batch.

    weights, gradients and optimizer are divided over `world` by the ZeRO stage. Gradients are
    summed in fp32; under stage 1 those of a bfloat16 backward lie beside the sums. AdamW keeps two
    fp32 moments, and ZeRO an fp32 master copy, of fp32 weights too. What is offloaded is counted by
    `on_host`. buckets: gradients on their way between GPUs. Activations: about 11 D + 4
    intermediate numbers per token and layer; selective checkpointing keeps 5 D + 2 intermediate of
    them, full checkpointing one input per layer, and both recompute a layer at a time. head: a
    chunk of logits, and the fp32 gradient of a head that is trained.
    """
    stage, bf16 = config.zero.stage, config.model.dtype == "bfloat16"
    each, offloaded = 2 if bf16 else 4, config.zero.offload_optimizer
    divided = {
        purpose: world if stage >= needed else 1
        for purpose, needed in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    optimizer = 0 if offloaded else size.trained * (8 if stage == 0 else 12) / divided["optimizer"]
    gradients = size.trained * (6 if stage == 1 and bf16 else 4) / divided["gradients"]
    gathered = size.vocab * size.hidden * each if stage == 3 else 0  # the head
    head_gradient = size.vocab * size.hidden * 4 if config.model.lora is None else 0
    return {
        "weights": (
            (
                0
                if config.zero.offload_parameters
                else stored(config.model, size) / divided["weights"]
            )
            # a layer's, as numbers
            + (size.hidden * size.intermediate * each if config.model.quantize else 0)
            + gathered
        ),
        # accumulated in host memory bucket by bucket
        "gradients": 0 if offloaded and stage >= 2 else gradients,
        "optimizer": optimizer,
        "buckets": _buckets(config) * each,
        "activations": tokens * each * _numbers_per_token(config.model, size),
        "head": (config.loss.chunk_bytes or DEFAULT_CHUNK_BYTES) + head_gradient,
    }


def stored(model: ModelConfig, size: Size) -> float:
    """Bytes of all weights: nf4 has an fp32 scale for each 64 of them, int8 one for each row."""
    each = 2 if model.dtype == "bfloat16" else 4
    quantized = {
        None: size.linear * each,
        "nf4": size.linear * (0.5 + 4 / 64),
        "int8": size.linear + 4 * size.linear_rows,
    }
    return (size.parameters - size.linear) * each + quantized[model.quantize]


def _buckets(config: Config) -> int:
    """Numbers in DeepSpeed's buckets: of stage 2 there are two, one of which fills while the other
    travels."""
    of_stage = {0: 0, 1: 0 if config.model.dtype == "bfloat16" else 1, 2: 2, 3: 1}
    settings = config.zero.deepspeed.get("zero_optimization", {})
    return int(settings.get("reduce_bucket_size", DEFAULT_BUCKET)) * of_stage[config.zero.stage]


def _numbers_per_token(model: ModelConfig, size: Size) -> int:
    """What the layers keep for the backward, and of one layer what is recomputed in it."""
    whole = 11 * size.hidden + 4 * size.intermediate
    kept = {False: whole, "selective": 5 * size.hidden + 2 * size.intermediate, True: size.hidden}[
        model.activation_checkpointing
    ]
    return kept * size.layers + whole - kept


def on_host(config: Config, size: Size, world: int) -> float:
    """Bytes of host memory per GPU that offloading takes: an fp32 copy of what trains, two moments
    and the gradient; and the weights."""
    each = 2 if config.model.dtype == "bfloat16" else 4
    optimizer = size.trained * 16 / world if config.zero.offload_optimizer else 0
    return optimizer + (size.parameters * each / world if config.zero.offload_parameters else 0)


def table(config: Config, size: Size, tokens: int) -> list[dict[str, Any]]:
    """`per_gpu` in GiB for each number of GPUs, with its sum, and `host` where something is
    offloaded."""
    rows = []
    for world in WORLDS:
        parts = {name: value / GIB for name, value in per_gpu(config, size, tokens, world).items()}
        host = on_host(config, size, world) / GIB
        rows.append(
            {
                "gpus": world,
                **parts,
                "total": sum(parts.values()),
                **({"host": host} if host else {}),
            }
        )
    return rows


def show(rows: list[dict[str, Any]], size: Size, tokens: int, console: Console) -> None:
    """The table for people; it says that it is computed. `tokens`: those of the longest
    micro-batch."""
    made = Table(
        title=(
            f"COMPUTED memory per GPU in GiB, {size.parameters / 1e9:.2f} billion parameters,"
            f" {size.trained / 1e6:.1f} million trained, micro-batches of {tokens} tokens"
        )
    )
    for name in rows[0]:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            *(str(value) if isinstance(value, int) else f"{value:.2f}" for value in row.values())
        )
    show_table(made, console)
    if torch.cuda.is_available():
        console.print(
            f"This machine's GPU has {torch.cuda.get_device_properties(0).total_memory / GIB:.0f}"
            " GiB."
        )
