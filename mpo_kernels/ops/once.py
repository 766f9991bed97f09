"""First derivatives, in reverse, and nothing silently beyond them.

Kernels write gradients behind autograd's back, and some are computed in the forward pass already:
to autograd they are constants, whose derivative is 0. Registered operators also drop the tangents
of forward mode. So both are refused, whichever operator it is: a second derivative when it is asked
for (`create_graph=True` alone asks for nothing yet), forward mode and torch.func's transforms at
the door.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_ADVICE = (
    "mpo_kernels computes first derivatives in reverse mode only; mpo_kernels.oracle is plain"
    " PyTorch and has all the others."
)
_SECOND = (
    "A gradient of mpo_kernels was differentiated (second derivatives: create_graph=True, hvp,"
    f" hessian, gradient penalties). {_ADVICE}"
)


def check_mode(*tensors: torch.Tensor | None) -> None:
    """Refuses forward mode, and torch.func's grad, vjp, jvp, jacrev, jacfwd and hessian, of any of
    the tensors.

    Raises:
        NotImplementedError: a tensor carries a tangent, or is a variable of one of these
            transforms.
    """
    forward = forward_ad._current_level >= 0  # in torch.func.jvp too
    # which knows no tangents of the tensors that it will be called with
    if torch.compiler.is_compiling():
        if forward:
            raise NotImplementedError(f"The loss is compiled inside of forward mode. {_ADVICE}")
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            if (forward or torch.is_grad_enabled()) and _is_variable_of_a_transform(tensor):
                raise NotImplementedError(
                    "The loss is called inside of torch.func.grad, vjp, jvp or a transform made of"
                    f" them. {_ADVICE}"
                )
            if (
                forward
                and not is_wrapped(tensor)
                and forward_ad.unpack_dual(tensor).tangent is not None
            ):
                raise NotImplementedError(
                    f"The loss is called with a dual tensor (forward mode). {_ADVICE}"
                )


def remember_inputs(ctx: Any, inputs: tuple) -> None:
    """Keeps the place of the inputs in autograd's graph on `ctx`, not their data."""
    trained = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if trained:
        with torch.enable_grad():
            ctx.origin = _Origin.apply(*trained)


def refusing_second_derivatives(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """`backward`; where a graph is recorded of it (create_graph=True), such that following that
    graph raises."""

    def refusing(ctx: Any, *upstream: torch.Tensor | None) -> tuple:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        return tuple(
            None if grad is None else _Constant.apply(grad, ctx.origin, *upstream) for grad in grads
        )

    return refusing


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is one tensor in memory: none of a compiler's, and no batch of vmap or of
    `is_grads_batched`."""
    return (
        type(tensor) is torch.Tensor
        and not is_wrapped(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


class _Origin(torch.autograd.Function):
    """An empty tensor that depends on all the inputs: without that, autograd would not come by
    `_Constant` on its way to them."""

    @staticmethod
    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple:
        raise NotImplementedError(_SECOND)


class _Constant(torch.autograd.Function):
    """The gradient as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: torch.Tensor, *origins: torch.Tensor | None) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple:
        raise NotImplementedError(_SECOND)


def has_data(tensor: torch.Tensor) -> bool:
    """Not so of tensors that are only asked for their shapes: on the meta device, and fake ones of
    whatever device."""
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) holds it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_variable_of_a_transform(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func differentiates this tensor, however deep below those of
    others (vmap) it is wrapped."""
    while is_wrapped(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
