"""Checkpoints that any number of ranks under any ZeRO stage can go on from.

A portable checkpoint `step-00000040.portable/` holds of each trained parameter, whole, the fp32
weight and AdamW's two moments, as safetensors. DeepSpeed's own converter (universal checkpoints)
takes the partitions of stages 1 to 3 apart; the values go back through its per-parameter access,
which works under every stage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mpo.runtime.errors import UserError
from mpo.runtime.files import new_folder, read_object, write_json
from mpo.training.checkpoint_folder import PORTABLE, STATE, Checkpoint, newest, reading

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
VALUES = "values.safetensors"


def convert(run: Path, log: Callable[[str], None]) -> Path:
    """Writes the portable form of the newest checkpoint of a run, in one process.

    Raises:
        UserError: there is no checkpoint, or no whole one; or the portable form cannot be written.
    """
    found = newest(run / "checkpoints", log)
    if found is None:
        raise UserError(
            f"{run / 'checkpoints'} holds no whole checkpoint. Give the output folder of a run that"
            " was interrupted."
        )
    with reading(found):
        values = _of_stage_0(found) if found.zero_stage == 0 else _of_partitions(found)
    with new_folder(found.portable) as temporary:
        save_file(
            {name: value.float().contiguous() for name, value in values.items()}, temporary / VALUES
        )
        write_json(temporary / STATE, {"step": found.step})
    log(f"{len(values) // len(KINDS)} parameters after step {found.step}")
    return found.portable


def load(engine: deepspeed.DeepSpeedEngine, folder: Path, zero_stage: int) -> int:
    """Puts a portable checkpoint into an engine that has not stepped yet, and returns the number of
    steps done. Called by all ranks.

    Raises:
        UserError: the checkpoint is of another model, or the engine's optimizer is none that can
            take it.
    """
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    step = _check_portable(
        folder, {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    )
    _make_states(engine.optimizer, zero_stage, step, list(parameters.values()))
    with safe_open(folder / VALUES, "pt") as file:
        for name, parameter in parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            weight, *moments = (file.get_tensor(f"{name}:{kind}").view(shape) for kind in KINDS)
            # The copy that the forward pass reads, then the optimizer's.
            gathered = (
                deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
                if zero_stage == 3
                else contextlib.nullcontext()
            )
            with gathered, torch.no_grad():
                if parameter.shape == shape:
                    parameter.copy_(weight)
            if zero_stage > 0:
                _set(engine.optimizer, parameter, None, weight, zero_stage)
            for kind, moment in zip(KINDS[1:], moments, strict=True):
                _set(engine.optimizer, parameter, kind, moment, zero_stage)
    return step


def _check_portable(folder: Path, shapes: dict[str, torch.Size]) -> int:
    """The step of a portable checkpoint that has a value of each kind for every parameter, whole.

    Raises:
        UserError: it is damaged or of another model.
    """
    name = folder.name.removesuffix(PORTABLE)
    again = f"Delete {folder} and run `mpo convert {folder.parent.parent}` again."
    try:
        step = read_object(folder / STATE).get("step")
        if not isinstance(step, int) or f"step-{step:08d}" != name:
            raise ValueError(f"{STATE} is not of {name}")
        with safe_open(folder / VALUES, "pt") as file:
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}
    except (UserError, OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"The converted checkpoint {folder} is damaged ({error}). {again}"
        ) from error
    for parameter, shape in shapes.items():
        for kind in KINDS:
            if sizes.get(f"{parameter}:{kind}") != shape.numel():
                raise UserError(
                    f"{folder} holds no whole {parameter}:{kind}: it is damaged or of another"
                    f" model. {again}"
                )
    return step


def _make_states(
    optimizer: Any, zero_stage: int, step: int, parameters: list[torch.nn.Parameter]
) -> None:
    """AdamW makes its moments in its first step; here they are needed before it."""
    if zero_stage == 0:
        flats: list[torch.Tensor] = list(parameters)
    else:
        flats = (
            optimizer.fp32_partitioned_groups_flat
            if zero_stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
    inner = optimizer if zero_stage == 0 else optimizer.optimizer
    counts_in_tensors = isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own count in integers
    for flat in flats:
        count: Any = step
        if counts_in_tensors:  # a fused optimizer reads it on the device
            device = flat.device if inner.defaults["fused"] else "cpu"
            count = torch.tensor(float(step), device=device)
        inner.state[flat] = {
            "step": count,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if zero_stage in (1, 2):
        for group, flat in zip(optimizer.bit16_groups, flats, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, inner.state)


def _set(
    optimizer: Any,
    parameter: torch.nn.Parameter,
    kind: str | None,
    value: torch.Tensor,
    zero_stage: int,
) -> None:
    """Sets this rank's part of the fp32 weight (kind None) or of a moment."""
    if zero_stage == 0:
        optimizer.state[parameter][kind].copy_(value)
    elif zero_stage == 3:
        # DeepSpeed's own setter refuses parameters whose size the ranks do not divide evenly.
        part, _ = optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=kind
        )
        size, rank, world = part.numel(), dist.get_rank(), dist.get_world_size()
        flat = torch.nn.functional.pad(value.flatten(), (0, max(0, size * world - value.numel())))
        part.data.copy_(flat[rank * size : (rank + 1) * size])
    elif kind is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _of_stage_0(found: Checkpoint) -> dict[str, torch.Tensor]:
    """Stage 0 keeps torch's own state dicts. DeepSpeed's files are pickles: they are opened because
    the user names the run."""
    saved = torch.load(
        found.folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    names = list(saved["param_shapes"][0]) if saved.get("param_shapes") else None
    optimizer, module = saved["optimizer"], saved["module"]
    if optimizer is None or "state" not in optimizer:
        raise UserError(f"{found.folder} holds no AdamW state that can be converted.")
    names = names or [
        name for name in module if name not in (saved.get("frozen_param_shapes") or {})
    ]
    values = {}
    for place, state in optimizer["state"].items():
        values[f"{names[place]}:fp32"] = module[names[place]]
        values |= {f"{names[place]}:{kind}": state[kind] for kind in KINDS[1:]}
    return values


def _of_partitions(found: Checkpoint) -> dict[str, torch.Tensor]:
    """Through DeepSpeed's converter, whose output is one file per parameter and kind."""
    with tempfile.TemporaryDirectory(dir=found.folder.parent, prefix=".converting-") as temporary:
        out = Path(temporary) / "universal"
        arguments = argparse.Namespace(
            input_folder=str(found.folder),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=True,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(arguments)
        values = {}
        for folder in sorted((out / "zero").iterdir()):
            if all((folder / f"{kind}.pt").is_file() for kind in KINDS):
                for kind in KINDS:
                    saved = torch.load(
                        folder / f"{kind}.pt", map_location="cpu", weights_only=False
                    )
                    values[f"{folder.name}:{kind}"] = (
                        saved["param"] if isinstance(saved, dict) else saved
                    )
        return values
