"""Reads the PTX of one kernel, as Triton's compiler writes it, into instructions that can be
followed one by one.

program = parse(compiled.asm["ptx"])
program.instructions[0].opcode, program.instructions[0].types, program.instructions[0].operands
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TYPE = re.compile(r"pred|[bsuf](?:8|16|32|64)|bf16|bf16x2|f16x2|f32x2")
"""A type among an instruction's modifiers."""

_COMMENTS = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s[^,)]*?(\w+)(?:\[\d+\])?\s*(?=[,)])")
_DEBUG_LINE = re.compile(r"^\s*\.(?:loc|file)\b[^\n]*", re.MULTILINE)
_NAME = re.compile(r"[%A-Za-z_$][\w$]*")


@dataclass(frozen=True)
class Instruction:
    """One instruction, e.g. `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8]`."""

    opcode: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v2", "b32")
    types: tuple[str, ...]  # ("b32",): those of the modifiers that are types
    # (("%r1", "%r2"), ("[%rd1+8]",)): a vector in braces has several names
    operands: tuple[tuple[str, ...], ...]
    # "%p1": the threads in which it is false (true, if negated) leave the instruction out
    guard: str | None
    guard_negated: bool
    text: str

    def modifier(self, *names: str) -> str | None:
        """Which of `names` is there."""
        return next((m for m in self.modifiers if m in names), None)


@dataclass(frozen=True)
class Program:
    """A kernel. Registers declared in an inner block have names of their own there, such as
    `%r1#3`."""

    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # place in `instructions` that a label stands before
    widths: dict[str, int]  # bits of each register; 1 for a predicate


def parse(text: str) -> Program:
    """Reads the first kernel of a PTX text.

    Raises:
        ValueError: there is no kernel, or its body does not end.
    """
    text = _DEBUG_LINE.sub("", _COMMENTS.sub("", text))
    start = text.find(".entry")
    if start < 0:
        raise ValueError("The PTX holds no .entry, so there is no kernel in it.")
    head, brace, body = text[start:].partition("{")
    parameters = tuple(_PARAMETER.findall(head))
    reader = _Reader()
    for statement in _statements(brace + body):
        if reader.take(statement):
            return Program(parameters, tuple(reader.instructions), reader.labels, reader.widths)
    raise ValueError("The PTX ends inside the kernel's body.")


def _statements(body: str):
    """`{` and `}` of blocks, labels with their colon, and all else without its semicolon."""
    place = 0
    token = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)|([^;]+);)")
    while match := token.match(body, place):
        yield next(group for group in match.groups() if group is not None)
        place = match.end()


class _Reader:
    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self._blocks: list[dict[str, str]] = []  # for each open block its own names of registers
        self._blocks_seen = 0

    def take(self, statement: str) -> bool:
        """Takes in one statement; True when the body has ended."""
        if statement == "{":
            self._blocks.append({})
            self._blocks_seen += 1
        elif statement == "}":
            self._blocks.pop()
        elif statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.instructions)
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif not statement.startswith("."):
            self.instructions.append(_instruction(self._with_own_names(statement)))
        return not self._blocks

    def _declare(self, statement: str) -> None:
        """`.reg .b32 %r<10>` declares %r0 to %r9, `.reg .pred p, q` two by name."""
        _, kind, names = statement.split(None, 2)
        width = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
        for name in (n.strip() for n in names.split(",")):
            if family := re.fullmatch(r"(.*)<(\d+)>", name):
                self.widths.update({f"{family[1]}{i}": width for i in range(int(family[2]))})
                continue
            if len(self._blocks) > 1:
                own = f"{name}#{self._blocks_seen}"
                self._blocks[-1][name] = own
                name = own
            self.widths[name] = width

    def _with_own_names(self, statement: str) -> str:
        names: dict[str, str] = {}
        for block in self._blocks:
            names.update(block)
        return (
            _NAME.sub(lambda match: names.get(match[0], match[0]), statement)
            if names
            else statement
        )


def _instruction(text: str) -> Instruction:
    text = " ".join(text.split())
    guarded = re.fullmatch(r"@(!?)(\S+) (.*)", text)
    negated, guard, rest = guarded.groups() if guarded else ("", None, text)
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(
        opcode=name,
        modifiers=tuple(modifiers),
        types=tuple(m for m in modifiers if TYPE.fullmatch(m)),
        operands=tuple(_operands(operands)),
        guard=guard,
        guard_negated=bool(negated),
        text=text,
    )


def _operands(text: str):
    """Splits at the commas outside of braces and brackets."""
    for operand in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)\s*(?:,|$)", text):
        yield (
            tuple(part.strip() for part in operand.strip("{} ").split(","))
            if operand.startswith("{")
            else (operand.strip(),)
        )
