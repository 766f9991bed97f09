"""Kernels of flash-attention for a CPU: their definition in float64, span by span, behind the same
operators. Each call is held to what the real ones ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mpo.models import attention

PYTORCHS, FLASH_ATTN = "PyTorch's flash-attention", "flash-attn"


def _check(q, k, v, q_offsets, k_offsets, longest_q, longest_k) -> None:
    for x, offsets, longest in ((q, q_offsets, longest_q), (k, k_offsets, longest_k)):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous()
        assert offsets[0] == 0 and offsets[-1] == len(x) and type(longest) is int
        assert int(offsets.diff().min()) > 0 and int(offsets.diff().max()) == longest
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and q.dtype == k.dtype == v.dtype


def _spans(tensors: dict[str, torch.Tensor], q_offsets, k_offsets) -> Iterator[Any]:
    """Slices of each span in float64, keys and values once for each query head."""
    groups = tensors["q"].shape[1] // tensors["k"].shape[1]
    for i in range(len(q_offsets) - 1):
        rows, keys = slice(*q_offsets[i : i + 2].tolist()), slice(*k_offsets[i : i + 2].tolist())
        yield (
            rows,
            keys,
            {
                name: x[keys].double().repeat_interleave(groups, 1)
                if name in "kv"
                else x[rows].double()
                for name, x in tensors.items()
            },
        )


def _weights(q, k, scale: float, window: int, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one span: weights (heads, n, m), and the derivative of the capped scores."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    slope = torch.ones_like(scores)
    if softcap:
        slope = 1 - torch.tanh(scores / softcap) ** 2
        scores = softcap * torch.tanh(scores / softcap)
    n, m = scores.shape[1:]
    back = torch.arange(m - n, m)[:, None] - torch.arange(m)  # from a query to a key before it
    seen = (back >= 0) & ((back <= window) | torch.tensor(window < 0))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1), slope


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """window: keys that a query sees before its own; -1 for all."""
    _check(q, k, v, q_offsets, k_offsets, longest_q, longest_k)
    out = torch.empty_like(q)
    for rows, _, x in _spans({"q": q, "k": k, "v": v}, q_offsets, k_offsets):
        weights, _ = _weights(x["q"], x["k"], scale, window, softcap)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, x["v"]).to(q.dtype)
    return out


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for rows, keys, x in _spans({"q": q, "k": k, "v": v, "grad": grad}, q_offsets, k_offsets):
        weights, slope = _weights(x["q"], x["k"], scale, window, softcap)
        of_weights = torch.einsum("qhd,khd->hqk", x["grad"], x["v"])
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores = of_scores * slope * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, x["k"]).to(q.dtype)
        of_k = torch.einsum("hqk,qhd->khd", of_scores, x["q"])
        of_v = torch.einsum("hqk,qhd->khd", weights, x["grad"])
        for one, of_heads in ((grads[1], of_k), (grads[2], of_v)):
            one[keys] = of_heads.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
    return tuple(grads)


def _aten_forward(q, k, v, q_offsets, k_offsets, longest_q, longest_k, dropout, causal, debug, **o):
    assert causal and not debug and dropout == 0 and o["window_size_right"] == 0
    sizes = (q_offsets, k_offsets, longest_q, longest_k)
    out = forward(q, k, v, *sizes, o["scale"], o["window_size_left"])
    return out, q.new_zeros(q.shape[1], len(q)), q.new_zeros(2), q.new_zeros(0), q.new_zeros(0)


def _aten_backward(
    grad, q, k, v, out, lse, q_offsets, k_offsets, *_, scale, window_size_left, **__
):
    return backward(grad, q, k, v, q_offsets, k_offsets, scale, window_size_left)


for _name, _function in (("forward", forward), ("backward", backward)):
    torch.library.custom_op(f"flash_attn::_flash_attn_varlen_{_name}", _function, mutates_args=())


class _FlashAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *rest):
        ctx.save_for_backward(q, k, v, *rest[:2])
        ctx.rest = rest[4:]
        return torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, *rest)

    @staticmethod
    def backward(ctx, grad):
        grads = torch.ops.flash_attn._flash_attn_varlen_backward(
            grad, *ctx.saved_tensors, *ctx.rest
        )
        return (*grads, *[None] * 7)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
):
    """The signature is flash-attn's."""
    assert causal and dropout_p == 0 and alibi_slopes is None and window_size[1] == 0
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _FlashAttn.apply(q, k, v, *lengths, softmax_scale, window_size[0], softcap)


@contextlib.contextmanager
def standing_in(kernel: str) -> Iterator[None]:
    """Within it packed attention takes this kernel, whatever the device and the dtype."""
    chosen, function = attention.kernel_of, attention.flash_attn
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        attention.kernel_of = lambda *_, **__: kernel
        attention.flash_attn = lambda: flash_attn_varlen_func
        try:
            yield
        finally:
            attention.kernel_of, attention.flash_attn = chosen, function
