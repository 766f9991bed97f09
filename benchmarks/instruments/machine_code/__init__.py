"""Static facts of a Triton kernel's machine code, for GPUs that this machine lacks.

Nothing is run and no time is modelled.

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

    code            one instruction, and their kinds
    nvidia, amd     the compiler's output as such instructions
    *_classes       which kind each vendor's instruction is of
    control_flow    loops and blocks
    bodies          figures per element
    occupancy       what a multiprocessor holds
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchmarks.instruments.machine_code import amd, nvidia
from benchmarks.instruments.machine_code.bodies import Body, bodies_of
from benchmarks.instruments.machine_code.code import CLASSES, Access
from benchmarks.instruments.machine_code.occupancy import LIMITS

__all__ = ["CLASSES", "TARGETS", "Access", "Body", "Report", "report"]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


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
    if target not in LIMITS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Kernels cannot be compiled under TRITON_INTERPRET=1.")
    compiled = _compile(
        kernel, signature, constants, aligned, target, {"num_warps": num_warps, **(options or {})}
    )
    if target.startswith("gfx"):
        facts = amd.read(compiled.asm["amdgcn"])
    else:
        facts = nvidia.read(compiled.asm["cubin"])
    limits = LIMITS[target]
    ctas = limits.ctas(facts.registers, compiled.metadata.shared, num_warps)
    per_thread = None
    if elements_per_program is not None:
        per_thread = elements_per_program / (limits.lanes * num_warps)
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
        bodies=bodies_of(facts.code, elem_bytes, per_thread),
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
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(
        ASTSource(kernel, kinds, dict(constants), attributes), target=gpu, options=options
    )
