"""The door of every registered operator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch


def operator(
    name: str, schema: str, *, strided: Collection[str] = ()
) -> Callable[[Callable], torch.library.CustomOpDef]:
    """`torch.library.custom_op` that mutates nothing and whose tensors arrive contiguous, except
    those named in `strided`.

    Kernels take most tensors by their pointer alone, so another stride would make them read other
    numbers, or beyond the memory. A caller may give any view, a compiler other strides than those
    it traced, and autograd an expanded gradient: nobody but the operator itself can see to it. The
    tensors in `strided` are large, and the function minds their strides.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        names = list(inspect.signature(function).parameters)
        assert set(strided) <= set(names), f"{name} has no arguments {set(strided) - set(names)}"
        by_pointer = [argument not in strided for argument in names]

        @functools.wraps(function)
        def with_contiguous_tensors(*arguments: Any) -> Any:
            given = zip(arguments, by_pointer, strict=True)
            return function(
                *(
                    a.contiguous() if is_bare and isinstance(a, torch.Tensor) else a
                    for a, is_bare in given
                )
            )

        return torch.library.custom_op(
            name, with_contiguous_tensors, mutates_args=(), schema=schema
        )

    return register
