"""What the fields of a configuration are, in words: taken from their types, limits and the text
below each, so that nothing is said twice."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mpo.runtime.settings import Section

WORDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true | false",
    datetime: "date",
    NoneType: "null",
    Any: "any value",
}
SIGNS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "not empty"}


@dataclass(frozen=True)
class FieldText:
    """One field as its configuration's YAML has it."""

    name: str
    """With its sections, such as loss.beta."""
    type: str
    """What it takes, and its limits."""
    default: Any
    required: bool
    about: str


@dataclass(frozen=True)
class SectionText:
    """A section and its own fields; those of sections inside it are in sections of their own."""

    name: str
    """Empty for the whole file."""
    about: str
    fields: tuple[FieldText, ...]


def describe(kind: type[Section], name: str = "", about: str = "") -> list[SectionText]:
    """The section and those inside it, from the top of the file to its end.

    >>> class Greeting(Section):
    ...     times: int = 2
    >>> describe(Greeting)[0].fields[0].type
    'integer'
    """
    fields, inner = [], []
    for own, field in kind.model_fields.items():
        whole = f"{name}.{own}" if name else own
        part = _section_of(field.annotation)
        if part is None:
            fields.append(_field(whole, field))
        else:
            inner += describe(part, whole, field.description or "")
    texts = " ".join(filter(None, [inspect.getdoc(kind), about]))
    return [SectionText(name, _one_line(texts), tuple(fields)), *inner]


def select(sections: Sequence[SectionText], wanted: str) -> list[SectionText]:
    """The section of that name with those inside it, or the section of a single field."""
    inside = [s for s in sections if f"{s.name}.".startswith(f"{wanted}.")]
    return inside or [
        SectionText(s.name, s.about, (field,))
        for s in sections
        for field in s.fields
        if field.name == wanted
    ]


def _section_of(annotation: Any) -> type[Section] | None:
    parts = [annotation, *get_args(annotation)]
    return next((p for p in parts if isinstance(p, type) and issubclass(p, Section)), None)


def _field(name: str, field: FieldInfo) -> FieldText:
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined
    takes = _with_limits(_in_words(field.annotation), field.metadata)
    return FieldText(name, takes, default, required, _one_line(field.description or ""))


def _in_words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [m for part in parts[1:] for m in getattr(part, "metadata", ())]
        # that a name in a list is not empty goes without saying
        limits = [m for m in metadata if not hasattr(m, "min_length")]
        return _with_limits(_in_words(parts[0]), limits)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(_in_words(part) for part in parts)
    if origin is tuple:
        several = parts[-1] is Ellipsis
        return (
            f"list of {_in_words(parts[0])}" if several else f"{len(parts)} x {_in_words(parts[0])}"
        )
    if origin is dict:
        return "mapping"
    return WORDS[annotation]


def _with_limits(words: str, metadata: Iterable[Any]) -> str:
    return ", ".join([words, *_limits(metadata)])


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    for limit in metadata:
        for key, sign in SIGNS.items():
            if hasattr(limit, key):
                yield sign.format(_number(getattr(limit, key)))


def _number(value: float) -> str:
    """Short: 2^31-1 rather than its ten digits."""
    for less in (0, 1):
        power = value + less
        if isinstance(power, int) and power >= 2**31 and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}" + (f"-{less}" if less else "")
    return f"{value:g}".replace("e+0", "e").replace("e+", "e")


def _one_line(text: str) -> str:
    return " ".join(text.split())
