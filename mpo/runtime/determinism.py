"""The same bits from every run of one machine: what PyTorch, cuBLAS and NCCL have to be told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mpo.runtime.errors import UserError

WORKSPACES = (":4096:8", ":16:8")
"""Of cuBLAS, with which its products have one order of sums."""
NO_SWITCH_SUMS = "^NVLS,NVLSTree"
"""Every algorithm of NCCL but those in which a switch adds what it gets, in the order in which it
comes."""


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within it operators have one order of sums, or are refused by PyTorch; afterwards everything
    is as it was. Entered before the process's first product on a GPU and before the ranks meet:
    cuBLAS and NCCL read their variables then.

    Raises:
        UserError: the environment asks for something that has no fixed order.
    """
    if not enabled:
        yield
        return
    _refuse_environment()
    variables = {
        "CUBLAS_WORKSPACE_CONFIG": WORKSPACES[0],
        "NCCL_ALGO": NO_SWITCH_SUMS,
        **{n: os.environ[n] for n in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO") if n in os.environ},
    }
    added = [name for name in variables if name not in os.environ]
    of_torch = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic  # a module with a property, which types do not know
    fills = memory.fill_uninitialized_memory
    try:
        os.environ.update(variables)
        torch.use_deterministic_algorithms(True)
        # only hides reads of what nobody wrote, and writes all new memory once more
        memory.fill_uninitialized_memory = False
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(of_torch[0], warn_only=of_torch[1])
        memory.fill_uninitialized_memory = fills


def _refuse_environment() -> None:
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    algorithms = os.environ.get("NCCL_ALGO", NO_SWITCH_SUMS)
    wrong = [
        (
            workspace not in WORKSPACES,
            f"CUBLAS_WORKSPACE_CONFIG={workspace}",
            f"unset it, or set it to {' or '.join(WORKSPACES)}",
        ),
        (
            _may_add_in_a_switch(algorithms),
            f"NCCL_ALGO={algorithms}",
            f"unset it, or set it to Ring, Tree or {NO_SWITCH_SUMS}",
        ),
        (
            os.environ.get("PYTORCH_TUNABLEOP_ENABLED", "0") not in ("", "0"),
            "PYTORCH_TUNABLEOP_ENABLED, which chooses products by their time,",
            "unset it",
        ),
    ]
    for is_wrong, what, remedy in wrong:
        if is_wrong:
            raise UserError(
                f"train.deterministic=true and {what} contradict each other: {remedy}, or set"
                " train.deterministic=false."
            )


def _may_add_in_a_switch(algorithms: str) -> bool:
    """Whether NCCL may choose NVLS or NVLSTree: such a list names what it may, or behind ^ what it
    may not."""
    if algorithms.startswith("^"):
        left_out = {name.strip() for name in algorithms[1:].lower().split(",")}
        return not {"nvls", "nvlstree"} <= left_out
    return "nvls" in algorithms.lower()
