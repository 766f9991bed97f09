"""Which loss a name of a configuration means, and which fields its section then has.

    find("dpo")  # DPO(beta=0.1)
    find("my_losses:margin")  # a function of pairs, or a SequenceLoss, that somebody wrote

Imports torch, so a configuration of MPO itself does without it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, Field, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from mpo.runtime.settings import Section, nearest
from mpo_kernels import losses
from mpo_kernels.losses import Scores, SequenceLoss

CONSTANTS = ("reference_gap", "reference_logps", "mean_tokens", "is_desirable", "kl")
"""What a run can give to a loss beside the scores, by the names that losses have for it."""
TWO_MEANINGS = (
    "has two meanings: robust DPO against wrong labels (arXiv 2403.00409) is robust_dpo here, and"
    " R-DPO against long answers (arXiv 2403.19159) is length_dpo. Name one of them"
)
OWN = "or package.module:function for a loss of your own"
CODE = "code_sha256"
"""The field that tells one state of somebody's own loss from another."""

Base = TypeVar("Base", bound=Section)


def snake_case(name: str) -> str:
    """The name of a loss in a configuration.

    >>> [snake_case(name) for name in ("DPO", "RobustDPO", "APOZero", "SimPO")]
    ['dpo', 'robust_dpo', 'apo_zero', 'simpo']
    """
    return re.sub(r"(?<=[a-z])(?=DPO$)|(?<=APO)(?=[A-Z][a-z])", "_", name).lower()


def named() -> dict[str, type[SequenceLoss]]:
    """Every loss of `mpo_kernels.losses` that is one by itself, by its name here."""
    kinds = [getattr(losses, name) for name in losses.__all__]
    return {
        snake_case(kind.__name__): kind
        for kind in kinds
        if inspect.isclass(kind)
        and issubclass(kind, SequenceLoss)
        and kind.__call__ is not SequenceLoss.__call__
        and kind not in (losses.Sum, losses.Custom)
    }


def find(name: str) -> SequenceLoss:
    """The loss of that name, with its default hyper-parameters.

    Raises:
        ValueError: there is none, or it cannot be imported, or a run has not what it needs.
    """
    if ":" in name:
        loss = _own(name)
    elif name in ("rdpo", "r_dpo", "r-dpo"):
        raise ValueError(TWO_MEANINGS)
    elif name in named():
        loss = named()[name]()
    else:
        raise ValueError(f"unknown loss; {nearest(name, list(named()), 'losses')} {OWN}")
    unknown = [constant for constant in loss.constants if constant not in CONSTANTS]
    if unknown:
        raise ValueError(
            f"needs {', '.join(unknown)}, which a run does not know; it can give"
            f" {', '.join(CONSTANTS)}"
        )
    if loss.sequences not in (1, 2):
        raise ValueError(f"takes groups of {loss.sequences} sequences; a row has pairs")
    if "is_desirable" in loss.constants and loss.sequences != 1:
        raise ValueError(
            "takes is_desirable, which is said of single answers, but groups of"
            f" {loss.sequences}. Set sequences = 1, or leave is_desirable out: of a pair the"
            " first answer is the chosen one"
        )
    return loss


def _own(name: str) -> SequenceLoss:
    """Somebody's own loss, from a module that is installed or lies in the working folder."""
    module, _, place = name.partition(":")
    try:
        found: Any = _imported(module)
        for part in place.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever that module raises
        raise ValueError(
            f"cannot be imported: {_words(error)}. Needed is package.module:function, of a module"
            f" that is installed or lies in {os.getcwd()}"
        ) from error
    if inspect.isclass(found) and issubclass(found, SequenceLoss):
        try:
            found = found()
        except Exception as error:
            raise ValueError(
                f"cannot be made without arguments: {_words(error)}. Give each field a default"
            ) from error
    if isinstance(found, SequenceLoss):
        return found
    if inspect.isclass(found) or not callable(found):
        raise ValueError(
            "is no loss. Needed is a function loss(scores, *constants) -> (P,) of pairs, or an"
            " instance or a subclass of mpo_kernels.losses.SequenceLoss"
        )
    return _of_function(found)


def _imported(module: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:  # `python -m mpo` looks there, the `mpo` script does not
        sys.path.append(here)
    return importlib.import_module(module)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _of_function(function: Callable[..., torch.Tensor]) -> SequenceLoss:
    """A function of pairs as a loss. Its parameters behind the scores name the constants."""
    try:
        _, *names = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            "is no function loss(scores, *constants) of pairs, whose constants are named"
            f" {', '.join(CONSTANTS)}"
        ) from error
    return losses.Custom(function, constants=tuple(names))


@functools.cache
def section_of(name: str, base: type[Base]) -> type[Base]:
    """The section of that loss: the fields of `base`, and the loss's own hyper-parameters.

    Raises:
        ValueError: as `find`.
    """
    template = find(name)
    _refuse_fields(template, base)
    own: dict[str, Any] = {
        field.name: _field(template, field) for field in dataclasses.fields(template) if field.init
    }
    about = base.model_fields["name"].description
    own["name"] = (str, Field(default=name, description=about))
    if ":" in name:
        own[CODE] = _code_of(name)
    made = create_model(
        f"{type(template).__name__}Loss", __base__=base, __doc__=type(template).__doc__, **own
    )
    made.template = template  # type: ignore[attr-defined]
    return made


def _refuse_fields(template: SequenceLoss, base: type[Section]) -> None:
    """Those of somebody's own loss that a section cannot have: a name of the section's own would
    never reach the loss."""
    for field in dataclasses.fields(template):
        name, default = field.name, getattr(template, field.name, None)
        taken = name in base.model_fields or hasattr(base, name) or name == CODE
        if field.init and (taken or name.startswith("_")):
            raise ValueError(
                f"has a field {name}, which the section loss has or cannot have. Give it another"
                " name"
            )
        if field.init and not _is_plain(default):
            raise ValueError(
                f"has a field {name} whose default is {_shown(default)}; a configuration holds"
                " numbers, texts and lists of them. Leave it out of the fields"
            )


def _is_plain(value: Any) -> bool:
    """Whether JSON and YAML have such a value."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:100]


def _field(template: SequenceLoss, field: dataclasses.Field) -> tuple[Any, Any]:
    """A hyper-parameter as a field of a section: the loss itself says what it may be."""
    default = getattr(template, field.name)
    kind = type(default) if isinstance(default, bool | int | float | str) else Any

    def checked(value: Any) -> Any:
        dataclasses.replace(template, **{field.name: value})
        return value

    allowed = field.metadata.get("allowed")
    about = f"Of this loss: {allowed.words}." if allowed is not None else "Of this loss."
    return Annotated[kind, AfterValidator(checked)], Field(default=default, description=about)


def _code_of(name: str) -> tuple[Any, Any]:
    """A field that holds the digest of the module's source: a run goes on with the same loss."""
    module = sys.modules[name.partition(":")[0]]
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        source = ""
    digest = hashlib.sha256(source.encode()).hexdigest()

    def same(value: str) -> str:
        if value != digest:
            raise ValueError(f"the loss's module has other code now, {digest}")
        return value

    about = "Digest of the module's source, so that a run goes on with the same loss; not to set."
    return Annotated[str, AfterValidator(same)], Field(default=digest, description=about)


def read_section(name: str, values: dict[str, Any], base: type[Base], context: Any) -> Base:
    """The checked section of that loss, which was tried out on made-up scores.

    Raises:
        ValidationError: the name means no loss, or a field is unknown or has a wrong value; or the
            loss does not work.
    """
    try:
        kind = section_of(name, base)
    except ValueError as error:
        raise _refused("name", str(error), name) from error
    for key, value in values.items():
        if key not in kind.model_fields:
            hint = nearest(str(key), list(kind.model_fields), "fields")
            raise _refused(str(key), f"unknown field of {name}; {hint}", value)
    section = kind.model_validate(values, context=context)
    try:
        try_out(section.build())
    except ValueError as error:
        own = ", ".join(f"{key} {value}" for key, value in section.own().items())
        raise _refused("name", f"{f'with {own} ' if own else ''}{error}", name) from error
    return section


def _refused(field: str, words: str, value: Any) -> ValidationError:
    error = PydanticCustomError("value_error", "{words}", {"words": words})
    return ValidationError.from_exception_data(
        "loss", [InitErrorDetails(type=error, loc=(field,), input=value)]
    )


def try_out(loss: SequenceLoss) -> None:
    """Calls a loss with scores of two ordinary groups, before a run does with real ones.

    Raises:
        ValueError: it fails, has another shape than (P,), is not finite, gives no gradient, or
            makes groups depend on each other.
    """
    scores = Scores(
        torch.tensor([[-40.0, -60.0], [-50.0, -45.0]])[: loss.sequences],
        torch.tensor([[20.0, 30.0], [22.0, 25.0]])[: loss.sequences],
    )
    given = {
        "reference_gap": torch.tensor([0.5, -0.2]),
        "reference_logps": scores.logps + torch.tensor([[0.5, -0.7], [1.1, 0.2]])[: loss.sequences],
        "mean_tokens": torch.full((2,), 25.0),
        "is_desirable": torch.tensor([1.0, 0.0]),
        "kl": torch.full((2,), 0.25),
    }
    constants = [given[name] for name in loss.constants]
    values, gradient = _called(loss, scores, constants)
    if not bool(torch.cat([values, gradient.flatten()]).isfinite().all()):
        raise ValueError(
            f"it gives {values.tolist()} for ordinary scores, with derivatives {gradient.tolist()}"
        )
    for place in range(2):
        part = Scores(*(each[:, place : place + 1] for each in scores))
        alone, _ = _called(loss, part, [c[..., place : place + 1] for c in constants])
        if not torch.allclose(alone, values[place], rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"it gives {float(values[place]):.6g} to a group among others and"
                f" {float(alone):.6g} to the same one alone. A group's loss has to depend on that"
                " group alone: leave the mean over groups to the run"
            )


def _called(
    loss: SequenceLoss, scores: Scores, constants: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and derivatives. Raises ValueError, whatever the loss raises."""
    count = scores.logps.shape[1]
    sums = scores.logps.clone().requires_grad_()
    try:
        values = loss(Scores(sums, scores.tokens), *constants)
        gradient = _derivatives(values, sums)
    except Exception as error:  # somebody's own code
        raise ValueError(f"it fails with {_words(error)}") from error
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"it gives {shape}, not one loss per group, ({count},)")
    if gradient is None:
        raise ValueError("its value does not depend on scores.logps, or not differentiably")
    return values.detach(), gradient


def _derivatives(values: Any, sums: torch.Tensor) -> torch.Tensor | None:
    """By the sums; None where there are none."""
    if not isinstance(values, torch.Tensor) or not values.requires_grad:
        return None
    return torch.autograd.grad(values.sum(), sums, allow_unused=True)[0]
