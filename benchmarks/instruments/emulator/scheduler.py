"""Which threads of a program go next, and which instruction they follow."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.emulator.operations import execute
from benchmarks.instruments.emulator.registers import Mask
from benchmarks.instruments.emulator.threads import Step, Threads
from benchmarks.instruments.ptx import Instruction

MOST_STEPS = 5_000_000
"""Instructions of one program after which it is taken to run forever."""


class Scheduler:
    """Runs the threads of one program, those at the same instruction together."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._program = threads.launch.program
        # threads that are together, and their next instruction
        self._groups = [(0, np.ones(threads.count, bool))]
        self._waiting: list[tuple[int, Mask]] = []  # at a barrier
        self._steps = 0

    def run(self) -> None:
        """From the first instruction until all threads have returned.

        Raises:
            NotImplementedError: an instruction or operand that is not known.
            TimeoutError: the program does not end.
        """
        with np.errstate(all="ignore"):
            while self._groups or self._waiting:
                if not self._groups:
                    self._pass_barrier()
                self._follow(*self._next_group())

    def _pass_barrier(self) -> None:
        """All threads that still run wait; those that returned have missed it."""
        arrived = np.logical_or.reduce([mask for _, mask in self._waiting])
        missing = self._threads.count - int(arrived.sum())
        if missing:
            self._threads.launch.findings.add(
                "undefined", f"a barrier that {missing} threads of the program miss"
            )
        self._threads.pass_barrier()
        self._groups, self._waiting = self._waiting, []

    def _next_group(self) -> tuple[int, Mask]:
        """Takes out the threads at the lowest instruction, so that those which went apart meet
        again where their paths do."""
        at = min(start for start, _ in self._groups)
        mask = np.logical_or.reduce([m for start, m in self._groups if start == at])
        self._groups = [group for group in self._groups if group[0] != at]
        return at, mask

    def _follow(self, at: int, mask: Mask) -> None:
        """Lets a group go until it has returned, parts, waits or meets the next one."""
        end = len(self._program.instructions)
        meeting = min((start for start, _ in self._groups), default=None)
        while mask.any() and at != meeting and at < end:
            self._count()
            instruction = self._program.instructions[at]
            taken = mask
            if instruction.guard is not None:
                taken = mask & Step(self._threads, instruction, mask).guard()
            at += 1
            if instruction.opcode == "bra":
                if taken.any():
                    target = self._program.labels[instruction.operands[0][0]]
                    self._groups.append((target, taken))
                    mask = mask & ~taken
                    break
            elif instruction.opcode in ("ret", "exit"):
                mask = mask & ~taken
            elif _is_barrier(instruction):
                self._waiting.append((at, taken))
                mask = mask & ~taken
                break
            elif taken.any():
                execute(Step(self._threads, instruction, taken))
        if mask.any() and at < end:
            self._groups.append((at, mask))

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise TimeoutError(f"A program still runs after {MOST_STEPS} instructions.")


def _is_barrier(instruction: Instruction) -> bool:
    """Whether all threads of the program wait for each other, not those of a warp alone."""
    return instruction.opcode in ("bar", "barrier") and "warp" not in instruction.modifiers
