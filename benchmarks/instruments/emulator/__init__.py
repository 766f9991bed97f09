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
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.instruments.ptx import Instruction, Program

Mask = np.ndarray
"""Which threads of the program take part, (threads,) bool."""

_SHARED_BASE = 1 << 24
_WARP = 32
_MOST_STEPS = 5_000_000
"""Instructions of one program after which it is taken to run forever."""

_UNSIGNED: dict[int, type] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass
class Findings:
    """What was found, in words. See the module's docstring."""

    out_of_bounds: list[str] = field(default_factory=list)
    misaligned: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.out_of_bounds or self.misaligned or self.races or self.undefined)

    def add(self, kind: str, message: str) -> None:
        found = getattr(self, kind)
        if message not in found:
            found.append(message)


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
    memory = _GlobalMemory([a for a in arguments if isinstance(a, torch.Tensor)])
    values = [_bits_of(argument) for argument in arguments]
    values += [0] * (len(program.parameters) - len(values))
    shape = (*grid, *(1,) * (3 - len(grid)))
    for number, place in enumerate(itertools.product(*(range(n) for n in reversed(shape)))):
        if programs is None or number in programs:
            _Threads(
                program,
                num_warps,
                place[::-1],
                shape,
                values,
                memory,
                number,
                shared_bytes,
                findings,
            ).run()
    memory.write_back()
    return findings


def _bits_of(argument: torch.Tensor | int | float | None) -> int:
    if argument is None:
        return 0
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return (
        int(np.float32(argument).view(np.uint32)) if isinstance(argument, float) else int(argument)
    )


# Memory


class _Memory:
    """Bytes with, for each, who last wrote and read it: interval between barriers * 256 + warp, or
    255 for several warps. -1: nobody."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.bytes = np.zeros(size, np.uint8)
        self._writers = np.full(size, -1, np.int64)
        self._readers = np.full(size, -1, np.int64)

    def track(
        self, places: np.ndarray, warps: np.ndarray, interval: int, changed: np.ndarray | None
    ) -> str | None:
        """Notes an access to `places` (threads, n) by `warps` (threads,); says what conflicts.
        `changed`: None for a read, else which bytes get another value, for storing a value that is
        there already is no conflict."""
        warp = warps[:, None]
        writers, readers = self._writers[places], self._readers[places]
        conflict = (writers >> 8 == interval) & (writers & 255 != warp)
        if changed is None:
            other = (readers >> 8 == interval) & (readers & 255 != warp)
            mine = interval << 8 | np.where(other, 255, warp)
            self._readers[places] = mine
            shared = self._readers[places] != mine  # by several warps in this very instruction
            self._readers[places[shared]] = interval << 8 | 255
            return (
                f"{self.name} memory: reads what another warp wrote since the last barrier"
                if conflict.any()
                else None
            )
        self._writers[places] = interval << 8 | warp
        if (conflict & changed).any():
            return f"{self.name} memory: writes what another warp wrote since the last barrier"
        if ((readers >> 8 == interval) & (readers & 255 != warp) & changed).any():
            return f"{self.name} memory: writes what another warp read since the last barrier"
        return None


class _GlobalMemory(_Memory):
    """The tensors of a launch at their real addresses, as a list of runs of bytes without gaps."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        runs = _merged(sorted(run for tensor in tensors for run in _runs(tensor)))
        self._starts = np.array([start for start, _ in runs], np.int64)
        self._ends = np.array([end for _, end in runs], np.int64)
        sizes = self._ends - self._starts
        self._offsets = np.cumsum(sizes) - sizes
        super().__init__("global", int(sizes.sum()))
        for start, offset, size in zip(self._starts, self._offsets, sizes, strict=True):
            self.bytes[offset : offset + size] = _at(int(start), int(size))
        self._writing_program = np.full(len(self.bytes), -1, np.int32)
        self._reading_program = np.full(len(self.bytes), -1, np.int32)  # -2: several

    def write_back(self) -> None:
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            target, source = (
                _at(int(start), int(end - start)),
                self.bytes[offset : offset + end - start],
            )
            if not np.array_equal(target, source):
                target[:] = source

    def locate(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the accesses lie in one run, and where in `bytes` those do."""
        if not len(self._starts):
            return np.zeros(len(addresses), bool), np.empty(0, np.int64)
        run = np.maximum(np.searchsorted(self._starts, addresses, side="right") - 1, 0)
        inside = (addresses >= self._starts[run]) & (addresses + size <= self._ends[run])
        return inside, (addresses - self._starts[run] + self._offsets[run])[inside]

    def distance(self, address: int) -> int:
        """Bytes from the end of the nearest run that starts before."""
        return min(
            (
                address - int(end)
                for start, end in zip(self._starts, self._ends, strict=True)
                if start <= address
            ),
            default=0,
            key=abs,
        )

    def between_programs(
        self, places: np.ndarray, program: int, changed: np.ndarray | None
    ) -> str | None:
        writers, readers = self._writing_program[places], self._reading_program[places]
        foreign = (writers >= 0) & (writers != program)
        if changed is None:
            self._reading_program[places] = np.where(
                (readers == -1) | (readers == program), program, -2
            )
            return (
                "global memory: reads what another program of the launch wrote"
                if foreign.any()
                else None
            )
        self._writing_program[places] = program
        if (foreign & changed).any():
            return "global memory: writes what another program of the launch wrote"
        if ((readers != -1) & (readers != program) & changed).any():
            return "global memory: writes what another program of the launch read"
        return None


def _runs(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Address ranges that the elements of a tensor fill, outer dimensions one by one where their
    rows leave gaps."""
    if not tensor.numel():
        return []
    if tensor.is_contiguous():
        return [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())]
    return [run for part in tensor.unbind(0) for run in _runs(part)]


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with those that overlap made one; those that only touch stay apart."""
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


# Values


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 -> bits, rounded to nearest even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _without_subnormals(value: np.ndarray) -> np.ndarray:
    return np.where(
        np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value
    )


def _halves(bits: np.ndarray) -> np.ndarray:
    """(threads,) of 2n bits -> (2, threads) of n bits, low half first."""
    size = bits.dtype.itemsize * 4
    low = bits & bits.dtype.type((1 << size) - 1)
    return np.stack([low, bits >> bits.dtype.type(size)]).astype(_UNSIGNED[size])


def _joined(parts: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The parts' bits side by side in one number per thread, the first lowest."""
    size = parts[0].dtype.itemsize * 8
    kind = _UNSIGNED[size * len(parts)]
    total: np.ndarray = np.zeros(parts[0].shape, kind)
    for i, part in enumerate(parts):
        total |= part.astype(kind) << kind(i * size)
    return total


def _width(kind: str) -> int:
    """Bits of a type."""
    if kind == "pred":
        return 1
    return {"bf16": 16, "bf16x2": 32, "f16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])


def _decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits as numbers: bf16 as float32, packed types as (2, threads)."""
    if kind == "pred":
        return bits
    if kind == "bf16":
        return _from_bfloat16(bits)
    if kind == "bf16x2":
        return _from_bfloat16(_halves(bits))
    if kind == "f16x2":
        return _halves(bits).view(np.float16)
    if kind == "f32x2":
        return _halves(bits).view(np.float32)
    return bits.view({"f": _FLOAT, "s": _SIGNED}.get(kind[0], _UNSIGNED)[_width(kind)])


def _encode(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `_decode`."""
    if kind == "pred":
        return np.asarray(value, bool)
    if kind == "bf16":
        return _bfloat16(value)
    if kind == "bf16x2":
        return _joined(_bfloat16(value))
    if kind in ("f16x2", "f32x2"):
        half = _FLOAT[_width(kind) // 2]
        return _joined(np.ascontiguousarray(value, half).view(_UNSIGNED[_width(kind) // 2]))
    target = {"f": _FLOAT, "s": _SIGNED}.get(kind[0], _UNSIGNED)[_width(kind)]
    return np.ascontiguousarray(value).astype(target, copy=False).view(_UNSIGNED[_width(kind)])


# One program


class _Threads:
    """All threads of one program of the launch, in lockstep."""

    def __init__(
        self,
        program: Program,
        num_warps: int,
        place: tuple[int, ...],
        grid: tuple[int, ...],
        parameters: Sequence[int],
        memory: _GlobalMemory,
        number: int,
        shared_bytes: int,
        findings: Findings,
    ) -> None:
        self._program, self._memory, self._number, self._findings = (
            program,
            memory,
            number,
            findings,
        )
        self._count = num_warps * _WARP
        self._lane = np.arange(self._count) % _WARP
        self._warp = np.arange(self._count) // _WARP
        self._parameters = dict(zip(program.parameters, parameters, strict=True))
        self._shared = _Memory("shared", max(shared_bytes, 16))
        self._shared_written = np.zeros(len(self._shared.bytes), bool)
        self._registers: dict[str, np.ndarray] = {}
        # threads in which a register was written, from what was written itself
        self._written: dict[str, Mask] = {}
        # threads in which the instruction at hand has read what was not
        self._unwritten: Mask = np.zeros(self._count, bool)
        # of accesses between two barriers; never that of another program
        self._interval = number << 24
        self._special = {
            "%tid.x": np.arange(self._count),
            "%laneid": self._lane,
            "%warpid": self._warp,
            "%ntid.x": self._count,
            "global_smem": _SHARED_BASE,
            **{f"%ctaid.{axis}": place[i] for i, axis in enumerate("xyz")},
            **{f"%nctaid.{axis}": grid[i] for i, axis in enumerate("xyz")},
        }

    def run(self) -> None:
        """From the first instruction until all threads have returned."""
        # threads that are together, and their next instruction
        groups = [(0, np.ones(self._count, bool))]
        waiting: list[tuple[int, Mask]] = []
        steps = 0
        with np.errstate(all="ignore"):
            while groups or waiting:
                if not groups:
                    missing = self._count - int(
                        np.logical_or.reduce([mask for _, mask in waiting]).sum()
                    )
                    if missing:
                        self._findings.add(
                            "undefined", f"a barrier that {missing} threads of the program miss"
                        )
                    self._interval += 1
                    groups, waiting = waiting, []
                at, mask = self._next_group(groups)
                meeting = min((start for start, _ in groups), default=None)
                while mask.any() and at != meeting and at < len(self._program.instructions):
                    steps += 1
                    if steps > _MOST_STEPS:
                        raise TimeoutError(
                            f"A program still runs after {_MOST_STEPS} instructions."
                        )
                    instruction = self._program.instructions[at]
                    taken = (
                        mask if instruction.guard is None else mask & self._guard(instruction, mask)
                    )
                    at += 1
                    if instruction.opcode == "bra":
                        target = self._program.labels[instruction.operands[0][0]]
                        if taken.any():
                            groups.append((target, taken))
                            mask = mask & ~taken
                            break
                    elif instruction.opcode in ("ret", "exit"):
                        mask = mask & ~taken
                    elif (
                        instruction.opcode in ("bar", "barrier")
                        and "warp" not in instruction.modifiers
                    ):
                        waiting.append((at, taken))
                        mask = mask & ~taken
                        break
                    elif taken.any():
                        self._execute(instruction, taken)
                if mask.any() and at < len(self._program.instructions):
                    groups.append((at, mask))

    @staticmethod
    def _next_group(groups: list[tuple[int, Mask]]) -> tuple[int, Mask]:
        """Takes out the threads at the lowest instruction, so that those which went apart meet
        again where their paths do."""
        at = min(start for start, _ in groups)
        mask = np.logical_or.reduce([m for start, m in groups if start == at])
        groups[:] = [group for group in groups if group[0] != at]
        return at, mask

    def _guard(self, instruction: Instruction, mask: Mask) -> Mask:
        assert instruction.guard is not None
        self._unwritten[:] = False
        value = self._bits(instruction.guard, 1, mask)
        self._must_be_written(instruction, mask)
        return ~value if instruction.guard_negated else value

    def _execute(self, instruction: Instruction, mask: Mask) -> None:
        name = instruction.opcode
        if name in _NOTHING_TO_DO or (name == "bar" and "warp" in instruction.modifiers):
            return
        if name not in _OPERATIONS:
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        self._unwritten[:] = False
        _OPERATIONS[name](self, instruction, mask)

    # Registers

    def _bits(self, operand: str, width: int, mask: Mask) -> np.ndarray:
        """An operand's bits in all threads. Which of those in `mask` were not written is noted:
        triton before 3.7 lets threads that take no part in a reduction shuffle such registers, and
        drops the result."""
        if operand.startswith("!"):
            return ~self._bits(operand[1:], width, mask)
        if operand in self._program.widths:
            if operand not in self._registers:
                self._findings.add("undefined", f"register {operand} is read and was never written")
                return np.zeros(self._count, bool if width == 1 else _UNSIGNED[width])
            self._unwritten |= mask & ~self._written[operand]
            value = self._registers[operand]
            return value if width == 1 else value.astype(_UNSIGNED[width], copy=False)
        if operand in self._special:
            return np.broadcast_to(np.asarray(self._special[operand]), self._count).astype(
                _UNSIGNED[width]
            )
        if float_bits := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
            return np.full(self._count, int(float_bits[1], 16), _UNSIGNED[width])
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            return np.full(
                self._count,
                bool(number) if width == 1 else number & ((1 << width) - 1),
                bool if width == 1 else _UNSIGNED[width],
            )
        raise NotImplementedError(f"The emulator does not know the operand {operand!r}.")

    def read(
        self, instruction: Instruction, place: int, mask: Mask, kind: str | None = None
    ) -> np.ndarray:
        """Operand `place` as numbers of type `kind` (the instruction's last type)."""
        kind = kind or instruction.types[-1]
        return _decode(self._bits(instruction.operands[place][0], _width(kind), mask), kind)

    def write(self, register: str, value: np.ndarray, kind: str, mask: Mask) -> None:
        """Stores numbers of type `kind`, extended to the register's width as PTX does: signed ones
        with their sign."""
        if register == "_":
            return
        bits = _encode(value, kind)
        width = self._program.widths[register]
        if kind != "pred" and width != bits.dtype.itemsize * 8:
            bits = (
                bits.view(_SIGNED[bits.dtype.itemsize * 8])
                .astype(_SIGNED[width])
                .view(_UNSIGNED[width])
                if kind[0] == "s"
                else bits.astype(_UNSIGNED[width])
            )
        old = self._registers.get(register)
        self._registers[register] = np.where(
            mask, bits, np.zeros_like(bits) if old is None else old
        )
        written = self._written.get(register)
        kept = np.zeros_like(mask) if written is None else written & ~mask
        self._written[register] = kept | (mask & ~self._unwritten)

    def _must_be_written(self, instruction: Instruction, mask: Mask) -> None:
        """What the instruction has read so far takes effect outside of registers."""
        if (self._unwritten & mask).any():
            self._findings.add(
                "undefined",
                f"a register is used in threads that did not write it: {instruction.text}",
            )

    # Memory

    def load(self, instruction: Instruction, mask: Mask) -> None:
        names, width = instruction.operands[0], _width(instruction.types[-1])
        # a signed number keeps its sign in a wider register
        kind = f"{'s' if instruction.types[-1][0] == 's' else 'b'}{width}"
        if "param" in instruction.modifiers:
            value = self._parameters[instruction.operands[1][0].strip("[] ")] & ((1 << width) - 1)
            self.write(
                names[0], _decode(np.full(self._count, value, _UNSIGNED[width]), kind), kind, mask
            )
            return
        read = np.zeros((self._count, width // 8 * len(names)), np.uint8)
        memory, threads, places = self._reach(
            instruction, instruction.operands[1][0], read.shape[1], mask
        )
        self._track(instruction, memory, threads, places, None)
        read[threads] = memory.bytes[places]
        if memory is self._shared and not self._shared_written[places].all():
            self._findings.add(
                "undefined", f"shared memory is read and was not written: {instruction.text}"
            )
        columns: np.ndarray = read.view(_UNSIGNED[width])
        for i, name in enumerate(names):
            self.write(name, _decode(np.ascontiguousarray(columns[:, i]), kind), kind, mask)

    def store(self, instruction: Instruction, mask: Mask) -> None:
        width = _width(instruction.types[-1])
        parts = [self._bits(name, width, mask) for name in instruction.operands[1]]
        self._must_be_written(instruction, mask)
        data = np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint8)
        memory, threads, places = self._reach(
            instruction, instruction.operands[0][0], data.shape[1], mask
        )
        self._track(instruction, memory, threads, places, memory.bytes[places] != data[threads])
        memory.bytes[places] = data[threads]
        if (memory.bytes[places] != data[threads]).any():
            self._findings.add(
                "races",
                f"{memory.name} memory: threads write different values to a byte at once:"
                f" {instruction.text}",
            )
        if memory is self._shared:
            self._shared_written[places] = True

    def load_matrix(self, instruction: Instruction, mask: Mask) -> None:
        """ldmatrix of 8 x 8 matrices of 16 bits: of the i-th, thread 4r + c gets elements 2c and 2c
        + 1 of row r in its i-th register, and thread 8i + r holds that row's address."""
        registers = instruction.operands[0]
        self._knows_matrix(instruction, mask)
        rows = np.zeros((self._count, 16), np.uint8)
        memory, threads, places = self._reach(
            instruction, instruction.operands[1][0], 16, self._lane < 8 * len(registers)
        )
        self._track(instruction, memory, threads, places, None)
        rows[threads] = memory.bytes[places]
        if not self._shared_written[places].all():
            self._findings.add(
                "undefined", f"shared memory is read and was not written: {instruction.text}"
            )
        words = rows.view(np.uint32)
        for i, register in enumerate(registers):
            self.write(
                register,
                words[self._warp * _WARP + 8 * i + self._lane // 4, self._lane % 4],
                "b32",
                mask,
            )

    def store_matrix(self, instruction: Instruction, mask: Mask) -> None:
        """stmatrix, the inverse of `load_matrix`."""
        registers = instruction.operands[1]
        self._knows_matrix(instruction, mask)
        words = np.zeros((self._count, 4), np.uint32)
        for i, register in enumerate(registers):
            words[self._warp * _WARP + 8 * i + self._lane // 4, self._lane % 4] = self._bits(
                register, 32, mask
            )
        data = words.view(np.uint8)
        memory, threads, places = self._reach(
            instruction, instruction.operands[0][0], 16, self._lane < 8 * len(registers)
        )
        self._track(instruction, memory, threads, places, memory.bytes[places] != data[threads])
        memory.bytes[places] = data[threads]
        self._shared_written[places] = True

    def _knows_matrix(self, instruction: Instruction, mask: Mask) -> None:
        if (
            instruction.modifier("x1", "x2", "x4") is None
            or "trans" in instruction.modifiers
            or not mask.all()
        ):
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )

    def _reach(
        self, instruction: Instruction, operand: str, size: int, mask: Mask
    ) -> tuple[_Memory, np.ndarray, np.ndarray]:
        """The memory, the threads whose access is good, and the bytes that they touch (threads,
        size)."""
        base, sign, offset = re.fullmatch(
            r"\[\s*([^\s+\]]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", operand
        ).groups()  # type: ignore[union-attr]
        addresses = self._bits(base, 64, mask).astype(np.int64)
        self._must_be_written(instruction, mask)
        if offset:
            addresses = addresses + int(offset, 0) * (-1 if sign == "-" else 1)
        threads = np.flatnonzero(mask)
        addresses = addresses[threads]
        if (addresses % size).any():
            self._findings.add(
                "misaligned",
                f"{size}-byte access at an address that is {int((addresses % size).max())} mod"
                f" {size}: {instruction.text}",
            )
        memory: _Memory
        if instruction.modifier("shared", "shared::cta") is not None:
            memory, places = self._shared, addresses - _SHARED_BASE
            inside = (places >= 0) & (places + size <= len(memory.bytes))
            places = places[inside]
        else:
            memory = self._memory
            inside, places = self._memory.locate(addresses, size)
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            far = (
                self._memory.distance(int(addresses[first]))
                if memory is self._memory
                else int(addresses[first]) - _SHARED_BASE
            )
            self._findings.add(
                "out_of_bounds",
                f"{memory.name} memory, {int((~inside).sum())} threads of program {self._number},"
                f" thread {threads[first]} at {far:+d} bytes from the end of the nearest argument:"
                f" {instruction.text}",
            )
        return memory, threads[inside], places[:, None] + np.arange(size)

    def _track(
        self,
        instruction: Instruction,
        memory: _Memory,
        threads: np.ndarray,
        places: np.ndarray,
        changed: np.ndarray | None,
    ) -> None:
        conflict = memory.track(places, self._warp[threads], self._interval, changed)
        if memory is self._memory:
            conflict = self._memory.between_programs(places, self._number, changed) or conflict
        if conflict:
            self._findings.add("races", f"{conflict}: {instruction.text}")

    # Between threads

    def shuffle(self, instruction: Instruction, mask: Mask) -> None:
        """shfl.sync d, value, b, c: reads another thread of the warp."""
        b, c = (self._bits(instruction.operands[i][0], 32, mask).astype(np.int64) for i in (2, 3))
        self._must_be_written(instruction, mask)
        value = self._bits(instruction.operands[1][0], 32, mask)
        segment, clamp = c >> 8 & 31, c & 31
        low = self._lane & segment
        high = low | (clamp & ~segment)
        mode = instruction.modifier("bfly", "down", "up", "idx")
        source = {
            "bfly": self._lane ^ b,
            "down": self._lane + b,
            "up": self._lane - b,
            "idx": low | (b & ~segment),
        }[mode or ""]
        inside = np.asarray(source >= high if mode == "up" else source <= high)
        source = np.where(inside, source, self._lane) + self._warp * _WARP
        if (~mask[source[mask]]).any():
            self._findings.add(
                "undefined",
                f"a shuffle reads a thread that takes no part in it: {instruction.text}",
            )
        target, _, flag = instruction.operands[0][0].partition("|")
        if flag:
            self.write(flag, inside, "pred", mask)
        self._unwritten = self._unwritten[source]
        self.write(target, value[source], "b32", mask)

    def reduce_warp(self, instruction: Instruction, mask: Mask) -> None:
        """redux.sync: every thread of a warp gets the reduction over the warp."""
        warps = mask.reshape(-1, _WARP)
        if (warps.any(1) & ~warps.all(1)).any():
            self._findings.add(
                "undefined",
                f"a reduction over a warp that not all of its threads reach: {instruction.text}",
            )
        value = self.read(instruction, 1, mask).reshape(-1, _WARP)
        self._unwritten = self._unwritten.reshape(-1, _WARP).any(1).repeat(_WARP)
        name = instruction.modifier(*_REDUCTIONS)
        if name is None:
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        self.write(
            instruction.operands[0][0],
            np.repeat(_REDUCTIONS[name](value), _WARP).astype(value.dtype),
            instruction.types[-1],
            mask,
        )

    # Arithmetic

    def arithmetic(self, instruction: Instruction, mask: Mask) -> None:
        """One or several operands of one type to a result of the same type, with or without
        flushing of subnormal numbers."""
        kind = instruction.types[-1]
        if (
            len(instruction.types) == 2
            and instruction.types[0] == "f32"
            and kind in ("bf16", "f16")
        ):
            self._mixed(instruction, mask)
            return
        if len(instruction.types) != 1 or "sat" in instruction.modifiers:
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        operands = [self.read(instruction, i, mask) for i in range(1, len(instruction.operands))]
        flush = _without_subnormals if "ftz" in instruction.modifiers else np.asarray
        floats = kind[0] == "f" or kind.startswith("bf")
        if floats:
            operands = [flush(operand) for operand in operands]
        function = (_FLOAT_FUNCTIONS if floats else _INTEGER_FUNCTIONS)[instruction.opcode]
        # numpy would take one too many for its output
        if isinstance(function, np.ufunc) and function.nin != len(operands):
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        result = function(*operands)
        self.write(instruction.operands[0][0], flush(result) if floats else result, kind, mask)

    def _mixed(self, instruction: Instruction, mask: Mask) -> None:
        """add, sub, fma of sm_100: half-precision operands, a float32 last one and result."""
        *narrow, last = range(1, len(instruction.operands))
        operands = [self.read(instruction, i, mask).astype(np.float32) for i in narrow] + [
            self.read(instruction, last, mask, "f32")
        ]
        self.write(
            instruction.operands[0][0], _FLOAT_FUNCTIONS[instruction.opcode](*operands), "f32", mask
        )

    def multiply(self, instruction: Instruction, mask: Mask) -> None:
        """mul and mad; of integers the low half of the product, or the whole of it (wide)."""
        kind = instruction.types[-1]
        if "hi" in instruction.modifiers:
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        if "wide" not in instruction.modifiers:
            self.arithmetic(instruction, mask)
            return
        wide = f"{kind[0]}{2 * _width(kind)}"
        number = {"s": _SIGNED, "u": _UNSIGNED}[kind[0]][2 * _width(kind)]
        result: np.ndarray = self.read(instruction, 1, mask).astype(number) * self.read(
            instruction, 2, mask
        ).astype(number)
        if instruction.opcode == "mad":
            result = result + self.read(instruction, 3, mask, wide)
        self.write(instruction.operands[0][0], result, wide, mask)

    def shift(self, instruction: Instruction, mask: Mask) -> None:
        """shl and shr; shifts by the width or more clear the number, or fill it with its sign."""
        kind = instruction.types[-1]
        value, width = self.read(instruction, 1, mask), _width(kind)
        distance = self._bits(instruction.operands[2][0], 32, mask).astype(np.int64)
        short = np.minimum(distance, width - 1).astype(value.dtype)
        result = value << short if instruction.opcode == "shl" else value >> short
        clears = (distance >= width) & ((instruction.opcode == "shl") | (kind[0] != "s"))
        self.write(
            instruction.operands[0][0], np.where(clears, 0, result).astype(value.dtype), kind, mask
        )

    def extract(self, instruction: Instruction, mask: Mask) -> None:
        """bfe.u32: `length` bits from `start` on."""
        if instruction.types[-1] != "u32":
            raise NotImplementedError(
                f"The emulator does not know the instruction {instruction.text!r}."
            )
        value, start, length = (
            self._bits(instruction.operands[i][0], 32, mask).astype(np.uint64) for i in (1, 2, 3)
        )
        result = value >> (start & np.uint64(255)) & (
            (np.uint64(1) << (length & np.uint64(255))) - np.uint64(1)
        )
        self.write(instruction.operands[0][0], result.astype(np.uint32), "u32", mask)

    def compare(self, instruction: Instruction, mask: Mask) -> None:
        """setp, with or without a second predicate that gets the opposite."""
        name = instruction.modifiers[0]
        a, b = self.read(instruction, 1, mask), self.read(instruction, 2, mask)
        if np.issubdtype(a.dtype, np.floating):
            ordered = ~(np.isnan(a) | np.isnan(b))
            if name in ("num", "nan"):
                result = ordered if name == "num" else ~ordered
            elif len(name) == 3:  # ltu and the like hold for NaN too
                result = _COMPARISONS[name[:2]](a, b) | ~ordered
            else:
                result = _COMPARISONS[name](a, b) & ordered
        else:
            result = _COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)](
                a, b
            )
        if combine := instruction.modifier("and", "or", "xor"):
            result = _INTEGER_FUNCTIONS[combine](result, self.read(instruction, 3, mask, "pred"))
        target, _, opposite = instruction.operands[0][0].partition("|")
        self.write(target, result, "pred", mask)
        if opposite:
            self.write(opposite, ~result, "pred", mask)

    def select(self, instruction: Instruction, mask: Mask) -> None:
        """selp: the first operand where the predicate holds, else the second; only the one that is
        taken must be defined."""
        kind = f"b{_width(instruction.types[-1])}"
        chosen = self.read(instruction, 3, mask, "pred")
        a, b = (
            self.read(instruction, 1, mask & chosen, kind),
            self.read(instruction, 2, mask & ~chosen, kind),
        )
        self.write(instruction.operands[0][0], np.where(chosen, a, b), kind, mask)

    def move(self, instruction: Instruction, mask: Mask) -> None:
        """mov, also between one register and several in braces, the first of which holds the lowest
        bits."""
        kind, (targets, sources) = instruction.types[-1], instruction.operands
        if len(targets) == 1 and len(sources) == 1:
            self.write(targets[0], self.read(instruction, 1, mask), kind, mask)
        elif len(sources) > 1:
            # Half of a pair that is not used may be a register that nobody wrote.
            size = _width(kind) // len(sources)
            nothing: np.ndarray = np.zeros(self._count, _UNSIGNED[size])
            parts = [
                (
                    self._bits(s, size, mask)
                    if s in self._registers or not s.startswith("%")
                    else nothing
                )
                for s in sources
            ]
            self.write(targets[0], _joined(parts), kind, mask)
        else:
            size = _width(kind) // len(targets)
            bits = self._bits(sources[0], _width(kind), mask)
            for i, target in enumerate(targets):
                part = bits >> bits.dtype.type(i * size) & bits.dtype.type((1 << size) - 1)
                self.write(target, part.astype(_UNSIGNED[size]), f"b{size}", mask)

    def convert(self, instruction: Instruction, mask: Mask) -> None:
        """cvt.to.from."""
        to, source = instruction.types[-2:]
        value = self.read(instruction, 1, mask)
        rounding = instruction.modifier(*_ROUNDINGS)
        if to in ("bf16x2", "f16x2"):
            # the first operand is the high half
            value = np.stack([self.read(instruction, 2, mask), value])
        elif to[0] in "su" and (source[0] == "f" or source == "bf16"):
            if rounding is None:
                raise NotImplementedError(
                    f"The emulator does not know the instruction {instruction.text!r}."
                )
            limits = np.iinfo((_SIGNED if to[0] == "s" else _UNSIGNED)[_width(to)])
            whole = _ROUNDINGS[rounding](np.nan_to_num(value.astype(np.float64), nan=0.0))
            inner = np.clip(
                whole,
                float(limits.min),
                float(limits.max) if _width(to) < 64 else float(limits.max) / 2,
            ).astype(limits.dtype)
            value = np.where(whole >= float(limits.max), limits.max, inner)
        elif rounding is not None:
            value = _ROUNDINGS[rounding](value)
        if "ftz" in instruction.modifiers and to == "f32":
            value = _without_subnormals(value.astype(np.float32))
        self.write(instruction.operands[0][0], value, to, mask)

    def to_generic(self, instruction: Instruction, mask: Mask) -> None:
        """cvta: global and generic addresses are the same here."""
        self.write(
            instruction.operands[0][0], self.read(instruction, 1, mask), instruction.types[-1], mask
        )


def _rounded_to_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient of integers as the GPU rounds it; by zero it is 0 here, and anything there."""
    wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
    x, y = a.astype(wide), np.where(b == 0, 1, b).astype(wide)
    quotient = np.abs(x) // np.abs(y)
    return np.where(b == 0, 0, quotient * np.sign(x) * np.sign(y)).astype(a.dtype)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(c.dtype)


_NOTHING_TO_DO = ("membar", "fence", "griddepcontrol", "pragma", "nanosleep")

_COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ROUNDINGS: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_REDUCTIONS: dict[str, Callable] = {
    "add": lambda v: v.sum(1, dtype=v.dtype),
    "min": lambda v: np.fmin.reduce(v, 1),
    "max": lambda v: np.fmax.reduce(v, 1),
}
_FLOAT_FUNCTIONS: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "copysign": lambda a, b: np.copysign(b, a),
    "div": np.divide,
    "ex2": np.exp2,
    "fma": _fused,
    "lg2": np.log2,
    # of a NaN and a number, the number; sm_100 takes three
    "max": lambda *v: functools.reduce(np.fmax, v),
    "min": lambda *v: functools.reduce(np.fmin, v),
    "mul": np.multiply,
    "neg": np.negative,
    "rcp": np.reciprocal,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "tanh": np.tanh,
}
_INTEGER_FUNCTIONS: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "div": _rounded_to_zero,
    "mad": lambda a, b, c: a * b + c,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
_OPERATIONS: dict[str, Callable[[_Threads, Instruction, Mask], None]] = {
    **dict.fromkeys(_FLOAT_FUNCTIONS.keys() | _INTEGER_FUNCTIONS.keys(), _Threads.arithmetic),
    **dict.fromkeys(("mul", "mad"), _Threads.multiply),
    **dict.fromkeys(("shl", "shr"), _Threads.shift),
    "bfe": _Threads.extract,
    "cvt": _Threads.convert,
    "cvta": _Threads.to_generic,
    "ld": _Threads.load,
    "ldmatrix": _Threads.load_matrix,
    "mov": _Threads.move,
    "redux": _Threads.reduce_warp,
    "selp": _Threads.select,
    "setp": _Threads.compare,
    "shfl": _Threads.shuffle,
    "st": _Threads.store,
    "stmatrix": _Threads.store_matrix,
}
