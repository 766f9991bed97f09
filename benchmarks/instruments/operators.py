"""Dispatch modes that see what the package's registered operators do inside; to a plain mode they
are opaque."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import weakref
from types import FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mpo_kernels.ops
from mpo_kernels.ops.operator import Operator

_IMPLEMENTATIONS = {
    op.definition._qualname: op.definition._init_fn
    for module in pkgutil.iter_modules(mpo_kernels.ops.__path__, "mpo_kernels.ops.")
    for op in vars(importlib.import_module(module.name)).values()
    if isinstance(op, Operator)
}


def implementation_of(func):
    return _IMPLEMENTATIONS.get(func.name()) if func.namespace == "mpo_kernels" else None


def _in_place_product(total: list, left: list, right: list, **_: object) -> int:
    """total += left @ right, whose name torch's counter does not know; half precision on a CPU
    makes them. Of shapes."""
    return 2 * left[0] * left[1] * right[1]


class Flops:
    """`with Flops() as counter: ...; counter.total` counted by torch.utils.flop_counter."""

    def __enter__(self) -> Flops:
        self._counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: _in_place_product}
        )
        self._opener = _Opener()
        self._counter.__enter__()
        self._opener.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._opener.__exit__(*exc)
        self._counter.__exit__(*exc)
        self.total = self._counter.get_total_flops()


class _Opener(TorchDispatchMode):
    """Runs a registered operator as the plain function that it is, under the modes below this
    one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return (implementation_of(func) or func)(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """Bytes of storages that operations make anew: `peak` alive at once, `alive` now, `total` of
    all, `largest` of one."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = self.peak = self.alive = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        implementation = implementation_of(func)
        if implementation is not None:
            with self:
                return implementation(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._note(tensor)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        if _in_interpreter():
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.total += size
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.alive -= self._known.pop(key, 0)


class Moved(TorchDispatchMode):
    """`total` bytes of the tensors that torch's operations read and write, each once per operation.
    Not counted: views, empty tensors, and what Triton kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        implementation = implementation_of(func)
        if implementation is not None:
            with self:
                return implementation(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.name() or _in_interpreter()):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    dense = tensor.numel() * tensor.element_size()
                    # less where it is expanded
                    self.total += min(dense, tensor.untyped_storage().nbytes())
        return result


def _in_interpreter() -> bool:
    """Triton's interpreter copies its arguments; that is no memory of ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("runtime/interpreter.py"):
            return True
        frame = frame.f_back
    return False
