"""Reads AMD's machine code (GCN assembly)."""

from __future__ import annotations

import re

from benchmarks.instruments.machine_code.amd_classes import BITS, KINDS
from benchmarks.instruments.machine_code.code import Access, Facts, Instruction, kind_of

_LINE = re.compile(r"^\s+([a-z]\w*_\w+)\b\s*([^;]*)")
_LABEL = re.compile(r"^(\.?\w+):")
_ACCESS = re.compile(
    r"(?:global|buffer|flat)_(load|store|atomic)_(?:lds_)?(dwordx\d|dword|[us]?short|[us]?byte)?"
)


def read(assembly: str) -> Facts:
    """What is counted of a compiled kernel."""

    def fact(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    spills = len(re.findall(r"^\s+scratch_(?:load|store)_", assembly, re.MULTILINE))
    return Facts(fact("vgpr_count"), spills, fact("private_segment_fixed_size"), _parse(assembly))


def _parse(assembly: str) -> list[Instruction]:
    code: list[Instruction] = []
    labels: list[str] = []
    for line in assembly.splitlines():
        if line.lstrip().startswith((".section", ".amdhsa_kernel")):
            break  # only the kernel's own code precedes it
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif match := _LINE.match(line):
            code.append(_instruction(match[1], match[2].strip(), tuple(labels)))
            labels = []
    return code


def _instruction(opcode: str, operands: str, labels: tuple[str, ...]) -> Instruction:
    is_jump = opcode == "s_branch" or opcode.startswith("s_cbranch")
    return Instruction(
        place=next(
            (label for label in labels if label.startswith(".LBB")), labels[0] if labels else ""
        ),
        kind=kind_of(opcode, KINDS),
        access=_access(opcode),
        jumps_to=operands if is_jump else None,
        falls_through=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        labels=labels,
    )


def _access(opcode: str) -> Access | None:
    match = _ACCESS.match(opcode)
    if match is None:
        return None
    return "load" if match[1] == "load" else "store", BITS[match[2] or "dword"]
