"""What every command does first: the model's files, its tokenizer, and the rows as tokens.
Everything that can be refused is refused here, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mpo.config import Config, DataConfig, ModelConfig
from mpo.data.examples import Example, ExampleSet, load_examples
from mpo.data.run_date import with_date
from mpo.models import lora
from mpo.models.loading import (
    check_model,
    load_tokenizer,
    positions_of,
    refuse_foreign_ids,
    resolve_model,
)
from mpo.runtime.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """What a run is made of: a model that is not loaded yet, and rows as its tokens."""

    model: ModelConfig
    """With `path` a folder or a hub id."""
    data: DataConfig
    """With the date that a chat template may print."""
    tokenizer: PreTrainedTokenizerBase
    examples: ExampleSet


def load_inputs(config: Config, log: Callable[[str], None]) -> Inputs:
    """Reads and checks model and data of a configuration.

        inputs = load_inputs(load_config(Path("run.yaml")), print)
        len(inputs.examples.train)

    Raises:
        UserError: the model is no model or of an unknown kind, the tokenizer has no template or is
            another model's, files or rows are bad, or a row is longer than the model's positions.
    """
    config = with_date(config)
    # on every rank: nodes have caches of their own
    model = config.model.model_copy(update={"path": resolve_model(config.model.path, log)})
    if lora.is_adapter(model.path):
        raise UserError(
            f"model.path {config.model.path} holds adapters. Make a whole model of them first (mpo"
            " export RUN --to FOLDER --merge), or measure them as they are with mpo gaps CONFIG"
            " --model FOLDER."
        )
    check_model(model)
    tokenizer = load_tokenizer(model)
    examples = load_examples(config.data, tokenizer, log)
    check_ids(examples.every(), model)
    check_positions(examples.every(), model)
    return Inputs(model, config.data, tokenizer, examples)


def check_ids(examples: Sequence[Example], model: ModelConfig) -> None:
    """Refuses, before any weight is loaded, tokens that the model has no embedding for: its
    tokenizer is another model's."""
    highest, source = max(
        (max(sequence.input_ids), e.source) for e in examples for sequence in e.sequences()
    )
    refuse_foreign_ids(highest, source, model)


def check_positions(examples: Sequence[Example], model: ModelConfig) -> None:
    """Refuses sequences that are longer than the model has positions: it was never trained there,
    and would not say so."""
    limit = positions_of(model)
    lengths = [
        (max(len(sequence.input_ids) for sequence in e.sequences()), e.source) for e in examples
    ]
    longest, source = max(lengths)
    if limit is not None and longest > limit:
        count = sum(length > limit for length, _ in lengths)
        raise UserError(
            f"{count} rows are longer than the {limit} positions of {model.path}; the longest,"
            f" {source}, has {longest} tokens. Set data.max_length={limit}."
        )
