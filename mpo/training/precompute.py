"""The reference store by itself, before any run that shares it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import deepspeed
import deepspeed.comm as dist
import torch

from mpo.config import Config
from mpo.models.forward import bind_mpo_forward
from mpo.models.loading import load_model
from mpo.models.scoring import Scorer
from mpo.runtime.determinism import deterministic
from mpo.runtime.errors import UserError
from mpo.runtime.ranks import start
from mpo.training.engine import partitioned_loading
from mpo.training.objective import Objective
from mpo.training.run import Run, claim_folder, open_store, read_run, shared_before


def precompute(config: Config) -> Path:
    """Builds what a configuration's loss takes of the reference, or finds it built, and returns the
    folder of the store. Beside one that runs share it also keeps the gaps before training, which
    each would measure.

    Raises:
        UserError: bad configuration, data or model; a loss without a reference; or a store of
            something else is there.
    """
    with deterministic(config.train.deterministic):
        return _precompute(config)


def _precompute(config: Config) -> Path:
    run = read_run(config, start())
    if not Objective(config.loss).takes_reference:
        raise UserError(
            f"loss.name={config.loss.name} takes nothing of the reference, so there is no store to"
            " build. Train without one."
        )
    if config.reference.store is None:  # else nothing is written to the run's folder
        claim_folder(run, may_be_finished=True)
    scorer = Scorer(_load(run), config.loss.pool, run.device)
    open_store(run, scorer)
    if config.reference.store is not None:
        shared_before(run, scorer)
    dist.barrier()
    return run.store_folder


def _load(run: Run) -> torch.nn.Module:
    """The model without adapters. Scoring needs no optimizer; only ZeRO-3 needs an engine, which
    gathers the weights."""
    with partitioned_loading(run.settings):
        model: Any = bind_mpo_forward(load_model(run.inputs.model.base()), run.config.loss)
        if run.config.zero.stage == 3:
            return cast(torch.nn.Module, deepspeed.initialize(model=model, config=run.settings)[0])
        return cast(torch.nn.Module, model.to(run.device))
