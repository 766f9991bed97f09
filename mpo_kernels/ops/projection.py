"""The linear head: hidden states to logits, a chunk of rows at a time, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mpo_kernels.backends.results import RowStats
from mpo_kernels.ops.chunks import rows_per_chunk
from mpo_kernels.options import statistics_dtype
from mpo_kernels.parallel import Parallel, widest_slice

PRODUCT_COLUMNS = 8192
"""Vocabulary columns that are widened to float32 at a time where half-precision GEMMs round their
results."""


@dataclass(frozen=True)
class Head:
    """A linear head as operators take it: z = H W^T + b."""

    weight: torch.Tensor
    """(V, D)"""
    bias: torch.Tensor | None
    """(V,)"""
    gemm_dtype: torch.dtype | None
    """Of its products under autocast; None is that of the hidden states."""
    chunk_bytes: int | None
    """Bytes of logits that exist at once; None is the default."""
    logits_dtype: torch.dtype | None = None
    """Of the logits; None is that of the products."""

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Of its products: of what goes into them, and of what comes out but for the logits."""
        return self.gemm_dtype or hidden.dtype

    def dtype_of_logits(self, hidden: torch.Tensor) -> torch.dtype:
        return self.logits_dtype or self.dtype(hidden)

    def rows_per_chunk(self, hidden: torch.Tensor, parallel: Parallel | None) -> int:
        """Rows whose logits fit the budget, the same on all ranks."""
        vocab = widest_slice(self.weight.shape[0], parallel)
        return rows_per_chunk(vocab, self.dtype_of_logits(hidden).itemsize, self.chunk_bytes)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def any(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad


class Projection:
    """A head in the dtype of its products, with memory for the logits of one chunk."""

    def __init__(self, hidden: torch.Tensor, head: Head) -> None:
        self.dtype = head.dtype(hidden)
        self.weight = head.weight.to(self.dtype)
        self._hidden = hidden
        self._bias: torch.Tensor | None = None if head.bias is None else head.bias.to(self.dtype)
        dtype = head.dtype_of_logits(hidden)
        self.no_logits = self._logits = self.weight.new_empty(0, self.weight.shape[0], dtype=dtype)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) hidden states of these rows as the products take them."""
        return self._hidden.index_select(0, rows).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (1, n, V), in the memory of the last call's: two chunks are never there at
        once."""
        rows = hidden.shape[0]
        if self._logits.shape[0] < rows:
            self._logits = self.no_logits  # goes before its larger successor comes
            self._logits = self.no_logits.new_empty(rows, self.weight.shape[0])
        out = self._logits[:rows]
        if out.dtype != self.dtype:
            _wide_product(hidden, self.weight, self._bias, out)
            return out[None]
        if self._bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)[None]
        return torch.addmm(self._bias, hidden, self.weight.t(), out=out)[None]


def _wide_product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out (n, V) = hidden (n, D) weight^T + bias of half precision, never rounded to it."""
    if gemms_return_float32(hidden):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
        return
    wide = hidden.to(out.dtype)
    for rows, columns in zip(
        weight.split(PRODUCT_COLUMNS), out.split(PRODUCT_COLUMNS, 1), strict=True
    ):
        torch.mm(wide, rows.to(out.dtype).t(), out=columns)
    if bias is not None:
        out.add_(bias)


def gemms_return_float32(tensor: torch.Tensor) -> bool:
    """Half-precision GEMMs can hand out their float32 sums: cuBLAS, through PyTorch 2.8 and
    later."""
    is_half = tensor.dtype.itemsize == 2
    return is_half and tensor.device.type == "cuda" and torch.version.hip is None


class TokenOutputs(NamedTuple):
    """Per-token results at their places among all M labels: log-probabilities, and entropy and
    arg-max, (0,) where they are not asked for."""

    logp: torch.Tensor
    entropy: torch.Tensor
    is_argmax: torch.Tensor

    @classmethod
    def zeros(cls, like: torch.Tensor, rows: int, extra: int) -> TokenOutputs:
        """Of positions that are not scored; entropy and arg-max of `extra` of them."""
        dtype = statistics_dtype(like)
        return cls(
            like.new_zeros(rows, dtype=dtype),
            like.new_zeros(extra, dtype=dtype),
            like.new_zeros(extra, dtype=torch.bool),
        )

    def put(self, indices: torch.Tensor, stats: RowStats) -> None:
        """Takes in the rows at `indices`."""
        self.logp.index_copy_(0, indices, stats.logp)
        if stats.entropy is not None and stats.is_argmax is not None:
            self.entropy.index_copy_(0, indices, stats.entropy)
            self.is_argmax.index_copy_(0, indices, stats.is_argmax)
