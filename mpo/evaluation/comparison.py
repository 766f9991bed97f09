"""Reward gaps of any models on the measured rows, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from rich.cells import chop_cells
from rich.console import Console
from rich.table import Table

from mpo.config import Config, DataConfig, ModelConfig
from mpo.data.examples import Example, tokenize_rows
from mpo.data.rows import Row
from mpo.models import lora
from mpo.models.inputs import Inputs, check_ids, check_positions
from mpo.models.loading import bind_mpo_forward, check_model, load_model, load_tokenizer
from mpo.models.scoring import Measurement, distinct_sequences, measure_gaps, sign_accuracy
from mpo.runtime.errors import UserError
from mpo.runtime.progress import Progress
from mpo.runtime.ranks import start
from mpo.runtime.terminal import distinct_names, show_table

RESAMPLES = 2000
INTERVAL = 0.95


def compare_models(
    config: Config, inputs: Inputs, models: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Measures each model, one after the other in one process, and returns the report of
    `summarise`.

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
            measured[path] = measure_gaps(
                model, examples[path], pool=config.loss.pool, device=device, advance=advance
            )
        del model
    return summarise(next(iter(examples.values())), measured, config.loss.beta)


def _settings_of(path: str, own: ModelConfig) -> ModelConfig:
    """How a model is loaded: as the configuration's own, but revision and trusted code are for that
    one alone, or for adapters on it."""
    belongs = path == own.path or (
        lora.is_adapter(path) and os.path.abspath(lora.base_of(path)) == os.path.abspath(own.path)
    )
    foreign = {} if belongs else {"revision": None, "trust_remote_code": False}
    return own.model_copy(update={"path": path, "lora": None, **foreign})


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


def summarise(
    examples: Sequence[Example], measured: dict[str, Measurement], beta: float
) -> dict[str, Any]:
    """Per model, language and over all rows (`all`), in nats per token of the model itself:

    n                         rows
    target_gap, dominant_gap  mean reward gaps
    distance                  mean |beta * target gap - dominant gap of the first model|: what L1 brings down
    sign_accuracy             share of target pairs whose chosen answer is the likelier one
    *_interval                95 % bootstrap interval (percentiles over resampled rows) of target_gap and distance
    """
    languages = sorted({e.language for e in examples})
    anchor = next(iter(measured.values())).dominant

    def row(gaps: Measurement, places: list[int]) -> dict[str, Any]:
        target, distance = gaps.target[places], (beta * gaps.target[places] - anchor[places]).abs()
        return {
            "n": len(places),
            "target_gap": float(target.mean()),
            "target_gap_interval": bootstrap_interval(target),
            "dominant_gap": float(gaps.dominant[places].mean()),
            "distance": float(distance.mean()),
            "distance_interval": bootstrap_interval(distance),
            "sign_accuracy": sign_accuracy(target),
        }

    places = {
        language: [i for i, e in enumerate(examples) if e.language == language]
        for language in languages
    }
    places["all"] = list(range(len(examples)))
    return {
        "beta": beta,
        "models": {
            name: {key: row(gaps, of) for key, of in places.items()}
            for name, gaps in measured.items()
        },
    }


def bootstrap_interval(values: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean, (n,) -> (low, high)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, values.numel(), (RESAMPLES, values.numel()), generator=generator)
    means = values[picks].double().mean(1)
    low, high = means.quantile(
        torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64)
    ).tolist()
    return low, high


def show(report: dict[str, Any], console: Console) -> None:
    """One line per language and model, whose names are as long as it takes to tell them apart."""
    table = Table(
        title=(
            f"Reward gaps (nats per token, beta {report['beta']:g}; in brackets {INTERVAL:.0%}"
            " bootstrap intervals)"
        )
    )
    table.add_column("language")
    table.add_column("model", no_wrap=True)
    for name in ("rows", "target gap", "dominant gap", "distance", "sign accuracy"):
        table.add_column(name, justify="right")
    models = report["models"]
    names = distinct_names(list(models))
    for language in next(iter(models.values())):
        for place, (name, rows) in enumerate(zip(names, models.values(), strict=True)):
            row = rows[language]
            low, high = row["target_gap_interval"]
            near, far = row["distance_interval"]
            table.add_row(
                language if place == 0 else "",
                "\n".join(chop_cells(name, 40)),
                str(row["n"]) if place == 0 else "",
                f"{row['target_gap']:+.3f} [{low:+.3f}, {high:+.3f}]",
                f"{row['dominant_gap']:+.3f}",
                f"{row['distance']:.3f} [{near:.3f}, {far:.3f}]",
                f"{row['sign_accuracy']:.0%}",
                end_section=place == len(models) - 1,
            )
    show_table(table, console)
    for name, path in zip(names, models, strict=True):
        if name != path:
            console.print(f"{name}: {path}", soft_wrap=True, markup=False)
