"""Counts the bytes that Triton kernels load and store under the interpreter, per argument, and notes accesses out of bounds.

    with Meter() as meter: launch(...)
    meter.loaded["logits_ptr"], meter.stored["grad_ptr"]        bytes of unmasked lanes; lanes that share an address count once
    meter.out_of_bounds                                         descriptions; must be empty

Bounds are those of the tensors passed as arguments. The interpreter's builder is what every load and store goes through, so it is what is
wrapped.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import triton.runtime.interpreter as interpreter


class Meter:
    """A context manager; launches inside it are counted."""

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.out_of_bounds: list[str] = []
        self._arguments: list[tuple[str, int, int]] = []

    def __enter__(self) -> Meter:
        builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._saved = [
            (builder, "create_masked_load", builder.create_masked_load),
            (builder, "create_masked_store", builder.create_masked_store),
            (grid, "_init_args_hst", grid._init_args_hst),
        ]
        load, store, init = (function for _, _, function in self._saved)

        def counted_load(builder, pointers, mask, *rest):
            self._count(self.loaded, "load", pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            self._count(self.stored, "store", pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def init_arguments(executor, *args):
            host, keywords = init(executor, *args)
            named = [*zip(executor.arg_names, host, strict=False), *keywords.items()]
            self._arguments = [(name, *_extent(value)) for name, value in named if isinstance(value, torch.Tensor) and value.numel()]
            return host, keywords

        builder.create_masked_load, builder.create_masked_store, grid._init_args_hst = counted_load, counted_store, init_arguments
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._saved:
            setattr(owner, name, function)

    def _count(self, counter: Counter[str], kind: str, pointers, mask) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64)
        lanes = np.broadcast_to(np.asarray(mask.data), addresses.shape) if mask is not None else np.ones(addresses.shape, bool)
        addresses = np.unique(addresses[lanes])
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for name, low, high in sorted(self._arguments, key=lambda argument: argument[2] - argument[1]):
            inside = (addresses >= low) & (addresses + size <= high)
            counter[name] += int(inside.sum()) * size
            addresses = addresses[~inside]
        if addresses.size:
            self.out_of_bounds.append(f"{kind} of {addresses.size} x {size} bytes outside of every argument")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
