"""The process group: one process by default, any launcher's ranks otherwise."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from mpo.runtime.errors import UserError

T = TypeVar("T")
P = ParamSpec("P")


def start() -> torch.device:
    """Joins the process group of the launcher, or makes one of a single process. Returns this
    rank's device."""
    global _has_started
    _check_launcher()
    _has_started = True
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's calls, not the user's
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not (is_main() and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()  # one bar, and none in a log
    if "RANK" not in os.environ:
        _be_the_only_rank()
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(local_rank)
    if on_cpu:
        # DeepSpeed would compile a shared-memory all-reduce here (half a minute, and a C++
        # compiler). Gloo does all that is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        _meet("gloo" if on_cpu else accelerator.communication_backend_name())
    return torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))


def _be_the_only_rank() -> None:
    """Says in the environment what a launcher of one process would say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**alone, **place}.items()})


def _meet(backend: str) -> None:
    try:
        deepspeed.init_distributed(dist_backend=backend)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"The ranks cannot meet at {address}: {str(error).splitlines()[0]} If the address"
            " is in use, another run has it, or ranks of one whose launcher was killed: end"
            " them, or give the launcher another --master_port."
        ) from error


def _check_launcher() -> None:
    """Refuses half of what a launcher says: DeepSpeed would look for MPI, or wait for ranks that
    nobody started."""
    if "RANK" not in os.environ:
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    wrong = [
        f"{name} is {os.environ[name]!r}"
        for name in names
        if name in os.environ and not os.environ[name].isdecimal()
    ]
    wrong += [
        f"{name} is not set"
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not os.environ.get(name)
    ]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = [f"RANK {os.environ['RANK']} is not below WORLD_SIZE {os.environ['WORLD_SIZE']}"]
    if wrong:
        raise UserError(
            f"RANK={os.environ['RANK']} says that a launcher started this process, but"
            f" {', '.join(wrong)}. Start it with deepspeed or torchrun, which set all of them; or"
            " unset RANK for a run of one process."
        )


_has_started = False
_launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys() else None
"""The process of torch's or DeepSpeed's launcher that started this rank."""


def launcher_is_gone() -> bool:
    """Whether the launcher was killed: it can no longer end its ranks, so they have to stop by
    themselves."""
    return _launcher is not None and os.getppid() != _launcher


def leave() -> None:
    """Ends the process group where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> None:
    """Ends a process that has been in a process group; in any other it does nothing.

    At once, past the interpreter's own end: threads of gloo that are still there by then now and
    then abort a run that succeeded, which its launcher takes for a failure. What is to be done at
    exit, such as a tracker's last upload, is done first.
    """
    if _has_started:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)


def is_main() -> bool:
    """Whether this is the rank that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def on_main(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Calls `work` on rank 0 while the others wait, and gives its result to every rank, which may
    not share its file system.

    What it raises is raised on rank 0; the other ranks raise UserError with the same words, so that
    none of them waits for ever.
    """
    result, failure = None, None
    if is_main():
        try:
            result = work(*arguments, **options)
        except Exception as error:
            failure = error
    outcome: list[Any] = [
        result,
        None if failure is None else str(failure) or type(failure).__name__,
    ]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def of_every_rank(value: T) -> list[T]:
    """The value that each rank calls this with, in the order of the ranks, on every rank."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def first_failure(failure: str | None) -> str | None:
    """What went wrong on the first rank where something did, on every rank; None where nothing
    did."""
    return next((failure for failure in of_every_rank(failure) if failure is not None), None)


def summed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over the ranks of a tensor on the CPU, which travels through this rank's device."""
    if dist.get_world_size() == 1:
        return tensor
    on_device = tensor.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()
