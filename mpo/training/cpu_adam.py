"""DeepSpeed's CPU Adam, which steps an offloaded optimizer: a C++ extension that is compiled on its
first use on a machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable

import deepspeed
import ninja
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from mpo.runtime.errors import UserError
from mpo.runtime.ranks import first_failure


def compile_cpu_adam(log: Callable[[str], None]) -> None:
    """Compiles the extension where that was not done yet, and loads it. Called by all ranks, before
    anything large is loaded.

    The first rank of each node compiles while the others wait: together they would each run a
    compiler, or wait for one another's lock without a word.

    Raises:
        UserError: on every rank, if it cannot be compiled on any node.
    """
    # `.venv/bin/mpo` without an activated environment; DeepSpeed has installed it beside itself
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), ninja.BIN_DIR))
    log(
        "Loading DeepSpeed's CPU Adam; its first use on a machine compiles it, which takes about a"
        " minute."
    )
    began = time.perf_counter()
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0
    problem = first_failure(_load() if first_of_node else None)
    if problem is None and not first_of_node:
        problem = _load()
    if problem is not None:
        raise UserError(problem)
    seconds = time.perf_counter() - began
    if seconds > 10:
        log(
            f"CPU Adam was compiled in {seconds:.0f} seconds. Later runs on this machine find it"
            " ready."
        )


def _load() -> str | None:
    """Returns None, or why it cannot be loaded."""
    try:
        CPUAdamBuilder().load()
        return None
    except Exception as error:  # whatever compiler, linker and loader say
        lines = str(error).splitlines() or [type(error).__name__]
        compiler = os.environ.get("CXX", "c++")
        reason = next((line for line in lines if "error:" in line), lines[0])[:300]
        if shutil.which(compiler) is None:
            reason = f"there is no C++ compiler {compiler!r} on the PATH"
        return (
            "zero.offload_optimizer=true needs DeepSpeed's CPU Adam, which could not be compiled"
            f" here: {reason}. Install a C++ compiler and Python's headers (Debian and Ubuntu: apt"
            " install g++ python3-dev), or set zero.offload_optimizer=false."
        )


def go_on_counting(engine: deepspeed.DeepSpeedEngine) -> None:
    """Brings the extension to the step that a restored engine has done, if it steps with this.

    The extension multiplies the decay rates into their powers, step by step. An object that begins
    at step n takes them from `pow` instead, which may differ in the last bit, and so would all that
    is computed from there on. So it is taken through the steps 1 to n, on a number of its own.
    """
    optimizer = getattr(engine.optimizer, "optimizer", None)  # within ZeRO's
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    done = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    group = optimizer.param_groups[0]
    nothing = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and both moments
    for step in range(1, done + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,
            step,
            0.0,  # learning rate
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["bias_correction"],
            *nothing,
        )
