"""Attention over one packed row that cannot look into a neighbour.

A document is a prompt with its responses behind it, so that a prompt with a chosen and a rejected
response goes through the model once: every response sees the prompt and itself. Registered with
transformers under the name `packed`; the documents travel to it as the keyword `documents` of the
backbone's forward. Compared with one call under a block-diagonal mask it does sum(n_i^2) instead of
(sum n_i)^2 work, and it runs on any device:

    where a GPU has it   one call of a flash-attention kernel for all documents, to which a further
                         response is one more sequence whose keys are the prompt's and its own
    elsewhere            a call of PyTorch's SDPA for each span. Soft-capped attention (Gemma-2),
                         which SDPA lacks, is written out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from mpo.models.documents import Documents

NAME = "packed"

Kernel = Literal["PyTorch's flash-attention", "flash-attn", "SDPA, span by span"]

FLASH_ATTN = Version("2.7")
"""The oldest flash-attn whose kernel is an operator, which selective recomputation can keep."""

# cuDNN builds a plan, which takes about a second, for each new shape. Spans have many.
_NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def shares_prompts(attention: str) -> bool:
    """Whether documents may have several responses: only this module's attention knows how."""
    return attention == NAME


def shares_prompts_of(model: Any) -> bool:
    """The same of a loaded Hugging Face model."""
    return shares_prompts(model.config._attn_implementation)


def kernel_of(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    dropout: bool = False,
) -> Kernel:
    """What computes packed attention of such tensors on this machine.

    PyTorch's own kernel is in every build for NVIDIA GPUs, in the right version. Soft-caps are only
    in flash-attn's, which is taken where it is installed. Both know 16-bit floats on GPUs from
    Ampere on.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim > 256:
        return "SDPA, span by span"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "SDPA, span by span"
    if (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and head_dim % 8 == 0
        and not softcap
    ):
        return "PyTorch's flash-attention"
    if flash_attn() is not None and not (softcap and dropout):
        return "flash-attn"
    return "SDPA, span by span"


@functools.cache
def flash_attn() -> Callable[..., torch.Tensor] | None:
    """The variable-length function of flash-attn, or None where there is none that loads."""
    try:
        if Version(version("flash-attn")) < FLASH_ATTN:
            return None
        from flash_attn import flash_attn_varlen_func
    except (PackageNotFoundError, ImportError, OSError):  # built for another PyTorch, mostly
        return None
    return flash_attn_varlen_func


class _Rule(NamedTuple):
    """How scores become weights."""

    scaling: float
    dropout: float
    softcap: float | None
    window: int | None
    """Positions that a query sees, itself among them."""

    @property
    def keys_before(self) -> int:
        """That a query sees, as kernels count them: -1 for all."""
        return -1 if self.window is None else self.window - 1


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, N, head_dim)
    key: torch.Tensor,  # (1, kv_heads, N, head_dim)
    value: torch.Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: None,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `documents`, which sum to N. Returns (1, N, heads,
    head_dim). Nothing in it waits for a GPU."""
    head_dim = query.shape[-1]
    if sliding_window is not None and sliding_window >= documents.longest_key:
        sliding_window = None
    rule = _Rule(head_dim**-0.5 if scaling is None else scaling, dropout, softcap, sliding_window)
    kernel = kernel_of(
        query.device, query.dtype, head_dim, softcap=softcap is not None, dropout=dropout > 0
    )
    if kernel == "SDPA, span by span":
        with sdpa_kernel(_NO_PLANS):
            return _span_by_span(query[0], key[0], value[0], documents, rule)[None], None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    if documents.key_rows is not None:
        # At most two spans have a row among their keys (packing.py), so that the sum of its
        # gradients does not depend on the order.
        k, v = (x.index_select(0, documents.key_rows) for x in (k, v))
    attend = _by_pytorch if kernel == "PyTorch's flash-attention" else _by_flash_attn
    return attend(q, k, v, documents, rule)[None], None


def _by_pytorch(
    q: torch.Tensor,  # (N, heads, head_dim)
    k: torch.Tensor,  # (K, kv_heads, head_dim)
    v: torch.Tensor,  # (K, kv_heads, head_dim)
    documents: Documents,
    rule: _Rule,
) -> torch.Tensor:
    """All spans at once: (N, heads, head_dim).

    Through the operator that nested tensors take. `torch.nn.attention.varlen` has another signature
    in each version, and prefers cuDNN, which builds plans, in the newest.
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *_lengths(documents),
        rule.dropout,
        True,  # causal, aligned at the end
        False,
        scale=rule.scaling,
        window_size_left=rule.keys_before,
        window_size_right=0,
    )
    return out


def _by_flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, rule: _Rule
) -> torch.Tensor:
    """The same by flash-attn."""
    function = flash_attn()
    assert function is not None, "kernel_of has it"
    return function(
        q,
        k,
        v,
        *_lengths(documents),
        dropout_p=rule.dropout,
        softmax_scale=rule.scaling,
        causal=True,  # aligned at the end
        window_size=(rule.keys_before, 0),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _lengths(documents: Documents) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of spans, of queries and of keys, as kernels take them."""
    longest = documents.longest_query, documents.longest_key
    return documents.query_offsets, documents.key_offsets, *longest


def _span_by_span(
    query: torch.Tensor,  # (heads, N, head_dim)
    key: torch.Tensor,  # (kv_heads, N, head_dim)
    value: torch.Tensor,  # (kv_heads, N, head_dim)
    documents: Documents,
    rule: _Rule,
) -> torch.Tensor:
    """A call for each span: (N, heads, head_dim)."""
    # Key-value heads take the place of the batch, so that the query heads of one share its keys
    # without a copy of them.
    queries = query.unflatten(0, (key.shape[0], -1))  # (kv_heads, groups, N, head_dim)
    keys, values = key.unsqueeze(1), value.unsqueeze(1)  # (kv_heads, 1, N, head_dim)
    outputs = []
    # split, whose backward is one cat, and not slices, whose backward fills zeros
    sizes = [sum(document) for document in documents.lengths]
    for (prompt, first, *others), *of_document in zip(
        documents.lengths, *(x.split(sizes, 2) for x in (queries, keys, values)), strict=True
    ):
        (q, k, v), *rest = zip(
            *(x.split([prompt + first, *others], 2) for x in of_document), strict=True
        )
        # the first response goes on where the prompt ends
        outputs.append(_attend(q, k, v, rule))
        for own_q, own_k, own_v in rest:
            seen_k, seen_v = (
                torch.cat([k[:, :, :prompt], own_k], 2),
                torch.cat([v[:, :, :prompt], own_v], 2),
            )
            outputs.append(_attend(own_q, seen_k, seen_v, rule))
    outputs = [out.permute(2, 0, 1, 3) for out in outputs]  # (n, kv_heads, groups, head_dim)
    return torch.cat(outputs).flatten(1, 2)


def _attend(
    q: torch.Tensor,  # (kv_heads, groups, n, head_dim), the last n of m positions
    k: torch.Tensor,  # (kv_heads, 1, m, head_dim)
    v: torch.Tensor,  # (kv_heads, 1, m, head_dim)
    rule: _Rule,
) -> torch.Tensor:
    """Causal attention of one span: (kv_heads, groups, n, head_dim)."""
    n, m = q.shape[2], k.shape[2]
    window = rule.window if rule.window is not None and rule.window < m else None
    if rule.softcap is not None:
        scores = q.flatten(1, 2) @ k[:, 0].transpose(-1, -2)  # (kv_heads, groups * n, m)
        scores = scores.view(*q.shape[:3], m) * (rule.scaling / rule.softcap)
        scores = rule.softcap * torch.tanh(scores)
        scores = scores.masked_fill(~_causal_mask(n, m, window, q.device), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return (weights.flatten(1, 2) @ v[:, 0]).view(q.shape)
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    plainly = window is None and n == m
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if plainly else _causal_mask(n, m, window, q.device),
        is_causal=plainly,
        dropout_p=rule.dropout,
        scale=rule.scaling,
    )


def _causal_mask(n: int, m: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(n, m) boolean for the last n of m positions: each sees itself and what is before it, at most
    `window` positions in all."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask if window is None else mask.triu(m - n + 1 - window)


# Under a name that has no mask function transformers builds no mask, and does not look at the
# positions either, which would wait for the GPU.
AttentionInterface.register(NAME, packed_attention)
