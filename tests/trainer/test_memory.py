"""The dry run's memory: parameters as loaded models have them, bytes as real engines keep them, and
the rest worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from tiny import ARCHITECTURES, COMMON, build_model, save_model

from mpo.config import Config, LoraConfig, ModelConfig
from mpo.models.loading import load_model
from mpo.training import memory

SIZE = memory.Size(
    parameters=1000,
    trained=100,
    vocab=11,
    hidden=8,
    intermediate=20,
    layers=3,
    linear=640,
    linear_rows=30,
)


def config_of(**sections):
    model = {"path": "x", **sections.pop("model", {})}
    return Config.model_validate(
        {"output_dir": "y", "data": {"train": ["z"]}, "model": model, **sections}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    made = {}

    def folder(architecture):
        if architecture not in made:
            made[architecture] = save_model(
                tmp_path_factory.mktemp(architecture), tokenizer, architecture
            )
        return made[architecture]

    return folder


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("modules", [None, "all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_and_bytes_are_those_of_the_loaded_model(
    folders, architecture, modules, quantize
):
    """Tied or not, with adapters or without, in few bits or not."""
    if quantize and (modules != "all-linear" or pytest.importorskip("bitsandbytes") is None):
        return
    adapters = None if modules is None else LoraConfig(rank=4, target_modules=modules)
    config = ModelConfig(
        path=str(folders(architecture)), dtype="float32", lora=adapters, quantize=quantize
    )
    model, size = load_model(config), memory.size_of(config)
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    bytes_held = 0
    for parameter in model.parameters():  # with the scales of quantized ones
        bytes_held += parameter.numel() * parameter.element_size()
        state, rows = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        bytes_held += 4 * sum(
            scales.numel() for scales in (state and state.absmax, rows) if scales is not None
        )
    if quantize is None:
        assert size.parameters == sum(p.numel() for p in model.parameters())
    assert memory.stored(config, size) == bytes_held


# whose heads are their embeddings
SMOLLM2_135M = transformers.LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
GEMMA_3_270M = transformers.Gemma3TextConfig(
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=262144,
)


@pytest.mark.parametrize(
    ("made", "millions"),
    [
        pytest.param(SMOLLM2_135M, 134.515008, id="SmolLM2-135M"),
        pytest.param(GEMMA_3_270M, 268.098176, id="Gemma-3-270M"),
    ],
)
def test_published_models_have_the_parameters_that_they_are_published_with(
    tmp_path, made, millions
):
    made.architectures = ["LlamaForCausalLM" if made.model_type == "llama" else "Gemma3ForCausalLM"]
    made.save_pretrained(tmp_path)
    size = memory.size_of(ModelConfig(path=str(tmp_path)))
    assert size.parameters == size.trained == round(millions * 1e6)


WORKED_OUT = [
    # per trained parameter: gradients and optimizer; per number of a bucket; each divided over 4
    # GPUs where the stage divides it
    ("float32", 0, 400, 800, 0, 4000),
    ("float32", 1, 400, 1200 / 4, 4, 4000),
    ("float32", 2, 400 / 4, 1200 / 4, 8, 4000),
    ("float32", 3, 400 / 4, 1200 / 4, 4, 4000 / 4 + 11 * 8 * 4),
    ("bfloat16", 1, 600, 1200 / 4, 0, 2000),
    ("bfloat16", 2, 400 / 4, 1200 / 4, 4, 2000),
    ("bfloat16", 3, 400 / 4, 1200 / 4, 2, 2000 / 4 + 11 * 8 * 2),
]


@pytest.mark.parametrize(
    ("dtype", "stage", "gradients", "optimizer", "bucket", "weights"), WORKED_OUT
)
def test_what_each_stage_divides(dtype, stage, gradients, optimizer, bucket, weights):
    for options, elements in (
        ({}, 500_000_000),
        ({"zero_optimization": {"reduce_bucket_size": 1000}}, 1000),
    ):
        config = config_of(model={"dtype": dtype}, zero={"stage": stage, "deepspeed": options})
        parts = memory.per_gpu(config, SIZE, 10, 4)
        assert (
            parts["gradients"] == gradients
            and parts["optimizer"] == optimizer
            and parts["weights"] == weights
        )
        assert parts["buckets"] == bucket * elements
        assert parts["head"] == (512 << 20) + 11 * 8 * 4
    rows = memory.table(config, SIZE, 10)
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[2]["gradients"] == gradients / 2**30 and rows[2]["total"] == pytest.approx(
        sum(parts.values()) / 2**30
    )


@pytest.mark.parametrize(
    ("recomputed", "numbers"),
    [
        (False, 3 * 168),  # 11 * 8 + 4 * 20 for each of three layers
        ("selective", 3 * 80 + 88),  # 5 * 8 + 2 * 20, and the rest of one layer
        (True, 3 * 8 + 160),  # its input, and the rest of one layer
    ],
)
def test_activations(recomputed, numbers):
    for dtype, each in (("float32", 4), ("bfloat16", 2)):
        config = config_of(model={"dtype": dtype, "activation_checkpointing": recomputed})
        assert memory.per_gpu(config, SIZE, 10, 4)["activations"] == 10 * numbers * each


@pytest.mark.parametrize(
    ("quantize", "stored"),
    # with an fp32 scale for each 64, or for each row
    [("nf4", 640 / 2 + 640 / 64 * 4), ("int8", 640 + 30 * 4)],
)
def test_weights_in_few_bits(quantize, stored):
    config = config_of(
        model={"quantize": quantize, "lora": {"rank": 2}},
        zero={"stage": 0},
        loss={"chunk_bytes": 7},
    )
    parts = memory.per_gpu(config, SIZE, 10, 1)
    # the others in bfloat16, and one layer's as numbers
    assert parts["weights"] == 360 * 2 + stored + 8 * 20 * 2
    assert parts["head"] == 7  # which does not train


def test_what_is_offloaded_is_in_host_memory():
    config = config_of(zero={"stage": 3, "offload_optimizer": True, "offload_parameters": True})
    parts = memory.per_gpu(config, SIZE, 10, 4)
    assert parts["weights"] == 11 * 8 * 2 and parts["optimizer"] == parts["gradients"] == 0
    assert memory.on_host(config, SIZE, 4) == 100 * 16 / 4 + 1000 * 2 / 4
    assert memory.table(config, SIZE, 10)[2]["host"] == memory.on_host(config, SIZE, 4) / 2**30


SMALL = (
    "zero.deepspeed={zero_optimization: {reduce_bucket_size: %d, allgather_bucket_size: 1000%s}}"
)
PARTITION_ALL = ", stage3_param_persistence_threshold: 0"
# Stage 2 lets go of its buckets before the end of a backward.
CELLS = [
    [
        f"model.dtype={dtype}",
        f"zero.stage={stage}",
        SMALL % (1000 if stage == 2 else 300_000, PARTITION_ALL if stage == 3 else ""),
        *options,
    ]
    for dtype, stage, options in (
        *(("float32", stage, []) for stage in (0, 1, 2, 3)),
        *(("bfloat16", stage, []) for stage in (1, 2, 3)),
        ("bfloat16", 2, ["model.lora.rank=8"]),
    )
]


def test_engines_keep_what_is_computed(tmp_path, tokenizer, monkeypatch):
    """Weights, gradients, optimizer and buckets of a tied model, to 2 %."""
    monkeypatch.setitem(COMMON, "hidden_size", 128)
    monkeypatch.setitem(COMMON, "intermediate_size", 256)
    build_model("llama-tied", 2000).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sections = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": "model"},
        "data": {"train": ["none.jsonl"]},
        "loss": {"chunk_bytes": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    (tmp_path / "cells.json").write_text(json.dumps(CELLS))
    here = Path(__file__).parent
    command = [
        sys.executable,
        str(here / "memory_worker.py"),
        str(tmp_path / "run.yaml"),
        str(tmp_path / "cells.json"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here.parents[1]}:{here}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    results = [
        json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"computed"')
    ]
    assert len(results) == len(CELLS)
    for cell, result in zip(CELLS, results, strict=True):
        size, stage, each = result["size"], int(cell[1][-1]), 2 if "bfloat16" in cell[0] else 4
        # between a forward and its backward only
        gathered = size["vocab"] * size["hidden"] * each if stage == 3 else 0
        computed = (
            sum(
                result["computed"][part]
                for part in ("weights", "gradients", "optimizer", "buckets")
            )
            - gathered
        )
        assert result["held"] == pytest.approx(computed, rel=0.02), cell
