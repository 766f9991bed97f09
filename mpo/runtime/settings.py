"""A YAML file of any kind: read, overridden from the command line, checked field by field, and
explained where it is wrong.

    class Greeting(Section):
        name: str = "world"
        \"""Who is greeted.\"""

    read_settings(Path("greeting.yaml"), ["name=everybody"], Greeting)

Every section forbids unknown fields; the error names the nearest known one. A field of type
`Beside` names something that is looked for in the file's own folder first. Knows no field of a run.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mpo.runtime.errors import UserError
from mpo.runtime.files import home, not_finite

LARGEST = 2**31 - 1
"""Of counts: more is a mistake, and would overflow where it is used."""


class Section(BaseModel):
    """A group of fields. Unknown fields are errors, and a checked configuration does not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_seems(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what would be taken for something else: true for 1, and texts that no file and no
        terminal can have."""
        name = info.field_name or ""
        kind = str(cls.model_fields[name].annotation)
        for part in [value, *(value if isinstance(value, list | tuple) else ())]:
            if isinstance(part, bool) and "bool" not in kind and not _is_a_language(name, part):
                raise ValueError(
                    f"{str(part).lower()} is no value of it. YAML takes yes, no, on and off for"
                    " true and false: use quotes"
                )
            if isinstance(part, str) and ("\0" in part or not _is_unicode(part)):
                raise ValueError("holds a character that no name can have")
            if kind.startswith("dict") and not_finite(part):
                raise ValueError(f"{not_finite(part)[0]} is no finite number")
        return value


def _is_a_language(name: str, value: bool) -> bool:
    """`no`, Norwegian, is YAML's false."""
    return "language" in name and value is False


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def one_or_several(value: Any) -> Any:
    """A single name as a list of one: data.train=rows.jsonl means [rows.jsonl]."""
    return (value,) if isinstance(value, str) else value


def in_a_file(place: Callable[[Path, str], str]) -> AfterValidator:
    """Where a field is read from a file, its value becomes `place(folder of the file, value)`; a
    configuration that is made otherwise keeps the value."""

    def resolved(value: str, info: ValidationInfo) -> str:
        return place(info.context, value) if isinstance(info.context, Path) else value

    return AfterValidator(resolved)


def _beside(folder: Path, name: str) -> str:
    """The absolute path of what has that name in the configuration's own folder, else in the
    working folder; else the name as it is.

    Absolute, so that a run's config.json still names its files when the next command is given from
    another folder.
    """
    name = home(name)
    for there in (folder / name, Path(name)):
        try:
            if there.exists():
                return os.path.abspath(there)
        except OSError:  # a name that is too long for a file is none
            break
    return name


def _whole_path(folder: Path, name: str) -> str:
    return name if name.startswith("hf:") else os.path.abspath(_beside(folder, name))


Name = Annotated[str, Field(min_length=1)]
Beside = Annotated[Name, in_a_file(_beside)]
"""A file or folder, by the rule of `_beside`, or what lies elsewhere, such as a hub id."""
WholePath = Annotated[Name, in_a_file(_whole_path)]
"""As Beside, but by its whole path also where nothing is there, unless it is a hub's data set."""
InHome = Annotated[Name, in_a_file(lambda folder, name: home(name))]
"""A place to write, in the working folder; `~` is the home folder."""
OneOrSeveral = BeforeValidator(one_or_several)

Checked = TypeVar("Checked", bound=Section)
Kept = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""What of a file's own tree stands beside that of the overrides."""


def read_settings(
    path: Path,
    overrides: list[str] | None,
    kind: type[Checked],
    beside: Kept = lambda file, given: file,
) -> Checked:
    """Reads, overrides and checks a YAML file.

    build = read_settings(Path("build.yaml"), ["languages=[sw]"], BuildConfig)

    Args:
        path: the file.
        overrides: `section.field=value` strings; the value is parsed as YAML.
        kind: the section that the file as a whole is.
        beside: what of the file's own tree stands beside that of the overrides.
    Raises:
        UserError: the file is missing or no YAML mapping, an override is malformed, or a field is
            unknown or has a wrong value.
    """
    values = _overridden(path, _read(path), overrides or [], beside)
    try:
        return kind.model_validate(values, context=path.parent)
    except ValidationError as error:
        raise UserError(_explain(path, error, kind)) from error


def _read(path: Path) -> DictConfig:
    try:
        tree: Any = OmegaConf.load(path)
    # of many kinds: no YAML, no text, no number that Python reads, nested too deeply
    except Exception as error:
        raise UserError(f"{path} is no readable YAML: {_words(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} holds no mapping of sections such as 'model:' and 'data:'.")
    return tree


def _overridden(path: Path, tree: DictConfig, overrides: list[str], beside: Kept) -> Any:
    """The tree with the overrides over what of it stands beside them."""
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(
                f"Override {override!r} is not of the form section.field=value, e.g. loss.beta=1.5."
            )
    try:
        if overrides:
            given = OmegaConf.from_dotlist(overrides)
            own: Any = OmegaConf.to_container(tree)
            over: Any = OmegaConf.to_container(given)
            return OmegaConf.to_container(
                OmegaConf.merge(OmegaConf.create(beside(own, over)), given), resolve=True
            )
        return OmegaConf.to_container(tree, resolve=True)
    except Exception as error:  # of many kinds, as above
        raise UserError(
            f"{path} with overrides {overrides} does not resolve: {_words(error)}"
        ) from error


def _words(error: Exception) -> str:
    """An exception's own words in one line, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def _explain(path: Path, error: ValidationError, kind: type[Section]) -> str:
    """One line per wrong field: where, what was given, what is accepted, and the nearest name for
    an unknown one."""
    lines = [f"{path}: {error.error_count()} problem(s) in the configuration:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), _fields_at(item["loc"][:-1], kind), "fields")
            lines.append(f"  {where}: unknown field; {hint}")
        elif item["type"] == "missing":
            lines.append(f"  {where}: missing; it is required.")
        else:
            given = f" (given: {_shown(item['input'])})" if item["loc"] else ""
            lines.append(
                f"  {where or 'configuration'}: {item['msg'].removeprefix('Value error, ')}{given}"
            )
    return "\n".join(lines)


def nearest(name: str, known: list[str], what: str) -> str:
    """What an unknown name may have meant, in words.

    >>> nearest("betta", ["beta", "pool"], "fields")
    "did you mean 'beta'?"
    >>> nearest("x", ["beta", "pool"], "fields")
    'known fields: beta, pool.'
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known {what}: {', '.join(known)}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields_at(location: tuple[int | str, ...], kind: type[Section]) -> list[str]:
    section: Any = kind
    for name in location:
        section = section.model_fields[name].annotation
        # An optional section is a union with None.
        section = next(
            (part for part in getattr(section, "__args__", ()) if part is not type(None)), section
        )
    return list(section.model_fields)


def as_written(value: float) -> Fraction:
    """The decimal number that a configuration's float stands for: 1.1 x 100 rows are 110, where
    floats make it a little more.

    >>> as_written(1.1) * 100 == 110, 1.1 * 100 == 110
    (True, False)
    """
    return Fraction(str(value))
