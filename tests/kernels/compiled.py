"""Compiles a kernel for a GPU that this machine lacks and reads what the machine code does with registers and memory.

Uses triton's compiler and the disassembler that its wheel ships; nothing is run, so nothing here says how fast a kernel is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """Static facts of one compiled kernel."""

    registers: int
    local_bytes: int  # per thread: spills and stack
    widths: frozenset[int]  # bits of its global loads and stores


def compile_for(kernel, signature: dict[str, str], constants: dict, aligned: set[str], target: str, num_warps: int) -> Code:
    """target: sm_80, sm_90, sm_100 or gfx942. `aligned`: arguments that divide by 16, as triton specialises them at a launch."""
    kinds = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    compiled = triton.compile(ASTSource(kernel, kinds, dict(constants), attributes), target=gpu, options={"num_warps": num_warps})
    return _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm["cubin"])


def _nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    local = sum(int(re.search(rf"{kind}:(\d+)", usage).group(1)) for kind in ("STACK", "LOCAL"))
    suffixes = re.findall(r"\b(?:LDG|STG)\.E([.\w]*)", code)
    widths = {next((bits for mark, bits in ((".128", 128), (".64", 64), ("16", 16), ("8", 8)) if mark in s), 32) for s in suffixes}
    return Code(int(re.search(r"REG:(\d+)", usage).group(1)), local, frozenset(widths))


def _amd(assembly: str) -> Code:
    def fact(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))

    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8}
    kinds = re.findall(r"(?:global|buffer|flat)_(?:load|store)_(dwordx\d|dword|u?short|u?byte)", assembly)
    spilled = fact("private_segment_fixed_size") + fact("vgpr_spill_count") + fact("sgpr_spill_count")
    return Code(fact("vgpr_count"), spilled, frozenset(bits[k] for k in kinds))
