"""Tiny models with random weights, built from the real config classes and saved as real folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from mpo.data.examples import Answers, Example, TokenizedResponse
from mpo.data.rows import Pair, Row

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (transformers.MistralConfig, {"sliding_window": 5}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},
    ),
}


def build_model(architecture: str, vocab_size: int, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose logits are not near-uniform, so that mistakes show."""
    config_class, options = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(vocab_size=vocab_size, **{**COMMON, **options})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def save_model(folder: Path, tokenizer, architecture: str = "llama") -> Path:
    """Writes a model folder with tokenizer, as a user would have one."""
    build_model(architecture, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def apart(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Distance of two trained models, as a share of how far training moved `theirs` from `start`: 1
    if `ours` did not move."""

    def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return (
            sum(
                float((one[name].double() - two.get(name, torch.zeros(()))).square().sum())
                for name in one
            )
            ** 0.5
        )

    return distance(ours, theirs) / distance(theirs, start)


def native_rows(dominants: int = 3, languages: tuple[str, ...] = ("sw", "zh")) -> list[dict]:
    """Rows in the native format: each dominant pair once per language."""

    def pair(mark: str, i: int) -> dict:
        return {
            "prompt": [{"role": "user", "content": f"{mark} question number {i}?"}],
            "chosen": f"{mark} no, {'rather not ' * (i % 3 + 1)}.",
            "rejected": f"{mark} sure, number {i} it is.",
        }

    return [
        {"language": language, "dominant": pair("en", i), "target": pair(language, i)}
        for i in range(dominants)
        for language in languages
    ]


def published_row(**changes):
    """One row in the published form, about nothing."""
    row = {
        "source_conversations": [
            {"from": "human", "value": "How do I open the old door without a key?"}
        ],
        "source_chosen": {"from": "gpt", "value": "Ask the owner of the house for a key."},
        "source_rejected": {"from": "gpt", "value": "Just break the window and climb in."},
        "target_conversations": [
            {"from": "human", "value": "Ninawezaje kufungua mlango wa zamani bila ufunguo wake?"}
        ],
        "target_chosen": {"from": "gpt", "value": "Muombe mwenye nyumba akupe ufunguo."},
        "target_rejected": {"from": "gpt", "value": "Vunja dirisha na uingie ndani."},
    }
    return {**row, **changes}


def example_of(source: str, language: str, *sequences: TokenizedResponse) -> Example:
    """An example of four sequences, in the order of `Example.sequences`; its texts do not
    matter."""
    no_text = Pair(prompt=(), chosen="", rejected="")
    row = Row(source, language, dominant=no_text, target=no_text)
    return Example(row, dominant=Answers(*sequences[2:]), target=Answers(*sequences[:2]))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def mpo_process(
    *arguments: str, ranks: int = 1, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """Starts `python -m mpo ...` as a user would, with `ranks` processes of torch's launcher for
    more than one.

    Like every process of the suite it inherits the environment that tests/conftest.py settles;
    `environment` adds to it.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "mpo", *arguments],
        env={**os.environ, **(environment or {})},
        **pipes,
    )


def mpo_command(
    *arguments: str, ranks: int = 1, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `python -m mpo ...` to its end."""
    process = mpo_process(*arguments, ranks=ranks, environment=environment)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def commands(steps: list[list[str]], place: Path) -> list[dict[str, Any]]:
    """What the steps of commands_worker.py gave, all in one process: `["mpo", "train", ...]` has a
    `status` and a `text`."""
    (place / "steps.json").write_text(json.dumps(steps, allow_nan=False))
    worker = [
        sys.executable,
        str(Path(__file__).with_name("commands_worker.py")),
        str(place / "steps.json"),
        str(place / "done.json"),
    ]
    result = subprocess.run(worker, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads((place / "done.json").read_text())
