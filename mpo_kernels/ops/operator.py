"""The door of every registered operator.

torch takes an operator's arguments one by one: tensors by place, numbers by keyword. Functions here
take what belongs together as one object. So an argument whose type is a frozen dataclass is spelled
out as its fields on one side of torch and made again on the other; what holds process groups or is
a function goes as a number (`_BY_HANDLE`). Several results are a NamedTuple on both sides.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from mpo_kernels import parallel
from mpo_kernels.losses import base, handles
from mpo_kernels.ops.once import refusing_second_derivatives, remember_inputs

_TENSORS = (torch.Tensor, torch.Tensor | None)
_BY_HANDLE: dict[str, tuple[Callable[[Any], int], Callable[[int], Any]]] = {
    "parallel": (parallel.handle_of, parallel.from_handle),
    "loss": (base.handle_of, handles.from_handle),
}
"""Arguments that torch has as a number, by name: to the number, and from it."""


def operator(name: str, *, strided: Collection[str] = ()) -> Callable[[Callable], Operator]:
    """Decorator: registers a function that mutates nothing under a name, so that torch.compile
    takes it whole. torch infers the schema from its annotations.

    Its tensors arrive contiguous, except those in `strided`, which are large: the function minds
    their strides.
    """
    return lambda function: Operator(name, function, strided)


class Operator:
    """A registered function. It is called as the function is; `definition` is torch's own, with all
    arguments spelled out."""

    definition: torch.library.CustomOpDef

    def __init__(self, name: str, function: Callable, strided: Collection[str]) -> None:
        self._types = typing.get_type_hints(function)
        self._result = self._types.pop("return")
        self._fields = {
            argument: typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else None
            for argument, kind in self._types.items()
        }
        leaves: dict[str, Any] = {}
        for argument, kind in self._types.items():
            leaves.update(self._fields[argument] or {argument: kind})
        self._tensors = [n for n, kind in leaves.items() if kind in _TENSORS]
        self._numbers = [n for n in leaves if n not in self._tensors]
        self._handles = [n for n in leaves if n in _BY_HANDLE]
        assert set(strided) <= set(self._tensors), f"{name} has no tensors {strided}"

        def spelled_out(*tensors: torch.Tensor | None, **numbers: Any) -> Any:
            # Kernels take most tensors by their pointer alone, so another stride would make them
            # read other numbers, or beyond the memory. A caller may give any view, a compiler
            # other strides than those it traced, and autograd an expanded gradient: nobody but the
            # operator itself can see to it.
            given = [
                tensor if tensor is None or leaf in strided else tensor.contiguous()
                for leaf, tensor in zip(self._tensors, tensors, strict=True)
            ]
            return _plain(function(**vars(self._arguments(given, numbers))))

        spelled_out.__doc__ = function.__doc__
        spelled_out.__signature__ = self._signature(leaves)  # type: ignore[attr-defined]
        self.definition = torch.library.custom_op(name, spelled_out, mutates_args=())

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        given = dict(zip(self._types, arguments, strict=False), **keywords)
        leaves: dict[str, Any] = {}
        for argument, fields in self._fields.items():
            value = given[argument]
            leaves.update(
                {argument: value} if fields is None else {f: getattr(value, f) for f in fields}
            )
        for leaf in self._handles:
            to_handle, _ = _BY_HANDLE[leaf]
            leaves[leaf] = to_handle(leaves[leaf])
        numbers = {leaf: leaves[leaf] for leaf in self._numbers}
        return self._named(self.definition(*[leaves[leaf] for leaf in self._tensors], **numbers))

    def register_fake(self, function: Callable) -> Callable:
        """Decorator: what the operator returns of tensors without data; the same arguments."""

        def spelled_out(*tensors: torch.Tensor | None, **numbers: Any) -> Any:
            return _plain(function(**vars(self._arguments(tensors, numbers))))

        self.definition.register_fake(spelled_out)
        return function

    def register_autograd(self, *, save: Callable, backward: Callable) -> None:
        """Gradients, which refuse to be differentiated.

        Args:
            save: (ctx, arguments by name, result).
            backward: (ctx, upstream gradient of each tensor of the result) -> the gradients of the
                first tensors; the others have none.
        """

        def setup_context(
            ctx: Any,
            inputs: tuple,
            output: Any,
            keyword_only_inputs: Mapping[str, Any] | None = None,
        ) -> None:
            save(ctx, self._arguments(inputs, keyword_only_inputs or {}), self._named(output))
            remember_inputs(ctx, inputs)

        def padded(ctx: Any, *upstream: torch.Tensor | None) -> tuple:
            grads = backward(ctx, *upstream)
            return *grads, *(None,) * (len(self._tensors) - len(grads))

        self.definition.register_autograd(
            refusing_second_derivatives(padded), setup_context=setup_context
        )

    def counted(self, formula: Callable) -> Callable:
        """A formula of torch.utils.flop_counter, from (arguments by name, result) -> FLOPs."""

        def spelled_out(*tensors: Any, out_val: Any, **numbers: Any) -> int:
            return formula(self._arguments(tensors, numbers), self._named(out_val))

        return spelled_out

    def _signature(self, leaves: Mapping[str, Any]) -> inspect.Signature:
        """What torch infers the schema from: tensors by place, numbers by keyword."""
        by_place, by_keyword = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        parameters = [
            *(inspect.Parameter(n, by_place, annotation=leaves[n]) for n in self._tensors),
            *(
                inspect.Parameter(n, by_keyword, annotation=int if n in _BY_HANDLE else leaves[n])
                for n in self._numbers
            ),
        ]
        count = len(getattr(self._result, "_fields", ()))
        result = tuple[(torch.Tensor,) * count] if count else self._result  # type: ignore[misc]
        return inspect.Signature(parameters, return_annotation=result)

    def _arguments(
        self, tensors: Collection[torch.Tensor | None], numbers: Mapping[str, Any]
    ) -> SimpleNamespace:
        """The function's arguments by name, of those that torch has."""
        leaves = dict(zip(self._tensors, tensors, strict=True), **numbers)
        for leaf in self._handles:
            _, from_handle = _BY_HANDLE[leaf]
            leaves[leaf] = from_handle(leaves[leaf])
        return SimpleNamespace(
            **{
                name: leaves[name] if fields is None else kind(**{f: leaves[f] for f in fields})
                for (name, fields), kind in zip(
                    self._fields.items(), self._types.values(), strict=True
                )
            }
        )

    def _named(self, output: Any) -> Any:
        """torch's tuple as the function's NamedTuple."""
        return self._result(*output) if hasattr(self._result, "_fields") else output


def _plain(output: Any) -> Any:
    return tuple(output) if isinstance(output, tuple) else output
