"""What a call on a GPU would compute and move, pass by pass, counted without one.

    with counted(float32_products=True) as passes:
        loss(inputs)  # tensors on the meta device; labels may be on the host
    sum(each.flops for each in passes), sum(each.bytes for each in passes)

A pass is one operation of torch or one launch of a Triton kernel. Its bytes are those of the
tensors that it reads and writes, each once: no cache is modelled, and no pass waits for another.
Inside, this package and TRL take the ways that they take on a GPU, and nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.fx.experimental import _config as symbolic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.instruments.launch import recorded
from benchmarks.instruments.operators import implementation_of

OVERWRITTEN = {"_backward_kernel": "mm_ptr"}
"""Arguments that a peer's kernel reads and writes in one, by kernel; ours take two."""
_FILLS = ("new_", "_like", "zeros", "ones", "full", "fill", "zero_", "arange")
"""In the names of operations that read nothing."""
_SCATTERS = ("index_copy_", "index_put", "index_add", "scatter")
"""Of those that write some of their first argument's elements, as many as they are given."""
_GATHERS = ("index_select", "gather", "aten::index.")
"""Of those that read as many elements as they hand out."""


class Pass(NamedTuple):
    """One operation or launch."""

    name: str
    flops: int
    bytes: int


class _Recorder(TorchDispatchMode):
    def __init__(self, fused_columns: int | None) -> None:
        super().__init__()
        self.passes: list[Pass] = []
        self._fused_columns = fused_columns

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        implementation = implementation_of(func)
        if implementation is not None:
            with self:
                return implementation(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 1  # Liger asks whether the upstream gradient is another number than 1: it is
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if not (func.is_view or "view" in func.name() or "empty" in func.name()):
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        name, product = func.name(), _PRODUCTS.get(func._overloadpacket)
        if product is None and self._has_logits((args, kwargs, result)):
            return  # part of the one read, and of the one read and write, of the product's result
        moved = _moved(name, args, kwargs, result)
        flops = 0 if product is None else product(*args)
        self.passes.append(Pass(name, flops, moved))
        if product is not None and self._has_logits(result):
            self.passes.append(Pass("fused", 0, 3 * sum(map(_size, _tensors(result)))))

    def _has_logits(self, tree: Any) -> bool:
        return any(t.ndim and t.shape[-1] == self._fused_columns for t in _tensors(tree))


def _product(left: torch.Tensor, right: torch.Tensor) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[-1]


def _batched(left: torch.Tensor, right: torch.Tensor) -> int:
    return left.shape[0] * 2 * left.shape[1] * left.shape[2] * right.shape[-1]


_PRODUCTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mm: lambda left, right, *_: _product(left, right),
    torch.ops.aten.addmm: lambda _, left, right, *__: _product(left, right),
    torch.ops.aten.addmm_: lambda _, left, right, *__: _product(left, right),
    torch.ops.aten.bmm: lambda left, right, *_: _batched(left, right),
}


def _moved(name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that one operation reads and writes."""
    read = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
    written = _tensors(result)
    if any(part in name for part in _FILLS):
        read = []
    elif any(part in name for part in _SCATTERS):
        read, written = read[1:], read[-1:]
    elif any(part in name for part in _GATHERS):
        read = [*read[1:], *written]
    elif kwargs.get("beta") == 0:
        read = read[1:]  # what the sum's memory held is ignored
    return sum(map(_size, read)) + sum(map(_size, written))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Less than its elements where it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextlib.contextmanager
def counted(*, float32_products: bool, fused_columns: int | None = None) -> Iterator[list[Pass]]:
    """The list gets the passes when the block ends.

    Args:
        float32_products: products of half precision can hand out the float32 sums that they make,
            as cuBLAS's can and ROCm's cannot.
        fused_columns: a compiler makes one read, and one read and write, of all that is done to
            tensors of so many columns: the least that it could make of it.
    """
    recorder = _Recorder(fused_columns)
    found: list[Pass] = []
    with _as_on_a_gpu(float32_products), recorded("sm_90") as launches, recorder:
        yield found
    found += recorder.passes
    for launch in launches:
        kernel = launch.kernel.__name__
        read = [value for value in launch.bound.values() if isinstance(value, torch.Tensor)]
        again = launch.bound.get(OVERWRITTEN.get(kernel, ""))
        moved = sum(map(_size, read)) + (0 if again is None else _size(again))
        found.append(Pass(kernel, 0, moved))


@contextlib.contextmanager
def _as_on_a_gpu(float32_products: bool) -> Iterator[None]:
    """What asks for the device of tensors on the meta device, or whether they have data."""
    from mpo_kernels import calls, functional, sequence_losses
    from mpo_kernels.losses import contract
    from mpo_kernels.ops import gradients, projection

    def is_half(tensor: torch.Tensor) -> bool:
        return tensor.dtype.itemsize == 2

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", {"MPO_KERNELS_BACKEND": "triton"}))
        # a CPU build of torch knows no autocast on the meta device
        stack.enter_context(patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # a mask on the meta device tells nothing: all that it asks of is taken to be there
        stack.enter_context(patch.object(symbolic, "meta_nonzero_assume_all_nonzero", True))
        # a loss that was looked at before
        stack.enter_context(patch.object(contract, "is_looked_at", lambda *_: False))
        for module in (calls, functional, sequence_losses):
            # hidden states are half precision; values in other dtypes are never asked for
            stack.enter_context(patch.object(module, "has_data", is_half))
        for module in (gradients, projection):
            promise = is_half if float32_products else lambda _: False
            stack.enter_context(patch.object(module, "gemms_return_float32", promise))
        with contextlib.suppress(ImportError):
            from trl.kernels import chunked_logprob

            stack.enter_context(patch.object(chunked_logprob, "_use_triton", lambda _: True))
            stack.enter_context(
                patch.object(chunked_logprob, "_addmm_fp32", _trl_product(float32_products))
            )
        yield


def _trl_product(float32_products: bool) -> Any:
    """TRL's own, of tensors whose device it does not ask for."""

    def add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        if float32_products:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(left.float(), right.float())

    return add
