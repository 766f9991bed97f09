"""The threads of one program of a launch, and one instruction in some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.instruments.emulator.findings import Findings
from benchmarks.instruments.emulator.memory import SHARED_BASE, GlobalMemory, SharedMemory
from benchmarks.instruments.emulator.registers import Mask, Registers
from benchmarks.instruments.emulator.values import decode, width_of
from benchmarks.instruments.ptx import Instruction, Program

WARP = 32


@dataclass(frozen=True)
class Launch:
    """What the programs of a launch have in common."""

    program: Program
    grid: tuple[int, ...]  # three numbers
    num_warps: int
    parameters: Mapping[str, int]  # bits of each
    memory: GlobalMemory
    shared_bytes: int
    findings: Findings


class Threads:
    """All threads of one program: who they are and what they hold.

    Args:
        number: of the program within the launch, counted along the first axis first.
        place: its three coordinates in the grid.
    """

    def __init__(self, launch: Launch, number: int, place: tuple[int, ...]) -> None:
        self.launch, self.number = launch, number
        self.count = launch.num_warps * WARP
        self.lane = np.arange(self.count) % WARP
        self.warp = np.arange(self.count) // WARP
        self.shared = SharedMemory(launch.shared_bytes)
        # of accesses between two barriers; never that of another program
        self.interval = number << 24
        special: dict[str, int | np.ndarray] = {
            "%tid.x": np.arange(self.count),
            "%laneid": self.lane,
            "%warpid": self.warp,
            "%ntid.x": self.count,
            "global_smem": SHARED_BASE,
            **{f"%ctaid.{axis}": place[i] for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": launch.grid[i] for i, axis in enumerate("xyz")},
        }
        self.registers = Registers(self.count, launch.program.widths, special, launch.findings)

    def pass_barrier(self) -> None:
        """What was accessed before is settled."""
        self.interval += 1


@dataclass(frozen=True)
class Step:
    """One instruction in the threads that take part in it."""

    threads: Threads
    instruction: Instruction
    mask: Mask

    @property
    def kind(self) -> str:
        """The type of its result, the last one that it names."""
        return self.instruction.types[-1]

    def name(self, place: int) -> str:
        """The text of operand `place`, which is no vector."""
        return self.instruction.operands[place][0]

    def bits(self, operand: str, width: int) -> np.ndarray:
        """An operand's bits in all threads, (threads,)."""
        return self.threads.registers.bits(operand, width, self.mask)

    def read(self, place: int, kind: str | None = None, mask: Mask | None = None) -> np.ndarray:
        """Operand `place` as numbers of type `kind` (`self.kind`), which the threads of `mask`
        (all that take part) use."""
        kind = kind or self.kind
        mask = self.mask if mask is None else mask
        return decode(self.threads.registers.bits(self.name(place), width_of(kind), mask), kind)

    def write(self, value: np.ndarray, kind: str | None = None) -> None:
        """Numbers of type `kind` (`self.kind`) to the first operand."""
        self.write_to(self.name(0), value, kind or self.kind)

    def write_to(self, register: str, value: np.ndarray, kind: str) -> None:
        self.threads.registers.write(register, value, kind, self.mask)

    def must_be_written(self) -> None:
        """What was read so far takes effect outside of registers."""
        self.threads.registers.must_be_written(self.instruction, self.mask)

    def guard(self) -> Mask:
        """Threads in which the instruction's guard holds."""
        assert self.instruction.guard is not None
        self.threads.registers.begin()
        value = self.bits(self.instruction.guard, 1)
        self.must_be_written()
        return ~value if self.instruction.guard_negated else value

    def find(self, kind: str, message: str) -> None:
        """Reports a finding of this instruction."""
        self.threads.launch.findings.add(kind, f"{message}: {self.instruction.text}")

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(
            f"The emulator does not know the instruction {self.instruction.text!r}."
        )
