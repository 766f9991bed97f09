"""The DeepSpeed engine: settings that follow from the configuration, the optimizer, and its
learning rate."""

from __future__ import annotations

import difflib
import importlib.util
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from mpo.config import Config, TrainConfig
from mpo.runtime.errors import UserError
from mpo.runtime.settings import as_written
from mpo.training.metrics import StepMetrics


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration. The batch arithmetic is ours, so gradient accumulation is
    unmanaged: each step() is a boundary."""
    if config.zero.stage == 0 and config.model.dtype == "bfloat16":
        raise UserError(
            "zero.stage=0 with model.dtype=bfloat16 has no fp32 copy of the weights to step. Set"
            " zero.stage=1, or model.dtype=float32."
        )
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        # A stream of its own for what gradients travel on. Under stage 1 DeepSpeed refuses it.
        "overlap_comm": config.zero.stage >= 2 and _is_on_a_gpu(),
    }
    in_host_memory = {"device": "cpu", "pin_memory": _is_on_a_gpu()}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = dict(in_host_memory)
    if config.zero.offload_parameters:
        zero["offload_param"] = dict(in_host_memory)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **_trackers(config),
    }
    _refuse_what_is_set_elsewhere(config.zero.deepspeed, settings)
    _merge(settings, config.zero.deepspeed, "zero.deepspeed")
    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except (TypeError, ValidationError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(
            f"zero.deepspeed.zero_optimization: {' '.join(lines[1:3]) or lines[0]}"
        ) from error
    return settings


def refuse_attention(config: Config, device: torch.device) -> None:
    """Raises UserError where the model's attention cannot be trained on the device, or not with the
    same bits each time."""
    if config.model.attention == "flex_attention" and config.train.deterministic:
        raise UserError(
            "train.deterministic=true is not promised by model.attention=flex_attention, whose"
            " kernels are chosen by their time. Set model.attention=packed."
        )
    if config.model.attention == "flex_attention" and device.type == "cpu":
        raise UserError(
            "model.attention=flex_attention has no backward pass on a CPU. Set"
            " model.attention=packed, which runs anywhere."
        )


SET_BY = {
    "optimizer": "train.learning_rate, train.adam_betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_ratio",
    "train_batch_size": "train.pairs_per_step",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}
"""Settings of DeepSpeed that it would ignore or trip over here, and the fields in their place."""
PASSED_ON = {
    "aio",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "comet",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
}
"""Settings that have a meaning in a run, besides those that this file makes."""


def _refuse_what_is_set_elsewhere(extra: dict[str, Any], settings: dict[str, Any]) -> None:
    """DeepSpeed says nothing of settings that it does not know, and takes an optimizer of its own
    for none."""
    for key in extra:
        if key in SET_BY:
            raise UserError(
                f"zero.deepspeed.{key} has no effect on a run. Remove it and set {SET_BY[key]}."
            )
        if key not in PASSED_ON and key not in settings:
            known = sorted({*PASSED_ON, *settings})
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"a run passes on {', '.join(known)}."
            raise UserError(
                f"zero.deepspeed.{key} is no setting that a run passes on to DeepSpeed; {hint}"
            )


def _trackers(config: Config) -> dict[str, Any]:
    """Sections of DeepSpeed's monitor. Raises UserError where a tracker's package is not
    installed."""
    track, out = config.track, Path(config.output_dir)
    name = track.run_name or out.name
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "tensorboard": ("tensorboard", {"output_path": str(out), "job_name": "tensorboard"}),
        "wandb": ("wandb", {"project": track.project, "group": name}),
        "comet": ("comet_ml", {"project": track.project, "experiment_name": name}),
    }
    asked = {section: of for section, of in sections.items() if getattr(track, section)}
    for section, (package, _) in asked.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"track.{section}=true needs the package {package}: pip install"
                f" {package.replace('_', '-')}."
            )
    return {section: {"enabled": True, **settings} for section, (_, settings) in asked.items()}


def track(engine: deepspeed.DeepSpeedEngine, metrics: StepMetrics) -> None:
    """Hands a row of metrics to the live trackers, the gaps as one curve per language. DeepSpeed
    writes on rank 0 only."""
    if not engine.monitor.enabled:
        return
    row = metrics.as_row()
    numbers = {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "skipped")
    }
    numbers |= {f"gap/{language}": gap for language, gap in row["gap"].items()}
    engine.monitor.write_events(
        [(f"mpo/{key}", value, row["step"]) for key, value in numbers.items()]
    )


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: the GPU's, or without one the resident set of the
    process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    # Linux counts in KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


FREE = (("overlap_comm", False),)
"""Settings that change no result, so a user may have them otherwise."""


def _merge(settings: dict[str, Any], extra: dict[str, Any], where: str) -> None:
    """Adds the user's settings; one that this file already implies is refused instead of silently
    changing the run's arithmetic."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value, f"{where}.{key}")
        elif key in settings and settings[key] != value and (key, value) not in FREE:
            raise UserError(
                f"{where}.{key}={value!r} contradicts {settings[key]!r}, which follows from the"
                " other fields of the configuration. Remove it and set the field it belongs to"
                " (zero.stage, model.dtype, train.max_grad_norm, ...)."
            )
        else:
            settings[key] = value


@contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Within the block transformers divides the weights over the ranks while it loads them, where
    the settings are those of ZeRO-3. The engine is made within it, too."""
    # transformers keeps a weak reference to it
    keep_alive = (
        HfDeepSpeedConfig(settings) if settings["zero_optimization"]["stage"] == 3 else None
    )
    try:
        yield
    finally:
        del keep_alive


def build_engine(
    model: PreTrainedModel, config: Config, settings: dict[str, Any]
) -> tuple[deepspeed.DeepSpeedEngine, OptimizerGuard]:
    """Wraps the bound model in a DeepSpeed engine with AdamW. Its fp32 master weights are
    DeepSpeed's under bfloat16."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "lr": config.train.learning_rate,
        "betas": config.train.adam_betas,
        "weight_decay": config.train.weight_decay,
    }
    if config.zero.offload_optimizer:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=_steps_on_a_gpu() or None, **options)
    guard = OptimizerGuard(optimizer, config.zero.stage)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    # from_pretrained leaves the model in evaluation mode, where activation checkpointing is off
    engine.train()
    return engine, guard


def _steps_on_a_gpu() -> bool:
    """There one kernel steps all of a partition: 28 bytes are moved for each parameter, where a
    call per operation moves about 90 and needs room for what lies between."""
    return _is_on_a_gpu()


def _is_on_a_gpu() -> bool:
    """Whether this process's ranks compute on GPUs, which a machine may have without that."""
    return bool(get_accelerator().device_name() == "cuda")


class OptimizerGuard:
    """Knows whether the last step was skipped for non-finite gradients, and skips it itself where
    DeepSpeed would not.

    DeepSpeed's ZeRO optimizers leave the weights alone when the gradient norm is not finite. Stage
    0 in fp32 has no such check, so there a hook drops the gradients right before the step;
    gradients are reduced by then, so every rank decides alike.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, zero_stage: int) -> None:
        self.skipped_in_a_row = 0
        """Steps that were skipped since the last one that was not."""
        self._dropped = False
        if zero_stage == 0:
            optimizer.register_step_pre_hook(self._drop_non_finite_gradients)

    def _drop_non_finite_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        # the largest of all, by one read: a sum of squares could overflow
        largest = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None and p.grad.numel()], math.inf
        )
        self._dropped = not math.isfinite(float(largest))
        if self._dropped:
            for parameter in parameters:
                parameter.grad = None

    def skipped(self, engine: deepspeed.DeepSpeedEngine) -> bool:
        """Whether the step just done left the weights as they were."""
        dropped, self._dropped = self._dropped, False
        skipped = dropped or not engine.was_step_applied()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return skipped

    def grad_norm(self, engine: deepspeed.DeepSpeedEngine) -> float | None:
        """Global L2 norm of the step's gradient before clipping, or None where DeepSpeed does not
        tell (stage 0 in fp32)."""
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of step 0 <= step < steps: a linear warm-up from above 0 to the peak, then the
    schedule's decay toward 0.

    With w = ceil(warmup_ratio * steps): peak * (step + 1) / w where step < w, else peak *
    factor((step - w) / (steps - w)).
    """
    warmup = math.ceil(as_written(train.warmup_ratio) * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        train.schedule
    ]
    return train.learning_rate * factor
