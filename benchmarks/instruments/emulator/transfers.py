"""Instructions that move numbers: between registers and memory, and between threads of a warp."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from benchmarks.instruments.emulator.functions import REDUCTIONS
from benchmarks.instruments.emulator.memory import Access, Memory
from benchmarks.instruments.emulator.registers import Mask
from benchmarks.instruments.emulator.threads import WARP, Step
from benchmarks.instruments.emulator.values import UNSIGNED, decode, width_of

_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:([+-])\s*(-?\w+))?\s*\]")

# Between registers and memory


class _Reached(NamedTuple):
    """The accesses of an instruction that are good."""

    memory: Memory
    threads: np.ndarray  # (n,), numbers of the threads
    places: np.ndarray  # (n, size), of the bytes in the memory


def load(step: Step) -> None:
    """ld, also of several registers in braces, and of the kernel's parameters."""
    names, width = step.instruction.operands[0], width_of(step.kind)
    # a signed number keeps its sign in a wider register
    kind = f"{'s' if step.kind[0] == 's' else 'b'}{width}"
    if "param" in step.instruction.modifiers:
        parameter = step.threads.launch.parameters[step.name(1).strip("[] ")]
        bits: np.ndarray = np.full(
            step.threads.count, parameter & ((1 << width) - 1), UNSIGNED[width]
        )
        step.write(decode(bits, kind), kind)
        return
    columns: np.ndarray = _loaded(step, width // 8 * len(names), step.mask).view(UNSIGNED[width])
    for i, name in enumerate(names):
        step.write_to(name, decode(np.ascontiguousarray(columns[:, i]), kind), kind)


def store(step: Step) -> None:
    """st, also of several registers in braces."""
    width = width_of(step.kind)
    parts = [step.bits(name, width) for name in step.instruction.operands[1]]
    step.must_be_written()
    data = np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint8)
    reached = _stored(step, data, step.mask)
    if (reached.memory.bytes[reached.places] != data[reached.threads]).any():
        step.find(
            "races",
            f"{reached.memory.name} memory: threads write different values to a byte at once",
        )


def load_matrix(step: Step) -> None:
    """ldmatrix of 8 x 8 matrices of 16 bits.

    Of the i-th, thread 4r + c gets elements 2c and 2c + 1 of row r in its i-th register, and thread
    8i + r holds that row's address.
    """
    _must_be_plain_matrices(step)
    registers = step.instruction.operands[0]
    rows = _loaded(step, 16, step.threads.lane < 8 * len(registers))
    words = rows.view(np.uint32)
    for i, register in enumerate(registers):
        step.write_to(register, words[_matrix_words(step, i)], "b32")


def store_matrix(step: Step) -> None:
    """stmatrix, the inverse of `load_matrix`."""
    _must_be_plain_matrices(step)
    registers = step.instruction.operands[1]
    words = np.zeros((step.threads.count, 4), np.uint32)
    for i, register in enumerate(registers):
        words[_matrix_words(step, i)] = step.bits(register, 32)
    _stored(step, words.view(np.uint8), step.threads.lane < 8 * len(registers))


def _must_be_plain_matrices(step: Step) -> None:
    instruction = step.instruction
    sized = instruction.modifier("x1", "x2", "x4") is not None
    if not sized or "trans" in instruction.modifiers or not step.mask.all():
        raise step.unknown()


def _matrix_words(step: Step, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Which thread's row of the i-th matrix, and which word of it, each thread holds."""
    lane = step.threads.lane
    return step.threads.warp * WARP + 8 * i + lane // 4, lane % 4


def _loaded(step: Step, size: int, mask: Mask) -> np.ndarray:
    """(threads, size) bytes from the addresses in the second operand; 0 where none are read."""
    found = np.zeros((step.threads.count, size), np.uint8)
    reached = _reach(step, step.name(1), size, mask)
    _track(step, reached, None)
    found[reached.threads] = reached.memory.bytes[reached.places]
    if not reached.memory.is_written(reached.places):
        step.find("undefined", f"{reached.memory.name} memory is read and was not written")
    return found


def _stored(step: Step, data: np.ndarray, mask: Mask) -> _Reached:
    """Puts `data` (threads, size) at the addresses in the first operand."""
    reached = _reach(step, step.name(0), data.shape[1], mask)
    own = data[reached.threads]
    _track(step, reached, reached.memory.bytes[reached.places] != own)
    reached.memory.put(reached.places, own)
    return reached


def _reach(step: Step, operand: str, size: int, mask: Mask) -> _Reached:
    """Follows the addresses that the threads of `mask` hold, and reports the bad ones."""
    threads = np.flatnonzero(mask)
    addresses = _addresses(step, operand, mask)[threads]
    if (addresses % size).any():
        remainder = int((addresses % size).max())
        step.find("misaligned", f"{size}-byte access at an address that is {remainder} mod {size}")
    is_shared = step.instruction.modifier("shared", "shared::cta") is not None
    memory: Memory = step.threads.shared if is_shared else step.threads.launch.memory
    inside, places = memory.locate(addresses, size)
    if not inside.all():
        first = int(np.flatnonzero(~inside)[0])
        step.find(
            "out_of_bounds",
            f"{memory.name} memory, {int((~inside).sum())} threads of program"
            f" {step.threads.number}, thread {threads[first]} at"
            f" {memory.distance(int(addresses[first])):+d} bytes from the end of the nearest"
            " argument",
        )
    return _Reached(memory, threads[inside], places[:, None] + np.arange(size))


def _addresses(step: Step, operand: str, mask: Mask) -> np.ndarray:
    """(threads,) int64 of an operand like `[%rd1+8]`."""
    match = _ADDRESS.fullmatch(operand)
    assert match is not None, operand
    base, sign, offset = match.groups()
    registers = step.threads.registers
    addresses = registers.bits(base, 64, mask).astype(np.int64)
    registers.must_be_written(step.instruction, mask)
    if offset:
        addresses = addresses + int(offset, 0) * (-1 if sign == "-" else 1)
    return addresses


def _track(step: Step, reached: _Reached, changed: np.ndarray | None) -> None:
    threads = step.threads
    access = Access(
        places=reached.places,
        warps=threads.warp[reached.threads],
        interval=threads.interval,
        program=threads.number,
        changed=changed,
    )
    if conflict := reached.memory.track(access):
        step.find("races", conflict)


# Between threads


def shuffle(step: Step) -> None:
    """shfl.sync d, value, b, c: reads another thread of the warp."""
    lane, registers = step.threads.lane, step.threads.registers
    b, c = (step.bits(step.name(i), 32).astype(np.int64) for i in (2, 3))
    step.must_be_written()
    value = step.bits(step.name(1), 32)
    segment, clamp = c >> 8 & 31, c & 31
    low = lane & segment
    high = low | (clamp & ~segment)
    mode = step.instruction.modifier("bfly", "down", "up", "idx")
    source = {
        "bfly": lane ^ b,
        "down": lane + b,
        "up": lane - b,
        "idx": low | (b & ~segment),
    }[mode or ""]
    inside = np.asarray(source >= high if mode == "up" else source <= high)
    source = np.where(inside, source, lane) + step.threads.warp * WARP
    if (~step.mask[source[step.mask]]).any():
        step.find("undefined", "a shuffle reads a thread that takes no part in it")
    target, _, flag = step.name(0).partition("|")
    if flag:
        step.write_to(flag, inside, "pred")
    registers.come_from(source)
    step.write_to(target, value[source], "b32")


def reduce_warp(step: Step) -> None:
    """redux.sync: every thread of a warp gets the reduction over the warp."""
    warps = step.mask.reshape(-1, WARP)
    if (warps.any(1) & ~warps.all(1)).any():
        step.find("undefined", "a reduction over a warp that not all of its threads reach")
    value = step.read(1).reshape(-1, WARP)
    step.threads.registers.come_from_all(WARP)
    name = step.instruction.modifier(*REDUCTIONS)
    if name is None:
        raise step.unknown()
    step.write(np.repeat(REDUCTIONS[name](value), WARP).astype(value.dtype))
