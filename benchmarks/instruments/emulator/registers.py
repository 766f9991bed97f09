"""The registers of one program's threads, and which threads wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from benchmarks.instruments.emulator.findings import Findings
from benchmarks.instruments.emulator.values import SIGNED, UNSIGNED, encode
from benchmarks.instruments.ptx import Instruction

Mask = np.ndarray
"""Which threads of the program take part, (threads,) bool."""


class Registers:
    """Values of all threads, (threads,) bits per register.

    It follows what is undefined: `bits` notes which threads read what they had not written, `write`
    hands that on to its result, `must_be_written` reports it.

    Args:
        widths: bits of each register; 1 for a predicate.
        special: what the code reads by name and does not write (%tid.x).
    """

    def __init__(
        self,
        count: int,
        widths: Mapping[str, int],
        special: Mapping[str, int | np.ndarray],
        findings: Findings,
    ) -> None:
        self._count, self._widths, self._special = count, widths, special
        self._findings = findings
        self._values: dict[str, np.ndarray] = {}
        # threads in which a register was written, from what was written itself
        self._written: dict[str, Mask] = {}
        # threads in which the instruction at hand has read what was not
        self._unwritten: Mask = np.zeros(count, bool)

    def begin(self) -> None:
        """Another instruction, which has read nothing yet."""
        self._unwritten = np.zeros(self._count, bool)

    def come_from(self, source: np.ndarray) -> None:
        """What is written next was read by the threads `source` (threads,)."""
        self._unwritten = self._unwritten[source]

    def come_from_all(self, together: int) -> None:
        """What is written next was read by all of `together` neighbours."""
        self._unwritten = self._unwritten.reshape(-1, together).any(1).repeat(together)

    def has(self, operand: str) -> bool:
        """Whether it can be read: no register, or one that some thread wrote."""
        return operand in self._values or not operand.startswith("%")

    def bits(self, operand: str, width: int, mask: Mask) -> np.ndarray:
        """An operand's bits in all threads.

        Which of those in `mask` were not written is noted: triton before 3.7 lets threads that take
        no part in a reduction shuffle such registers, and drops the result.

        Raises:
            NotImplementedError: an operand that is not known.
        """
        if operand.startswith("!"):
            return ~self.bits(operand[1:], width, mask)
        if operand in self._widths:
            return self._register(operand, width, mask)
        if operand in self._special:
            value = np.asarray(self._special[operand])
            return np.broadcast_to(value, self._count).astype(UNSIGNED[width])
        if float_bits := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
            return np.full(self._count, int(float_bits[1], 16), UNSIGNED[width])
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if width == 1:
                return np.full(self._count, bool(number), bool)
            return np.full(self._count, number & ((1 << width) - 1), UNSIGNED[width])
        raise NotImplementedError(f"The emulator does not know the operand {operand!r}.")

    def _register(self, name: str, width: int, mask: Mask) -> np.ndarray:
        if name not in self._values:
            self._findings.add("undefined", f"register {name} is read and was never written")
            return np.zeros(self._count, bool if width == 1 else UNSIGNED[width])
        self._unwritten |= mask & ~self._written[name]
        value = self._values[name]
        return value if width == 1 else value.astype(UNSIGNED[width], copy=False)

    def write(self, register: str, value: np.ndarray, kind: str, mask: Mask) -> None:
        """Stores numbers of type `kind`, extended to the register's width as PTX does: signed ones
        with their sign."""
        if register == "_":
            return
        bits = _extended(encode(value, kind), kind, self._widths[register])
        old = self._values.get(register)
        self._values[register] = np.where(mask, bits, np.zeros_like(bits) if old is None else old)
        written = self._written.get(register)
        kept = np.zeros_like(mask) if written is None else written & ~mask
        self._written[register] = kept | (mask & ~self._unwritten)

    def must_be_written(self, instruction: Instruction, mask: Mask) -> None:
        """What the instruction has read so far takes effect outside of registers."""
        if (self._unwritten & mask).any():
            self._findings.add(
                "undefined",
                f"a register is used in threads that did not write it: {instruction.text}",
            )


def _extended(bits: np.ndarray, kind: str, width: int) -> np.ndarray:
    """Bits of type `kind` in a register of `width` bits."""
    own = bits.dtype.itemsize * 8
    if kind == "pred" or width == own:
        return bits
    if kind[0] == "s":
        return bits.view(SIGNED[own]).astype(SIGNED[width]).view(UNSIGNED[width])
    return bits.astype(UNSIGNED[width])
