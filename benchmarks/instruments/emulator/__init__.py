"""Follows compiled GPU code on the CPU: the PTX that Triton emitted, thread by thread in numpy,
with checks that a GPU does not make.

    program = parse(compiled.asm["ptx"])
    findings = emulate(program, grid=(3,), arguments=[x, y, 1024], num_warps=4, shared_bytes=512)
    assert findings.clean, findings

Arguments are those of the PTX: tensors in CPU memory, which the code reads and writes in place, and
numbers.

Reported, each in a list with one line per instruction (its first occurrence):

    out_of_bounds   global accesses that lie in no argument; a view with gaps (`x[:, :-1]`) is its
                    rows, not what lies between them
    misaligned      vector accesses at an address that their size does not divide
    races           two warps touch a byte, one of them writes another value to it, and no barrier
                    lies between; or two programs do
    undefined       a register that was never written is read; one that another path wrote, or what
                    was computed or shuffled from it, is stored, used as an address or decides where
                    a thread goes; shared memory is read that was not written; a shuffle reads a
                    thread that is not there; a barrier that some threads of the program miss

Instructions are followed in an order that a GPU may choose but does not have to: programs one after
another, all threads of a program together, those that went apart join at the lowest instruction.
Approximate instructions (ex2.approx, div.full) give numpy's float32 result, so their error on
hardware is not seen here. An instruction that is not known stops the emulation with its name:
atomics, asynchronous copies and matrix instructions are not known, since no kernel of this package
has them.

    findings    what was found
    memory      bytes, who touched them, and what conflicts
    registers   what threads hold, and which of them wrote it
    threads     the threads of one program; one instruction in some of them
    scheduler   which threads go next
    operations  what each instruction does: arithmetic, transfers
    values      bits as numbers of a PTX type
    functions   numpy's functions by PTX's names
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import torch

from benchmarks.instruments.emulator.findings import Findings
from benchmarks.instruments.emulator.memory import GlobalMemory
from benchmarks.instruments.emulator.scheduler import Scheduler
from benchmarks.instruments.emulator.threads import Launch, Threads
from benchmarks.instruments.ptx import Program

__all__ = ["Findings", "emulate"]


def emulate(
    program: Program,
    grid: tuple[int, ...],
    arguments: Sequence[torch.Tensor | int | float | None],
    num_warps: int,
    shared_bytes: int = 0,
    programs: Collection[int] | None = None,
) -> Findings:
    """Runs the programs of a launch.

    Args:
        programs: only these, counted along the first axis first; of a large launch some may be
            enough. None: all.
        arguments: in the order of the PTX parameters; parameters beyond them (Triton's scratch
            space) are null pointers. A float is passed as float32.

    Raises:
        NotImplementedError: an instruction or operand that is not known.
        TimeoutError: a program does not end.
    """
    findings = Findings()
    memory = GlobalMemory([a for a in arguments if isinstance(a, torch.Tensor)])
    values = [_bits_of(argument) for argument in arguments]
    values += [0] * (len(program.parameters) - len(values))
    shape = (*grid, *(1,) * (3 - len(grid)))
    launch = Launch(
        program=program,
        grid=shape,
        num_warps=num_warps,
        parameters=dict(zip(program.parameters, values, strict=True)),
        memory=memory,
        shared_bytes=shared_bytes,
        findings=findings,
    )
    places = itertools.product(*(range(n) for n in reversed(shape)))
    for number, place in enumerate(places):
        if programs is None or number in programs:
            Scheduler(Threads(launch, number, place[::-1])).run()
    memory.write_back()
    return findings


def _bits_of(argument: torch.Tensor | int | float | None) -> int:
    if argument is None:
        return 0
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.uint32))
    return int(argument)
