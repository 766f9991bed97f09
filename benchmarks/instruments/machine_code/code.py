"""One instruction of machine code, of either vendor, reduced to what is counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CLASSES = ("fma", "alu", "special", "conversion", "tensor", "memory", "scalar", "control")
"""Kinds of instructions in a mix:

    fma          add, multiply and multiply-add of floats (on NVIDIA also IMAD, which shares the
                 pipe)
    alu          other vector arithmetic: integers, comparisons, selections, moves. Unpacking bf16
                 is mostly this
    special      exp2, log2, reciprocals, roots, sine and cosine
    conversion   instructions that convert between types
    tensor       matrix multiplication
    memory       global, shared, local and constant memory, and shuffles
    scalar       once per warp instead of once per thread: NVIDIA's uniform path, AMD's scalar unit
    control      branches, barriers, waits
"""

Access = tuple[Literal["load", "store"], int]
"""A global access and its bits per thread."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, reduced to what is counted and where control goes next."""

    place: str
    kind: str  # one of CLASSES
    access: Access | None  # of global memory
    jumps_to: str | None = None  # label
    falls_through: bool = True
    labels: tuple[str, ...] = ()  # that stand before it


@dataclass(frozen=True)
class Facts:
    """What a kernel's machine code tells by itself."""

    registers: int
    spill_ops: int
    local_bytes: int
    code: list[Instruction]


def kind_of(name: str, kinds: Sequence[tuple[str, str]]) -> str:
    """One of CLASSES: the first of `kinds` whose regular expression is the whole name, or "alu"."""
    return next((kind for kind, names in kinds if re.fullmatch(names, name)), "alu")
