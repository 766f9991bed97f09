"""What every command does first: the model's files, its tokenizer, and the rows as tokens.
Everything that can be refused is refused here, before any weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mpo.config import Config, DataConfig, ModelConfig
from mpo.data.examples import Example, remarks, tokenize_rows
from mpo.data.rows import Finding
from mpo.data.run_date import with_date
from mpo.data.sources import LOOKED_AT, load_rows
from mpo.models import lora
from mpo.models.loading import check_model, load_tokenizer, positions_of, refuse_foreign_ids
from mpo.models.pypi import resolve_model
from mpo.runtime.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """A configuration's model and rows."""

    model: ModelConfig
    """With `path` a folder or a hub id."""
    data: DataConfig
    """With the date that a chat template may print."""
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    """Training rows."""
    held_out: list[Example]
    """All rows of data.eval."""
    measured: list[Example]
    """Rows whose gaps are reported: held-out ones where data.eval names files, else training
    rows."""
    dropped: list[Finding]


def prepare(config: Config, log: Callable[[str], None]) -> Prepared:
    """Reads and checks model and data of a configuration.

    Raises:
        UserError: the model is no model or of an unknown kind, the tokenizer has no template, files
            or rows are bad.
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
    examples, dropped = _read(config.data.train, tokenizer, config, config.data.weights)
    held_out, dropped_too = (
        _read(config.data.eval, tokenizer, config) if config.data.eval else ([], [])
    )
    measured = _evenly_spaced(held_out or examples, config.data.eval_rows_per_language)
    _say_what_differs([*examples, *held_out], tokenizer, log)
    check_ids([*examples, *held_out], model)
    check_positions([*examples, *held_out], model)
    return Prepared(
        model, config.data, tokenizer, examples, held_out, measured, dropped + dropped_too
    )


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


def _read(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    weights: Sequence[float] = (),
) -> tuple[list[Example], list[Finding]]:
    rows, unreadable = load_rows(files, config.data, weights)
    examples, untokenizable = tokenize_rows(rows, tokenizer, config.data)
    return examples, unreadable + untokenizable


def _say_what_differs(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
) -> None:
    """Counts, in some rows, control tokens in texts and texts that the template leaves out: a model
    trains on those without a word."""
    looked_at = (
        [examples[i * len(examples) // LOOKED_AT] for i in range(LOOKED_AT)]
        if len(examples) > LOOKED_AT
        else examples
    )
    reasons = Counter(
        reason
        for example in looked_at
        for reason in {reason for reason, _ in remarks(example, tokenizer)}
    )
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        log(
            f"What is trained on is not all as it was written: {counts} in {len(looked_at)} rows"
            " that were looked at; see mpo validate"
        )


def _evenly_spaced(examples: Sequence[Example], per_language: int | None) -> list[Example]:
    """At most `per_language` examples of each language, evenly spaced, in their order."""
    if per_language is None:
        return list(examples)
    chosen: set[int] = set()
    for language in {e.language for e in examples}:
        places = [i for i, e in enumerate(examples) if e.language == language]
        count = min(per_language, len(places))
        chosen.update(places[i * len(places) // count] for i in range(count))
    return [e for i, e in enumerate(examples) if i in chosen]
