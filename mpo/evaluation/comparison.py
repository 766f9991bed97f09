"""Measures models of any kind on the same rows: each reads them with its own tokenizer and chat
template."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch

from mpo.config import Config, DataConfig, ModelConfig
from mpo.data.examples import Example, tokenize_rows
from mpo.data.rows import Row
from mpo.evaluation.gaps import GapTable
from mpo.models import lora
from mpo.models.forward import bind_mpo_forward
from mpo.models.inputs import Inputs, check_ids, check_positions
from mpo.models.loading import check_model, load_model, load_tokenizer
from mpo.models.scoring import Measurement, Scorer, distinct_sequences
from mpo.runtime.errors import UserError
from mpo.runtime.progress import Progress
from mpo.runtime.ranks import start
from mpo.runtime.terminal import distinct_names


def compare_models(
    config: Config, inputs: Inputs, models: Sequence[str], progress: Progress
) -> GapTable:
    """Measures each model, one after the other in one process.

    config = load_config("demo")
    inputs = load_inputs(config, print)
    models = [inputs.model.path, "runs/demo/model"]
    compare_models(config, inputs, models, Progress(enabled=True)).show(console())

    Each model reads the rows with its own tokenizer and chat template, cut to data.max_length of
    its own tokens.

    Raises:
        UserError: before any weight is loaded: a path is no model, a tokenizer is missing or
            another model's, or rows cannot be read.
    """
    device = start()
    settings = {path: _settings_of(path, inputs.model) for path in models}
    examples = read_by_each(
        inputs.data, [e.row for e in inputs.examples.measured], settings.values(), progress.log
    )
    measured: dict[str, Measurement] = {}
    names = dict(zip(settings, distinct_names(list(settings)), strict=True))
    for path, model_config in settings.items():
        model = cast(torch.nn.Module, bind_mpo_forward(load_model(model_config), config.loss)).to(
            device
        )
        with progress.task(
            f"Gaps of {names[path]}", len(distinct_sequences(examples[path]))
        ) as advance:
            scorer = Scorer(model, config.loss.pool, device)
            measured[path] = scorer.measure(examples[path], advance)
        del model, scorer
    return GapTable.of(next(iter(examples.values())), measured, config.loss.gap_scale)


def _settings_of(path: str, own: ModelConfig) -> ModelConfig:
    """How a model is loaded: as the configuration's own, but revision and trusted code are for that
    one alone, or for adapters on it."""
    belongs = path == own.path or (
        lora.is_adapter(path) and os.path.abspath(lora.base_of(path)) == os.path.abspath(own.path)
    )
    foreign = {} if belongs else {"revision": None, "trust_remote_code": False}
    return own.base().model_copy(update={"path": path, **foreign})


def read_by_each(
    data: DataConfig, rows: Sequence[Row], models: Iterable[ModelConfig], log: Callable[[str], None]
) -> dict[str, list[Example]]:
    """The rows as tokens of each model, by its path: the same rows for all, those that every model
    can read, on the same date.

    Raises:
        UserError: as `compare_models`.
    """
    read: dict[str, list[Example]] = {}
    for model in models:
        check_model(model)
        try:
            read[model.path], _ = tokenize_rows(rows, load_tokenizer(model), data)
        except UserError as error:
            raise UserError(f"{model.path} cannot read the measured rows. {error}") from error
        check_ids(read[model.path], model)
        check_positions(read[model.path], model)
    common = set.intersection(*({e.source for e in examples} for examples in read.values()))
    if not common:
        raise UserError(
            "No measured row can be read by all of the models. Raise data.max_length, or measure"
            " them one by one."
        )
    if left_out := {row.source for row in rows} - common:
        log(
            f"{len(left_out)} measured rows are left out, because not every model can read them:"
            f" {', '.join(sorted(left_out)[:3])} ..."
        )
    return {path: [e for e in examples if e.source in common] for path, examples in read.items()}
