"""What a kernel does per element: its loops, or the whole of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from benchmarks.instruments.machine_code.code import CLASSES, Access, Instruction
from benchmarks.instruments.machine_code.control_flow import blocks, loops


@dataclass(frozen=True)
class Body:
    """What is counted per element. An element is `elem_bytes` of the body's widest loads (stores
    where it loads nothing)."""

    kind: Literal["loop", "straight"]
    first: str  # address or label of its first instruction
    instructions: int
    elements: float  # per thread, and per trip if it is a loop
    bytes_loaded: int  # per thread, from global memory
    bytes_stored: int
    mix: Mapping[str, int]  # instructions per class
    # instructions of the shortest way through it among those that access the most elements; of a
    # loop all of them
    main_path: int

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def main_path_per_element(self) -> float:
        return self.main_path / self.elements

    @property
    def bytes_loaded_per_element(self) -> float:
        return self.bytes_loaded / self.elements

    @property
    def bytes_stored_per_element(self) -> float:
        return self.bytes_stored / self.elements

    @property
    def mix_per_element(self) -> dict[str, float]:
        return {name: number / self.elements for name, number in self.mix.items()}


def bodies_of(
    code: list[Instruction], elem_bytes: int, straight_elements: float | None
) -> tuple[Body, ...]:
    """The innermost ones of the loops that access global memory, in the order of the code; or the
    whole function."""
    accessing = [loop for loop in loops(code) if any(code[i].access for i in loop)]
    innermost = [loop for loop in accessing if not any(other < loop for other in accessing)]
    if innermost:
        return tuple(
            _body("loop", [code[i] for i in sorted(loop)], elem_bytes, None)
            for loop in sorted(innermost, key=min)
        )
    if straight_elements is None and not any(i.access for i in code):
        return ()
    return (_body("straight", code, elem_bytes, straight_elements),)


def _body(
    kind: Literal["loop", "straight"],
    code: list[Instruction],
    elem_bytes: int,
    elements: float | None,
) -> Body:
    loads, stores = (
        [i.access[1] // 8 for i in code if i.access and i.access[0] == what]
        for what in ("load", "store")
    )
    if elements is None:
        main = loads or stores
        elements = max(main) * main.count(max(main)) / elem_bytes
    mix = Counter(i.kind for i in code)
    return Body(
        kind=kind,
        first=code[0].place,
        instructions=len(code),
        elements=elements,
        bytes_loaded=sum(loads),
        bytes_stored=sum(stores),
        mix=MappingProxyType({name: mix[name] for name in CLASSES}),
        main_path=len(code) if kind == "loop" else _main_path(code),
    )


def _main_path(code: list[Instruction]) -> int:
    """Instructions of the shortest way from the first instruction to an end, among those with the
    most bytes at the widths that carry most bytes: not the way of a row that is ignored, nor that
    of the one block which holds the label. Jumps back are not followed."""
    carried: Counter[Access] = Counter()
    for access in (i.access for i in code if i.access):
        carried[access] += access[1]
    main = {
        max((a for a in carried if a[0] == kind), key=lambda a: (carried[a], a[1]), default=None)
        for kind in ("load", "store")
    }
    leaders, successors = blocks(code)
    # bytes and negative instructions from a block's start to the end
    best: list[tuple[int, int]] = [(0, 0)] * len(leaders)
    for block in reversed(range(len(leaders))):
        own = code[leaders[block] : [*leaders[1:], len(code)][block]]
        bits = sum(i.access[1] for i in own if i.access and i.access in main)
        onward = max(
            (best[following] for following in successors[block] if following > block),
            default=(0, 0),
        )
        best[block] = (bits + onward[0], onward[1] - len(own))
    return -best[0][1]
