"""How a command ends: the exit statuses, the exception whose message is for the user, and what
other exceptions mean to one."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version


class Status(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    FOUND = 1
    """`validate --strict` found something in the data, or a run of `compare` failed."""
    MENDABLE = 2
    """Something that the user can mend: a file, a value, a folder, an option."""
    UNEXPECTED = 70
    """A fault of the package itself."""
    INTERRUPTED = 130
    """By Ctrl-C or SIGTERM."""


class UserError(Exception):
    """Something that the user can mend: says what was wrong, where, and what to do.

    Raised for bad configurations, data, models, checkpoints and folders. `mpo` prints the message
    and exits with status 2.
    """


def mendable(error: Exception) -> str | None:
    """What a user can do about an exception of another package or of the machine; None for a fault
    of this package.

    A net below the places that know more, for what can happen anywhere: disks, memory, the network,
    a broken installation.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"Out of memory: {words[:300]}. Lower train.pairs_per_micro_batch,"
            " train.tokens_per_micro_batch or data.max_length, set"
            " model.activation_checkpointing=true, or use more GPUs; `mpo train CONFIG --dry-run`"
            " computes what a run takes."
        )
    if isinstance(error, ImportError):
        return (
            f"A package is missing or broken: {words}. Install it again: pip install --upgrade"
            " 'mpo-kernels[train]'."
        )
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return (
            f"{name}{error.strerror or words}. Check that the place exists, may be read and"
            " written, and has room."
        )
    if type(error).__name__ == "SafetensorError":
        return (
            f"Weights could not be read or written: {words}. Check that the disk has room and that"
            " the files are whole."
        )
    if isinstance(error, RuntimeError) and any(
        sign in words for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset")
    ):
        return (
            f"Another rank ended, or the network between ranks broke: {words[:300]}. See what the"
            " other ranks say."
        )
    return None


def unexpected(error: BaseException) -> str:
    """Keeps the traceback in a file and says how to report it."""
    kind = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"python: {platform.python_version()} on {platform.platform()}",
    ]
    lines += [
        f"{package}: {installed(package)}"
        for package in ("mpo-kernels", "torch", "triton", "transformers", "deepspeed", "peft")
    ]
    try:
        handle, name = tempfile.mkstemp(prefix="mpo-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join([*lines, "", *traceback.format_exception(error)]))
        how = f"with {name}, which holds the details"
    except OSError:
        how = "with what the same command prints under MPO_TRACEBACK=1"
    return (
        f"Unexpected error ({kind}). This is a fault of mpo, not of your input: please report it"
        f" where you got mpo from, {how}."
    )


def installed(package: str) -> str:
    """The version of an installed package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
