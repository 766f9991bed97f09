"""Instructions that compute numbers from registers."""

from __future__ import annotations

import numpy as np

from benchmarks.instruments.emulator.functions import (
    COMPARISONS,
    FLOAT_FUNCTIONS,
    INTEGER_FUNCTIONS,
    ROUNDINGS,
)
from benchmarks.instruments.emulator.threads import Step
from benchmarks.instruments.emulator.values import (
    SIGNED,
    UNSIGNED,
    is_float,
    joined,
    width_of,
    without_subnormals,
)


def arithmetic(step: Step) -> None:
    """One or several operands of one type to a result of the same type, with or without flushing of
    subnormal numbers."""
    instruction, kind = step.instruction, step.kind
    if instruction.types in (("f32", "bf16"), ("f32", "f16")):
        _mixed(step)
        return
    if len(instruction.types) != 1 or "sat" in instruction.modifiers:
        raise step.unknown()
    operands = [step.read(i) for i in range(1, len(instruction.operands))]
    flush = without_subnormals if "ftz" in instruction.modifiers else np.asarray
    if is_float(kind):
        operands = [flush(operand) for operand in operands]
    function = (FLOAT_FUNCTIONS if is_float(kind) else INTEGER_FUNCTIONS)[instruction.opcode]
    # numpy would take one too many for its output
    if isinstance(function, np.ufunc) and function.nin != len(operands):
        raise step.unknown()
    result = function(*operands)
    step.write(flush(result) if is_float(kind) else result)


def _mixed(step: Step) -> None:
    """add, sub, fma of sm_100: half-precision operands, a float32 last one and result."""
    *narrow, last = range(1, len(step.instruction.operands))
    operands = [step.read(i).astype(np.float32) for i in narrow] + [step.read(last, "f32")]
    step.write(FLOAT_FUNCTIONS[step.instruction.opcode](*operands), "f32")


def multiply(step: Step) -> None:
    """mul and mad; of integers the low half of the product, or the whole of it (wide)."""
    kind, modifiers = step.kind, step.instruction.modifiers
    if "hi" in modifiers:
        raise step.unknown()
    if "wide" not in modifiers:
        arithmetic(step)
        return
    width = 2 * width_of(kind)
    wide = f"{kind[0]}{width}"
    number = {"s": SIGNED, "u": UNSIGNED}[kind[0]][width]
    result: np.ndarray = step.read(1).astype(number) * step.read(2).astype(number)
    if step.instruction.opcode == "mad":
        result = result + step.read(3, wide)
    step.write(result, wide)


def shift(step: Step) -> None:
    """shl and shr; shifts by the width or more clear the number, or fill it with its sign."""
    value, width, is_left = step.read(1), width_of(step.kind), step.instruction.opcode == "shl"
    distance = step.bits(step.name(2), 32).astype(np.int64)
    short = np.minimum(distance, width - 1).astype(value.dtype)
    result = value << short if is_left else value >> short
    clears = (distance >= width) & (is_left | (step.kind[0] != "s"))
    step.write(np.where(clears, 0, result).astype(value.dtype))


def extract(step: Step) -> None:
    """bfe.u32: `length` bits from `start` on."""
    if step.kind != "u32":
        raise step.unknown()
    value, start, length = (step.bits(step.name(i), 32).astype(np.uint64) for i in (1, 2, 3))
    byte, one = np.uint64(255), np.uint64(1)
    result = value >> (start & byte) & ((one << (length & byte)) - one)
    step.write(result.astype(np.uint32))


def compare(step: Step) -> None:
    """setp, with or without a second predicate that gets the opposite."""
    result = _compared(step.instruction.modifiers[0], step.read(1), step.read(2))
    if combine := step.instruction.modifier("and", "or", "xor"):
        result = INTEGER_FUNCTIONS[combine](result, step.read(3, "pred"))
    target, _, opposite = step.name(0).partition("|")
    step.write_to(target, result, "pred")
    if opposite:
        step.write_to(opposite, ~result, "pred")


def _compared(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The comparison that PTX calls `name`, which may differ for NaN."""
    if not np.issubdtype(a.dtype, np.floating):
        return COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)](a, b)
    ordered = ~(np.isnan(a) | np.isnan(b))
    if name in ("num", "nan"):
        return ordered if name == "num" else ~ordered
    if len(name) == 3:  # ltu and the like hold for NaN too
        return COMPARISONS[name[:2]](a, b) | ~ordered
    return COMPARISONS[name](a, b) & ordered


def select(step: Step) -> None:
    """selp: the first operand where the predicate holds, else the second; only the one that is
    taken must be defined."""
    kind = f"b{width_of(step.kind)}"
    chosen = step.read(3, "pred")
    a = step.read(1, kind, step.mask & chosen)
    b = step.read(2, kind, step.mask & ~chosen)
    step.write(np.where(chosen, a, b), kind)


def move(step: Step) -> None:
    """mov, also between one register and several in braces, the first of which holds the lowest
    bits."""
    targets, sources = step.instruction.operands
    width = width_of(step.kind)
    if len(targets) == 1 and len(sources) == 1:
        step.write(step.read(1))
    elif len(sources) > 1:
        size = width // len(sources)
        # half of a pair that is not used may be a register that nobody wrote
        nothing: np.ndarray = np.zeros(step.threads.count, UNSIGNED[size])
        has = step.threads.registers.has
        step.write(joined([step.bits(s, size) if has(s) else nothing for s in sources]))
    else:
        size = width // len(targets)
        bits = step.bits(sources[0], width)
        for i, target in enumerate(targets):
            part = bits >> bits.dtype.type(i * size) & bits.dtype.type((1 << size) - 1)
            step.write_to(target, part.astype(UNSIGNED[size]), f"b{size}")


def convert(step: Step) -> None:
    """cvt.to.from."""
    to, source = step.instruction.types[-2:]
    value = step.read(1)
    rounding = step.instruction.modifier(*ROUNDINGS)
    if to in ("bf16x2", "f16x2"):
        # the first operand is the high half
        value = np.stack([step.read(2), value])
    elif to[0] in "su" and (source[0] == "f" or source == "bf16"):
        if rounding is None:
            raise step.unknown()
        value = _to_integer(ROUNDINGS[rounding](_without_nan(value)), to)
    elif rounding is not None:
        value = ROUNDINGS[rounding](value)
    if "ftz" in step.instruction.modifiers and to == "f32":
        value = without_subnormals(value.astype(np.float32))
    step.write(value, to)


def _without_nan(value: np.ndarray) -> np.ndarray:
    """float64 with 0 for NaN."""
    return np.nan_to_num(value.astype(np.float64), nan=0.0)


def _to_integer(whole: np.ndarray, kind: str) -> np.ndarray:
    """Whole float64 numbers as integers, those out of range as the nearest one."""
    width = width_of(kind)
    limits = np.iinfo((SIGNED if kind[0] == "s" else UNSIGNED)[width])
    # float64 cannot hold the largest number of 64 bits, and casting the next one would overflow
    most = float(limits.max) if width < 64 else float(limits.max) / 2
    inner = np.clip(whole, float(limits.min), most).astype(limits.dtype)
    return np.where(whole >= float(limits.max), limits.max, inner)


def to_generic(step: Step) -> None:
    """cvta: global and generic addresses are the same here."""
    step.write(step.read(1))
