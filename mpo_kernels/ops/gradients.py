"""Sums of a linear head's gradients over chunks of rows, and their scaling by an upstream gradient.

With G = onehot - softmax and the gradient c_i of row i's log-probability, row factors commute with
both GEMMs of z = H W^T + b:

    dH = diag(c) G W        dW = (diag(c) G)^T H        db = sum over rows of diag(c) G         (10)
"""

from __future__ import annotations

import torch

from mpo_kernels.ops.once import is_plain
from mpo_kernels.ops.operator import operator

FP16_PEAK = 256.0
"""What bounds a chunk's float16 logit gradients, after a power of two, within a factor of two.
Unscaled they are of the size of a probability divided by pairs and tokens, which float16 rounds to
0; a GradScaler's factor comes too late, in backward. 256 leaves 2^-32 above 0. Every factor that
comes before the rounding is in the power: a row's gradient, and the logit scale (the softcap's
slope is at most 1). Sums over them, dH and dW, are of any size: they stay in float32 until the
power is divided out."""

_PRODUCT_COLUMNS = 8192
"""Vocabulary columns that are widened to float32 at a time where half-precision GEMMs round their
results."""


class HeadGradients:
    """Accumulates dH, dW and db chunk by chunk; what is not needed is not computed.

    weight (V, D) and bias (V,) are at least float32, since sums over many chunks in bf16 would lose
    most of what the later chunks add. hidden (N, D), zero where no row was added, is so too where
    it will be multiplied by a factor that is not known yet, so that it is rounded once and not
    twice.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: torch.Tensor,
        needs: tuple[bool, bool, bool],
        *,
        scaled_later: bool,
    ) -> None:
        """`head`: the weight (V, D) as the GEMMs take it; the others as their gradients are
        wanted."""
        self._head, self._needs = head, needs
        precise = torch.promote_types(weight.dtype, torch.float32)
        dtype = hidden_grad_dtype(hidden.dtype) if scaled_later else hidden.dtype
        self.hidden = torch.zeros(
            hidden.shape if needs[0] else (0,), dtype=dtype, device=hidden.device
        )
        self.weight = torch.empty(
            weight.shape if needs[1] else (0,), dtype=precise, device=weight.device
        )
        self.bias = torch.zeros(
            weight.shape[0] if needs[2] else 0, dtype=precise, device=weight.device
        )
        # its first product is written over what the memory holds, so nothing is filled with zeros
        # first
        self.weight_is_empty = True
        if bias is None:
            assert not needs[2]

    def add(
        self,
        places: torch.Tensor,
        grad_logits: torch.Tensor,
        hidden: torch.Tensor,
        divisor: torch.Tensor | None,
    ) -> None:
        """Takes in grad_logits (n, V) of the rows hidden (n, D) at `places`; grad_logits were
        multiplied by `divisor` (), if any.

        dW and db are divided by it again, dH is not: its rows are scaled in backward anyway.
        """
        if self._needs[0]:
            self.hidden.index_copy_(
                0, places, _hidden_product(grad_logits, self._head, self.hidden.dtype)
            )
        if self._needs[1]:
            if divisor is None:
                _add_product(self.weight, grad_logits, hidden, overwrite=self.weight_is_empty)
            else:
                product = torch.empty_like(self.weight)
                _add_product(product, grad_logits, hidden, overwrite=True)
                self.weight = (
                    product.div_(divisor)
                    if self.weight_is_empty
                    else self.weight.addcdiv_(product, divisor)
                )
            self.weight_is_empty = False
        if self._needs[2]:
            total = grad_logits.sum(0, dtype=self.bias.dtype)
            self.bias.add_(total if divisor is None else total.div_(divisor))

    def finish(self) -> None:
        """Where no row came, the weight's gradient is 0."""
        if self.weight_is_empty:
            self.weight.zero_()


def hidden_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of a dH which is scaled in backward."""
    return torch.promote_types(dtype, torch.float32)


def _gemms_return_float32(tensor: torch.Tensor) -> bool:
    """Half-precision GEMMs can hand out their float32 sums: cuBLAS, through PyTorch 2.8 and
    later."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def _is_widened(tensor: torch.Tensor) -> bool:
    """Other GEMMs round their results to half precision: on a GPU bfloat16 bears it, float16 would
    overflow."""
    return tensor.device.type == "cpu" or tensor.dtype == torch.float16


def _hidden_product(
    grad_logits: torch.Tensor, head: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad_logits (n, V) W (V, D) in `dtype`, rounded once."""
    if grad_logits.dtype == dtype or grad_logits.dtype.itemsize > dtype.itemsize:
        return torch.mm(grad_logits, head).to(dtype)
    if _gemms_return_float32(grad_logits):
        return torch.mm(grad_logits, head, out_dtype=dtype)
    if _is_widened(grad_logits):
        total = grad_logits.new_zeros(grad_logits.shape[0], head.shape[1], dtype=dtype)
        for columns, rows in zip(
            grad_logits.split(_PRODUCT_COLUMNS, 1), head.split(_PRODUCT_COLUMNS), strict=True
        ):
            total.addmm_(columns.to(dtype), rows.to(dtype))
        return total
    return torch.mm(grad_logits, head).to(dtype)


def _add_product(
    total: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, *, overwrite: bool
) -> None:
    """total (V, D) += grad_logits^T (V, n) hidden (n, D), the sum in the dtype of `total`."""
    beta = 0 if overwrite else 1  # 0 ignores what is there, NaN included
    if grad_logits.dtype == total.dtype:
        torch.addmm(total, grad_logits.T, hidden, beta=beta, out=total)
    elif _gemms_return_float32(grad_logits):
        torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    elif _is_widened(grad_logits):
        wide = hidden.to(total.dtype)
        for rows, columns in zip(
            total.split(_PRODUCT_COLUMNS), grad_logits.split(_PRODUCT_COLUMNS, 1), strict=True
        ):
            rows.addmm_(columns.to(total.dtype).T, wide, beta=beta)
    else:  # each chunk's product is rounded once; their sum is not
        product = grad_logits.T @ hidden
        total.copy_(product) if overwrite else total.add_(product)


def power_of_two_for(
    row_grad: torch.Tensor, dtype: torch.dtype, logit_scale: float | torch.Tensor
) -> torch.Tensor | None:
    """() power of two by which row gradients are multiplied before their logits' gradients are
    rounded to float16; None for other dtypes.

    Found on the device, without a sync. Rows whose gradients are all 0 keep them; a gradient that
    is not finite gives NaN, as it should.
    """
    if dtype != torch.float16:
        return None
    if row_grad.numel() == 0:  # a rank of a context that has none of these rows
        return row_grad.new_ones(())
    ratio = FP16_PEAK / (row_grad.abs().amax() * logit_scale).abs().clamp_min(1e-30)
    mantissa, _ = torch.frexp(ratio)
    return ratio / mantissa


def scaled_in_backward(
    grad: torch.Tensor, row_scale: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad (R, ...) * scale () * row_scale (R,) in `dtype`: in the place of `grad` where nobody can
    ask for it again, else a new tensor.

    A new tensor would be a second weight's gradient, for many heads the largest tensor of a step.
    """
    if grad.dtype == dtype and _graph_ends_here(grad, scale):
        return grad.mul_(_factor(grad, row_scale, scale))
    return scaled(grad, row_scale, scale, dtype)


def _graph_ends_here(*tensors: torch.Tensor) -> bool:
    """Whether this is a backward pass without retain_graph on plain tensors, not traced by a
    compiler and not batched."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return not keeps_graph() and all(map(is_plain, tensors))


def _factor(
    grad: torch.Tensor, row_scale: torch.Tensor | None, scale: torch.Tensor
) -> torch.Tensor:
    return scale if row_scale is None else (row_scale * scale).view(-1, *(1,) * (grad.ndim - 1))


@operator(
    "mpo_kernels::scaled",
    schema="(Tensor grad, Tensor? row_scale, Tensor scale, ScalarType dtype) -> Tensor",
    strided=("grad",),
)
def scaled(grad, row_scale, scale, dtype):
    """grad (R, ...) * scale () * row_scale (R,) in `dtype`, in one pass that does not change
    `grad`, so that retain_graph is safe."""
    return torch.mul(
        grad,
        _factor(grad, row_scale, scale),
        out=torch.empty(grad.shape, dtype=dtype, device=grad.device),
    )


@scaled.register_fake
def _(grad, row_scale, scale, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)
