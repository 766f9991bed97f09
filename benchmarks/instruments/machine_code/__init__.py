"""Static facts of a Triton kernel's machine code, for GPUs that this machine lacks. Nothing is run
and no time is modelled.

    facts = report(kernel, signature, constants, aligned, "sm_90", num_warps=8)
    facts.registers, facts.spill_ops, facts.accesses[("load", 128)]
    facts.bodies[0].instructions_per_element

Counted are instructions as they stand in the code, each once: one under a predicate or in a branch
that few threads take weighs as much as any other, and packed ones (two additions in one) are one.
Padding is left out. Per-element figures are those of a body: one trip through an innermost loop
that accesses global memory or, where there is none, the whole function. A function with several
paths (a row that is ignored and one that is not) is counted with all of them, so its figures are
upper bounds of what one path does, bytes included.

Needs triton's wheel alone: its compiler, and for NVIDIA the disassembler that it ships.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

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


@dataclass(frozen=True)
class Report:
    """Static facts of one compiled kernel."""

    target: str
    num_warps: int
    registers: int  # per thread; on AMD vector registers of both files together
    spill_ops: int  # loads and stores of local memory in the code
    local_bytes: int  # per thread: spills and stack
    shared_bytes: int  # per program
    instructions: int
    accesses: Mapping[Access, int]  # instructions that access global memory
    # programs that registers, shared memory and warps allow at a time; 0: it cannot be launched
    ctas_per_sm: int
    occupancy: float  # their share of the warps that a multiprocessor can hold
    bodies: tuple[Body, ...]

    @property
    def widths(self) -> frozenset[int]:
        """Bits of its global accesses."""
        return frozenset(bits for _, bits in self.accesses)

    @property
    def main_width(self) -> int:
        """Bits of the loads that bring most of its bytes; 0 without loads."""
        brought = {
            bits: number * bits for (kind, bits), number in self.accesses.items() if kind == "load"
        }
        return max(brought, key=lambda bits: (brought[bits], bits), default=0)


def report(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: AbstractSet[str],
    target: str,
    num_warps: int,
    elem_bytes: int = 2,
    *,
    elements_per_program: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compiles a @triton.jit kernel and reads its machine code.

    Args:
        signature: triton type per argument ("*bf16", "i32"); arguments in `constants` need none.
        constants: values of constexpr arguments.
        aligned: arguments that divide by 16, as triton specialises them at a launch.
        target: one of TARGETS.
        elem_bytes: size of the elements that per-element figures refer to.
        elements_per_program: elements that a program handles, for a kernel without a loop over
            global memory; else they follow from its widest accesses, which is wrong where several
            paths access the same elements.
        options: further options of the compiler (maxnreg, waves_per_eu).

    Raises:
        ValueError: an unknown target.
        RuntimeError: under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    if target not in _LIMITS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Kernels cannot be compiled under TRITON_INTERPRET=1.")
    compiled = _compile(
        kernel, signature, constants, aligned, target, {"num_warps": num_warps, **(options or {})}
    )
    facts = (
        _read_amd(compiled.asm["amdgcn"])
        if target.startswith("gfx")
        else _read_nvidia(compiled.asm["cubin"])
    )
    limits = _LIMITS[target]
    ctas = limits.ctas(facts.registers, compiled.metadata.shared, num_warps)
    per_thread = (
        None if elements_per_program is None else elements_per_program / (limits.lanes * num_warps)
    )
    return Report(
        target=target,
        num_warps=num_warps,
        registers=facts.registers,
        spill_ops=facts.spill_ops,
        local_bytes=facts.local_bytes,
        shared_bytes=compiled.metadata.shared,
        instructions=len(facts.code),
        accesses=MappingProxyType(dict(Counter(i.access for i in facts.code if i.access))),
        ctas_per_sm=ctas,
        occupancy=ctas * num_warps / limits.warps,
        bodies=_bodies(facts.code, elem_bytes, per_thread),
    )


def _compile(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: AbstractSet[str],
    target: str,
    options: dict[str, Any],
) -> Any:
    import triton  # late, as everywhere in this package
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in aligned
    }
    gpu = (
        GPUTarget("hip", target, 64)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target[3:]), 32)
    )
    return triton.compile(
        ASTSource(kernel, kinds, dict(constants), attributes), target=gpu, options=options
    )


# What a multiprocessor holds


@dataclass(frozen=True)
class _Limits:
    """Resources of one multiprocessor, from NVIDIA's occupancy calculator and LLVM's AMDGPU
    subtarget."""

    lanes: int  # threads of a warp
    warps: int
    ctas: Callable[[int, int, int], int]  # of registers, shared bytes and warps


def _nvidia_ctas(registers: int, shared: int, num_warps: int, shared_per_sm: int) -> int:
    # registers are given out in units of 256, from four files of 16384
    per_warp = _round_up(registers * 32, 256)
    by_registers = 4 * (16384 // per_warp) // num_warps
    by_shared = shared_per_sm // (_round_up(shared, 128) + 1024)  # 1 KB of each CTA is the system's
    return min(by_registers, by_shared, 64 // num_warps, 32)


def _amd_ctas(registers: int, shared: int, num_warps: int) -> int:
    # four SIMDs, each with 512 registers and 8 waves
    waves = 4 * min(8, 512 // _round_up(max(registers, 1), 8))
    by_shared = 65536 // _round_up(shared, 512) if shared else waves
    by_barriers = waves if num_warps == 1 else 16
    return min(waves // num_warps, by_shared, by_barriers)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


_LIMITS = {
    "sm_80": _Limits(
        32, 64, lambda registers, shared, warps: _nvidia_ctas(registers, shared, warps, 164 << 10)
    ),
    "sm_90": _Limits(
        32, 64, lambda registers, shared, warps: _nvidia_ctas(registers, shared, warps, 228 << 10)
    ),
    "sm_100": _Limits(
        32, 64, lambda registers, shared, warps: _nvidia_ctas(registers, shared, warps, 228 << 10)
    ),
    "gfx942": _Limits(64, 32, _amd_ctas),
}


# Code of either vendor


@dataclass(frozen=True)
class _Instruction:
    """One instruction, reduced to what is counted and where control goes next."""

    place: str
    kind: str  # one of CLASSES
    access: Access | None  # of global memory
    jumps_to: str | None = None  # label
    falls_through: bool = True
    labels: tuple[str, ...] = ()  # that stand before it


@dataclass(frozen=True)
class _Facts:
    registers: int
    spill_ops: int
    local_bytes: int
    code: list[_Instruction]


def _bodies(
    code: list[_Instruction], elem_bytes: int, straight_elements: float | None
) -> tuple[Body, ...]:
    """The innermost ones of the loops that access global memory, in the order of the code; or the
    whole function."""
    loops = [loop for loop in _loops(code) if any(code[i].access for i in loop)]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
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
    code: list[_Instruction],
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


def _main_path(code: list[_Instruction]) -> int:
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
    leaders, successors = _blocks(code)
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


def _loops(code: list[_Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of instructions: for a jump back to an instruction that dominates
    it, all that can reach the jump without passing there. Jumps in the text's order do not do:
    compilers place a part of a loop above its first instruction."""
    leaders, successors = _blocks(code)
    predecessors: list[set[int]] = [set() for _ in leaders]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].add(block)
    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following & dominators[block]:
            bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    ends = [*leaders[1:], len(code)]
    return [
        frozenset(i for block in blocks for i in range(leaders[block], ends[block]))
        for blocks in bodies.values()
    ]


def _blocks(code: list[_Instruction]) -> tuple[list[int], list[set[int]]]:
    """First instruction of each basic block, and the blocks that may follow it."""
    labels = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    starts = {0} | {labels[i.jumps_to] for i in code if i.jumps_to in labels}
    starts |= {
        i + 1
        for i, instruction in enumerate(code[:-1])
        if instruction.jumps_to or not instruction.falls_through
    }
    leaders = sorted(starts)
    block_of = {leader: block for block, leader in enumerate(leaders)}
    successors = []
    for end in [*leaders[1:], len(code)]:
        last = code[end - 1]
        following = {block_of[labels[last.jumps_to]]} if last.jumps_to in labels else set()
        if last.falls_through and end < len(code):
            following.add(block_of[end])
        successors.append(following)
    return leaders, successors


def _dominators(successors: list[set[int]], predecessors: list[set[int]]) -> list[set[int]]:
    """Per block those that every path from the first block to it passes, itself included; none for
    a block that cannot be reached."""
    reachable = _reachable(successors)
    dominators = [
        set(reachable) if block in reachable else set() for block in range(len(successors))
    ]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = {block} | set.intersection(
                *(dominators[p] for p in predecessors[block] & reachable)
            )
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _reachable(successors: list[set[int]]) -> set[int]:
    seen, pending = {0}, [0]
    while pending:
        for block in successors[pending.pop()] - seen:
            seen.add(block)
            pending.append(block)
    return seen


def _reaching(block: int, header: int, predecessors: list[set[int]]) -> set[int]:
    """`block` and all blocks that lead to it without passing `header`."""
    seen, pending = {block, header}, [block] if block != header else []
    while pending:
        for previous in predecessors[pending.pop()] - seen:
            seen.add(previous)
            pending.append(previous)
    return seen


# NVIDIA

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^(\.L[\w.$]*|\$[\w.$]+):")
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
# LD and ST are generic, but triton's code has them for global memory only. An atomic counts as a
# store.
_SASS_GLOBAL: dict[str, Literal["load", "store"]] = {
    **dict.fromkeys(("LDG", "LD", "LDGSTS"), "load"),
    **dict.fromkeys(("STG", "ST", "RED", "REDG", "ATOM", "ATOMG"), "store"),
}
_SASS_BITS = {
    "256": 256,
    "128": 128,
    "64": 64,
    "U16": 16,
    "S16": 16,
    "16": 16,
    "U8": 8,
    "S8": 8,
    "8": 8,
}
_SASS_CLASSES = (
    ("tensor", r"(H|I|D|B|Q|O|F)MMA|(H|I|Q|B)GMMA|UTC\w*MMA"),
    ("fma", r"F(ADD|MUL|FMA)2?|D(ADD|MUL|FMA)|H(ADD|MUL|FMA)2|IMAD|FSWZADD"),
    ("special", r"MUFU"),
    ("conversion", r"F2F|F2I|I2F|I2I|FRND|F2FP|I2FP|F2IP|I2IP"),
    (
        "memory",
        r"LD|ST|LD[GSL]|ST[GSL]|LDGSTS|LDC|LDSM|STSM|SHFL|RED\w*|ATOM\w?|UBLK\w+|UTMA\w+|LDT\w*|STT\w*|MATCH|REDUX|CREDUX",
    ),
    (
        "control",
        r"BAR|BRA|BRX|BRXU|JMP|JMX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|CCTL\w*|SYNCS|ELECT|"
        r"YIELD|NANOSLEEP|KILL|BPT|FENCE|ARRIVES|ACQBULK|PREEXIT|BMOV|VOTE",
    ),
    ("scalar", r"U[A-Z]\w*|R2UR|S2UR|LDCU|VOTEU|CS2UR"),
)


def _read_nvidia(cubin: bytes) -> _Facts:
    usage, text = _disassemble(cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    return _Facts(found["REG"], spills, found["STACK"] + found["LOCAL"], _parse_sass(text))


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


def _parse_sass(text: str) -> list[_Instruction]:
    code: list[_Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels.append(label[1])
        elif match := _SASS_LINE.match(line):
            place, predicate, opcode, operands = match.groups(default="")
            if opcode == "NOP" or _is_padding(opcode, operands, labels):
                continue
            code.append(_sass_instruction(place, predicate, opcode, operands, tuple(labels)))
            labels = []
    return code


def _is_padding(opcode: str, operands: str, labels: list[str]) -> bool:
    """A function ends in a jump to itself, that nothing runs past its end."""
    target = _SASS_TARGET.search(operands)
    return opcode == "BRA" and target is not None and target[1] in labels


def _sass_instruction(
    place: str, predicate: str, opcode: str, operands: str, labels: tuple[str, ...]
) -> _Instruction:
    name = opcode.split(".")[0]
    target = _SASS_TARGET.search(operands) if name in ("BRA", "CALL") else None
    # A jump can be conditional by its predicate or by an operand (BRA.U !UP0, `(.L_x_1)). ptxas
    # also uses CALL for far jumps.
    conditional = (
        bool(predicate) or name == "CALL" or (target is not None and not operands.startswith("`"))
    )
    return _Instruction(
        place=place,
        kind=next((kind for kind, names in _SASS_CLASSES if re.fullmatch(names, name)), "alu"),
        access=_sass_access(name, opcode),
        jumps_to=target[1] if target else None,
        falls_through=conditional
        or name not in ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "JMX"),
        labels=labels,
    )


def _sass_access(name: str, opcode: str) -> Access | None:
    if name not in _SASS_GLOBAL:
        return None
    return _SASS_GLOBAL[name], next(
        (_SASS_BITS[mark] for mark in opcode.split(".")[1:] if mark in _SASS_BITS), 32
    )


# AMD

_AMD_LINE = re.compile(r"^\s+([a-z]\w*_\w+)\b\s*([^;]*)")
_AMD_LABEL = re.compile(r"^(\.?\w+):")
_AMD_ACCESS = re.compile(
    r"(?:global|buffer|flat)_(load|store|atomic)_(?:lds_)?(dwordx\d|dword|[us]?short|[us]?byte)?"
)
_AMD_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "ubyte": 8,
    "sbyte": 8,
    "byte": 8,
}
_AMD_CLASSES = (
    ("tensor", r"v_s?mfma\w+"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+"),
    ("conversion", r"v_cvt_\w+"),
    (
        "fma",
        r"v_(pk_)?(fma|fmac|mac|mad|mul|add|sub|subrev|dot2c?)_(legacy_|mix\w*_)?(f|bf)(16|32|64)\w*|v_div_(fmas|fixup)_\w+",
    ),
    ("memory", r"(global|buffer|flat|scratch|ds|s_load|s_store|s_buffer|tbuffer)_\w+"),
    (
        "control",
        r"s_(branch|cbranch|barrier|waitcnt|nop|endpgm|sleep|setprio|setpc|swappc|sethalt|trap|sendmsg|sched|inst)\w*",
    ),
    ("scalar", r"s_\w+"),
)


def _read_amd(assembly: str) -> _Facts:
    def fact(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    spills = len(re.findall(r"^\s+scratch_(?:load|store)_", assembly, re.MULTILINE))
    return _Facts(
        fact("vgpr_count"), spills, fact("private_segment_fixed_size"), _parse_amd(assembly)
    )


def _parse_amd(assembly: str) -> list[_Instruction]:
    code: list[_Instruction] = []
    labels: list[str] = []
    for line in assembly.splitlines():
        if line.lstrip().startswith((".section", ".amdhsa_kernel")):
            break  # only the kernel's own code precedes it
        if label := _AMD_LABEL.match(line):
            labels.append(label[1])
        elif match := _AMD_LINE.match(line):
            code.append(_amd_instruction(match[1], match[2].strip(), tuple(labels)))
            labels = []
    return code


def _amd_instruction(opcode: str, operands: str, labels: tuple[str, ...]) -> _Instruction:
    is_jump = opcode == "s_branch" or opcode.startswith("s_cbranch")
    return _Instruction(
        place=next(
            (label for label in labels if label.startswith(".LBB")), labels[0] if labels else ""
        ),
        kind=next((kind for kind, names in _AMD_CLASSES if re.fullmatch(names, opcode)), "alu"),
        access=_amd_access(opcode),
        jumps_to=operands if is_jump else None,
        falls_through=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        labels=labels,
    )


def _amd_access(opcode: str) -> Access | None:
    match = _AMD_ACCESS.match(opcode)
    if match is None:
        return None
    return "load" if match[1] == "load" else "store", _AMD_BITS[match[2] or "dword"]
