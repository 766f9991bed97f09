"""Sums of a linear head's gradients over chunks of rows, and their scaling by an upstream gradient.

With G = onehot - softmax and the gradient c_i of row i's log-probability, row factors commute with
both GEMMs of z = H W^T + b:

    dH = diag(c) G W        dW = (diag(c) G)^T H        db = sum over rows of diag(c) G         (10)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpo_kernels.ops.once import is_plain
from mpo_kernels.ops.operator import operator
from mpo_kernels.ops.projection import (
    PRODUCT_COLUMNS,
    Head,
    Needs,
    Projection,
    gemms_return_float32,
)
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import statistics_dtype
from mpo_kernels.parallel import Parallel

FP16_PEAK = 256.0
"""What bounds a chunk's float16 logit gradients, after a power of two, within a factor of two.
Unscaled they are of the size of a probability divided by pairs and tokens, which float16 rounds to
0; a GradScaler's factor comes too late, in backward. 256 leaves 2^-32 above 0. Every factor that
comes before the rounding is in the power: a row's gradient, and the logit scale (the softcap's
slope is at most 1). Sums over them, dH and dW, are of any size: they stay in float32 until the
power is divided out."""


class HeadGrads(NamedTuple):
    """Gradients of a head; those that are not needed are empty."""

    hidden: torch.Tensor
    """(M, D), 0 where no row was added."""
    pending: torch.Tensor
    """(M,) what row i of `hidden` is still to be multiplied by; (0,) where nothing is left to do.
    """
    weight: torch.Tensor
    """(V, D)"""
    bias: torch.Tensor
    """(V,)"""


class Upstream(NamedTuple):
    """Gradients of n rows' log-probabilities, ready for logits of some dtype."""

    row_grads: torch.Tensor
    """(n,), multiplied by `boost`."""
    boost: torch.Tensor | None
    """() power of two that keeps the logits' gradients in float16's range; None is 1."""


class HeadGradients:
    """Accumulates dH, dW and db chunk by chunk; what is not needed is not computed.

    dW and db are sums in at least float32, since sums over many chunks in bf16 would lose most of
    what the later chunks add. Where a single chunk holds all rows there is no sum: they are written
    once, in the dtypes of weight and bias, and no float32 tensor of their size exists. All of that
    is float32 at least where it will be multiplied by a factor that is not known yet, so that it is
    rounded once and not twice; and so is dH.

    Rows of a group in pieces may come before a factor of theirs is known: between `defer` and
    `resolve`. Where dW or db is needed it is one factor, and dW was empty, since it is scaled as a
    whole.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        projection: Projection,
        needs: Needs,
        *,
        rows: int,
        scaled_later: bool,
        in_one_chunk: bool = False,
    ) -> None:
        """`rows`: M, of dH. `projection`: the head as the products take it. `scaled_later`: by a
        factor that the caller applies to the result. `in_one_chunk`: `add` is called once at most.
        """
        self._weight, self._needs, self._scaled_later = projection.weight, needs, scaled_later
        self._dtypes = (
            head.weight.dtype,
            head.weight.dtype if head.bias is None else head.bias.dtype,
        )
        precise = torch.promote_types(head.weight.dtype, torch.float32)
        is_sum = scaled_later or not in_one_chunk
        dtype = hidden_grad_dtype(hidden.dtype) if scaled_later else hidden.dtype
        self._hidden_grad = hidden.new_zeros(
            (rows, hidden.shape[1]) if needs.hidden_grad else (0,), dtype=dtype
        )
        self._pending = hidden.new_ones(
            rows if needs.hidden_grad and scaled_later else 0, dtype=statistics_dtype(hidden)
        )
        self._weight_grad = head.weight.new_empty(
            head.weight.shape if needs.weight_grad else (0,),
            dtype=precise if is_sum else head.weight.dtype,
        )
        self._bias_grad = head.weight.new_zeros(
            head.weight.shape[0] if needs.bias_grad else 0, dtype=precise
        )
        self._settled_bias_grad = self._bias_grad
        # its first product is written over what the memory holds, so nothing is filled with zeros
        # first
        self._weight_is_empty = True

    def add(
        self,
        indices: torch.Tensor,
        grad_logits: torch.Tensor,
        hidden: torch.Tensor,
        boost: torch.Tensor | None,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Takes in grad_logits (n, V) of the rows hidden (n, D) at `indices` of dH; grad_logits
        were multiplied by `boost` (), if any, and are still to be multiplied by `factors` (n,).

        The boost is divided out again; the rows of dH that are scaled in backward anyway keep it as
        pending. The factors commute with the products (equation 10).
        """
        if grad_logits.dtype != self._weight.dtype:
            # of float32 logits of half-precision products: rounded here, once, and whole, since
            # directions have no boost
            whole = grad_logits if factors is None else grad_logits * factors[:, None]
            grad_logits, factors = whole.to(self._weight.dtype), None
        if self._needs.hidden_grad:
            self._add_to_hidden(indices, grad_logits, boost, factors)
        if self._needs.weight_grad:
            hidden = hidden if factors is None else hidden * factors[:, None]
            _add_product(
                self._weight_grad, grad_logits, hidden, boost, overwrite=self._weight_is_empty
            )
            self._weight_is_empty = False
        if self._needs.bias_grad:
            total = _column_sums(grad_logits, factors, self._bias_grad.dtype)
            self._bias_grad.add_(total if boost is None else total.div_(boost))

    def _add_to_hidden(
        self,
        indices: torch.Tensor,
        grad_logits: torch.Tensor,
        boost: torch.Tensor | None,
        factors: torch.Tensor | None,
    ) -> None:
        dtype = self._hidden_grad.dtype
        if boost is None or self._scaled_later:
            product = _hidden_product(grad_logits, self._weight, dtype)
        else:
            product = _hidden_product(grad_logits, self._weight, hidden_grad_dtype(dtype))
            product = product.div_(boost).to(dtype)
        if factors is not None:
            product.mul_(factors[:, None])
        self._hidden_grad.index_copy_(0, indices, product)
        if boost is not None and self._scaled_later:
            self._pending.index_copy_(0, indices, (1 / boost).expand(indices.shape))

    @property
    def weight_is_empty(self) -> bool:
        """Whether no row is in dW yet, so that it can be multiplied as a whole."""
        return self._weight_is_empty

    def defer(self) -> None:
        """From here on rows lack a factor."""
        self._settled_bias_grad = self._bias_grad
        self._bias_grad = torch.zeros_like(self._bias_grad)

    def resolve(
        self, indices: torch.Tensor, factor: torch.Tensor, boost: torch.Tensor | None
    ) -> None:
        """The rows at `indices`, which came since `defer`, lacked `factor` (1,)."""
        self._weight_grad.mul_(factor)
        self._bias_grad = self._settled_bias_grad.addcmul_(self._bias_grad, factor)
        if self._needs.hidden_grad:
            pending = factor if boost is None else factor / boost
            self._pending.index_copy_(0, indices, pending.expand(indices.shape))

    def result(self, parallel: Parallel | None, *, boost: torch.Tensor | None = None) -> HeadGrads:
        """The sums, those of the hidden states over all slices of the vocabulary. `boost`: what all
        rows of dH were multiplied by, which is divided out here."""
        if self._weight_is_empty:
            self._weight_grad.zero_()
        if boost is not None:
            self._hidden_grad.div_(boost)
        if self._needs.hidden_grad and parallel is not None:
            parallel.add_hidden_grads(self._hidden_grad)
        weight, bias = self._weight_grad, self._bias_grad
        if not self._scaled_later:
            weight, bias = weight.to(self._dtypes[0]), bias.to(self._dtypes[1])
        return HeadGrads(self._hidden_grad, self._pending, weight, bias)


def hidden_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of a dH which is scaled in backward."""
    return torch.promote_types(dtype, torch.float32)


def _is_widened(tensor: torch.Tensor) -> bool:
    """Other GEMMs round their results to half precision: on a GPU bfloat16 bears it, float16 would
    overflow."""
    is_half = tensor.dtype.itemsize == 2
    return is_half and (tensor.device.type == "cpu" or tensor.dtype == torch.float16)


def _hidden_product(
    grad_logits: torch.Tensor, head: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad_logits (n, V) W (V, D) in `dtype`, rounded once."""
    if grad_logits.dtype == dtype or grad_logits.dtype.itemsize > dtype.itemsize:
        return torch.mm(grad_logits, head).to(dtype)
    if gemms_return_float32(grad_logits):
        return torch.mm(grad_logits, head, out_dtype=dtype)
    if _is_widened(grad_logits):
        total = grad_logits.new_zeros(grad_logits.shape[0], head.shape[1], dtype=dtype)
        for columns, rows in zip(
            grad_logits.split(PRODUCT_COLUMNS, 1), head.split(PRODUCT_COLUMNS), strict=True
        ):
            total.addmm_(columns.to(dtype), rows.to(dtype))
        return total
    return torch.mm(grad_logits, head).to(dtype)


def _add_product(
    total: torch.Tensor,
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    boost: torch.Tensor | None = None,
    *,
    overwrite: bool,
) -> None:
    """total (V, D) += grad_logits^T (V, n) hidden (n, D) / boost, the product rounded once to the
    dtype of `total`."""
    beta = 0 if overwrite else 1  # 0 ignores what is there, NaN included
    is_widened, precise = _is_widened(grad_logits), torch.promote_types(total.dtype, torch.float32)
    if boost is None and grad_logits.dtype == total.dtype and not is_widened:
        torch.addmm(total, grad_logits.T, hidden, beta=beta, out=total)
        return
    if boost is None and total.dtype == torch.float32 and gemms_return_float32(grad_logits):
        torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
        return
    # Some rows of dW at a time: all of them in float32 would be what this is to do without.
    wide = hidden.to(precise) if is_widened else hidden
    for rows, columns in zip(
        total.split(PRODUCT_COLUMNS), grad_logits.split(PRODUCT_COLUMNS, 1), strict=True
    ):
        if boost is None and total.dtype == precise and is_widened:
            rows.addmm_(columns.to(precise).T, wide, beta=beta)
            continue
        product = _weight_product(columns, hidden, wide)
        product = product if boost is None else product.div_(boost)
        rows.copy_(product) if overwrite else rows.add_(product)


def _weight_product(
    grad_logits: torch.Tensor, hidden: torch.Tensor, wide: torch.Tensor
) -> torch.Tensor:
    """grad_logits^T hidden in the dtype of `wide`, which is `hidden` or a copy in float32."""
    if wide is not hidden:
        return grad_logits.to(wide.dtype).T @ wide
    if gemms_return_float32(grad_logits):
        return torch.mm(grad_logits.T, hidden, out_dtype=torch.float32)
    return grad_logits.T @ hidden  # rounded once; the sum of several is not


def _column_sums(
    grad_logits: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """(n, V), its rows times factors (n,) -> (V,) in `dtype`."""
    if factors is not None:
        return torch.mv(grad_logits.T, factors).to(dtype)
    if grad_logits.device.type != "cpu" or grad_logits.dtype == dtype:
        return grad_logits.sum(0, dtype=dtype)
    # the CPU copies to the other dtype what it sums
    parts = grad_logits.split(PRODUCT_COLUMNS, 1)
    return torch.cat([part.sum(0, dtype=dtype) for part in parts])


def boosted(
    row_grads: torch.Tensor, dtype: torch.dtype, logit_scale: float | torch.Tensor
) -> Upstream:
    """Row gradients times the power of two by which their logits' gradients are multiplied before
    they are rounded to float16; as they are for other dtypes.

    Found on the device, without a sync. Rows whose gradients are all 0 keep them; a gradient that
    is not finite gives NaN, as it should.
    """
    boost = boost_for(row_grads, dtype, logit_scale)
    return Upstream(row_grads if boost is None else row_grads * boost, boost)


def boost_for(
    bounds: torch.Tensor, dtype: torch.dtype, logit_scale: float | torch.Tensor
) -> torch.Tensor | None:
    """() that power of two, or None for 1: no gradient of a final logit of row i exceeds
    bounds[i] (n,) in size."""
    if dtype != torch.float16:
        return None
    if bounds.numel() == 0:  # a rank of a context that has none of these rows
        return bounds.new_ones(())
    ratio = FP16_PEAK / (bounds.abs().amax() * logit_scale).abs().clamp_min(1e-30)
    mantissa, _ = torch.frexp(ratio)
    return ratio / mantissa


def spread(grad: torch.Tensor, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """(M, ...) gradients of gathered rows -> (count, ...) of all rows, as autograd of hidden[rows]
    has them: those of a row that was gathered several times are added up in their own dtype, here
    always in the same order. Without `rows` they are all rows."""
    if rows is None:
        return grad
    total, rows = grad.new_zeros(count, *grad.shape[1:]), on_device(rows, grad.device)
    # index_put_ is what autograd calls. For float32 on the CPU it adds in any order; elsewhere it
    # is index_add_ that does, or that rounds otherwise.
    if grad.device.type == "cpu" and grad.dtype == torch.float32:
        return total.index_add_(0, rows, grad)
    return total.index_put_((rows,), grad, accumulate=True)


def scaled_in_backward(
    grad: torch.Tensor, pending: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad (R, ...) * scale () * pending (R,) in `dtype`: in the place of `grad` where nobody can
    ask for it again, else a new tensor.

    A new tensor would be a second weight's gradient, for many heads the largest tensor of a step.
    """
    if grad.dtype == dtype and graph_ends_here(grad, scale):
        return grad.mul_(_factor(grad, pending, scale))
    return scaled(grad, pending, scale, dtype)


def graph_ends_here(*tensors: torch.Tensor) -> bool:
    """Whether this is a backward pass without retain_graph on plain tensors, not traced by a
    compiler and not batched."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return not keeps_graph() and all(map(is_plain, tensors))


def _factor(grad: torch.Tensor, pending: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    return scale if pending is None else (pending * scale).view(-1, *(1,) * (grad.ndim - 1))


@operator("mpo_kernels::scaled", strided=("grad",))
def scaled(
    grad: torch.Tensor, pending: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad (R, ...) * scale () * pending (R,) in `dtype`, in one pass that does not change `grad`,
    so that retain_graph is safe."""
    return torch.mul(
        grad,
        _factor(grad, pending, scale),
        out=torch.empty(grad.shape, dtype=dtype, device=grad.device),
    )


@scaled.register_fake
def _(grad, pending, scale, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)
