"""What each instruction does, by its name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.instruments.emulator import arithmetic, transfers
from benchmarks.instruments.emulator.functions import FLOAT_FUNCTIONS, INTEGER_FUNCTIONS
from benchmarks.instruments.emulator.threads import Step

_NOTHING_TO_DO = ("membar", "fence", "griddepcontrol", "pragma", "nanosleep")

_OPERATIONS: dict[str, Callable[[Step], None]] = {
    **dict.fromkeys(FLOAT_FUNCTIONS.keys() | INTEGER_FUNCTIONS.keys(), arithmetic.arithmetic),
    **dict.fromkeys(("mul", "mad"), arithmetic.multiply),
    **dict.fromkeys(("shl", "shr"), arithmetic.shift),
    "bfe": arithmetic.extract,
    "cvt": arithmetic.convert,
    "cvta": arithmetic.to_generic,
    "ld": transfers.load,
    "ldmatrix": transfers.load_matrix,
    "mov": arithmetic.move,
    "redux": transfers.reduce_warp,
    "selp": arithmetic.select,
    "setp": arithmetic.compare,
    "shfl": transfers.shuffle,
    "st": transfers.store,
    "stmatrix": transfers.store_matrix,
}


def execute(step: Step) -> None:
    """Does what the instruction says, in the threads that take part.

    Raises:
        NotImplementedError: an instruction or operand that is not known.
    """
    name = step.instruction.opcode
    # a barrier of one warp: its threads are together anyway
    if name in _NOTHING_TO_DO or (name == "bar" and "warp" in step.instruction.modifiers):
        return
    if name not in _OPERATIONS:
        raise step.unknown()
    step.threads.registers.begin()
    _OPERATIONS[name](step)
