"""Numbers for losses: registered operators, whose arguments cannot be Python objects, and compiled
graphs, which would keep a hyper-parameter's value, know a loss by one and call the object itself.

A number keeps nothing alive, and is never given to a second loss.
"""

from __future__ import annotations

import itertools
import types
import weakref
from typing import Any

_NUMBERS = itertools.count(1)
_KNOWN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_OF_FUNCTIONS: dict[int, int] = {}
"""By id, which may have become another's: `_KNOWN` says whose the handle is."""
_TRACED: list[Any] = []
"""Functions of compiled graphs, kept for good: a graph serves all functions of the same code, so
that the one which it calls must outlive its owner."""


def new_handle(loss: Any) -> int:
    """A number for a new object."""
    handle = next(_NUMBERS)
    _KNOWN[handle] = loss
    return handle


def handle_of_function(function: Any) -> int:
    """The number of a callable that has none of its own.

    Raises:
        ValueError: nothing can refer to it weakly.
    """
    handle = _OF_FUNCTIONS.get(id(function))
    if handle is None or _KNOWN.get(handle) is not function:
        try:
            handle = _OF_FUNCTIONS[id(function)] = new_handle(function)
        except TypeError:
            raise ValueError(
                f"The loss is a {type(function).__name__}, which cannot be referred to weakly. Give"
                " a function, or mpo_kernels.losses.Custom(function)."
            ) from None
    return handle


def handle_in_graph(function: Any) -> int:
    """That of a function which `may_be_a_constant`, while it is traced."""
    _TRACED.append(function)
    return handle_of_function(function)


# what torch.compiler.assume_constant_result does, which would import the compiler, and triton
handle_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_be_a_constant(function: Any) -> bool:
    """Whether all functions that a compiler takes for this one compute the same: it looks at their
    code alone. So there is nothing else to them, no closure and no defaults."""
    if not isinstance(function, types.FunctionType):
        return False
    code = function.__code__
    return not code.co_freevars and not code.co_kwonlyargcount and function.__defaults__ is None


def from_handle(handle: int) -> Any:
    """The loss of a number.

    Raises:
        RuntimeError: it is gone.
    """
    loss = _KNOWN.get(int(handle))
    if loss is None:
        raise RuntimeError(
            "The loss of this call is gone: a compiled graph or a checkpoint kept its number, which"
            " keeps nothing alive. Make the loss once and keep it for as long as calls and their"
            " backward run."
        )
    return loss
