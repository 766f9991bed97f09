"""Reads NVIDIA's machine code (SASS)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.instruments.machine_code.code import Access, Facts, Instruction, kind_of
from benchmarks.instruments.machine_code.nvidia_classes import BITS, GLOBAL_ACCESS, KINDS

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L[\w.$]*|\$[\w.$]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")


def read(cubin: bytes) -> Facts:
    """What is counted of a compiled kernel."""
    usage, text = _disassemble(cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    return Facts(found["REG"], spills, found["STACK"] + found["LOCAL"], _parse(text))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and code as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


def _parse(text: str) -> list[Instruction]:
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif match := _LINE.match(line):
            place, predicate, opcode, operands = match.groups(default="")
            if opcode == "NOP" or _is_padding(opcode, operands, labels):
                continue
            code.append(_instruction(place, predicate, opcode, operands, tuple(labels)))
            labels = []
    return code


def _is_padding(opcode: str, operands: str, labels: list[str]) -> bool:
    """A function ends in a jump to itself, that nothing runs past its end."""
    target = _TARGET.search(operands)
    return opcode == "BRA" and target is not None and target[1] in labels


def _instruction(
    place: str, predicate: str, opcode: str, operands: str, labels: tuple[str, ...]
) -> Instruction:
    name = opcode.split(".")[0]
    target = _TARGET.search(operands) if name in ("BRA", "CALL") else None
    # A jump can be conditional by its predicate or by an operand (BRA.U !UP0, `(.L_x_1)). ptxas
    # also uses CALL for far jumps.
    conditional = (
        bool(predicate) or name == "CALL" or (target is not None and not operands.startswith("`"))
    )
    return Instruction(
        place=place,
        kind=kind_of(name, KINDS),
        access=_access(name, opcode),
        jumps_to=target[1] if target else None,
        falls_through=conditional
        or name not in ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "JMX"),
        labels=labels,
    )


def _access(name: str, opcode: str) -> Access | None:
    if name not in GLOBAL_ACCESS:
        return None
    return GLOBAL_ACCESS[name], next(
        (BITS[mark] for mark in opcode.split(".")[1:] if mark in BITS), 32
    )
