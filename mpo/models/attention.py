"""Attention over one packed row that cannot look into a neighbour: each document is attention calls
of its own.

A document is a prompt with its responses behind it, so that a prompt with a chosen and a rejected
response goes through the model once: every response sees the prompt and itself. Registered with
transformers under the name `packed`; the documents' lengths travel to it as the keyword `documents`
of the backbone's forward. Compared with one call under a block-diagonal mask it does sum(n_i^2)
instead of (sum n_i)^2 work, keeps SDPA's fused kernels, and runs on any device. Soft-capped
attention (Gemma-2), which SDPA lacks, is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import is_flash_attn_2_available

NAME = "packed"

Document = tuple[int, ...]
"""Tokens of a prompt, then of each response to it, in the order in which they lie in the row."""


def resolve(attention: str) -> str:
    """The implementation that `model.attention` means on this machine: `auto` is flash_attention_2
    on a GPU that has it, else packed."""
    if attention != "auto":
        return attention
    return (
        "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else NAME
    )


def shares_prompts(attention: str) -> bool:
    """Whether documents may have several responses: only this module's attention knows how."""
    return resolve(attention) == NAME


def shares_prompts_of(model: Any) -> bool:
    """The same of a loaded Hugging Face model."""
    return bool(model.config._attn_implementation == NAME)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, N, head_dim)
    key: torch.Tensor,  # (1, kv_heads, N, head_dim)
    value: torch.Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: None,
    *,
    documents: Sequence[Document],
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `documents` (host integers that sum to N). Returns (1, N,
    heads, head_dim)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Key-value heads take the place of the batch, so that the query heads of one share its keys
    # without a copy of them.
    queries = query[0].unflatten(0, (key.shape[1], -1))  # (kv_heads, groups, N, head_dim)
    keys, values = key[0].unsqueeze(1), value[0].unsqueeze(1)  # (kv_heads, 1, N, head_dim)
    outputs = []
    # split, whose backward is one cat, and not slices, whose backward fills zeros
    sizes = [sum(document) for document in documents]
    for (prompt, first, *others), *of_document in zip(
        documents, *(x.split(sizes, 2) for x in (queries, keys, values)), strict=True
    ):
        (q, k, v), *rest = zip(
            *(x.split([prompt + first, *others], 2) for x in of_document), strict=True
        )
        # the first response goes on where the prompt ends
        outputs.append(_attend(q, k, v, scaling, dropout, softcap, sliding_window))
        for own_q, own_k, own_v in rest:
            seen_k, seen_v = (
                torch.cat([k[:, :, :prompt], own_k], 2),
                torch.cat([v[:, :, :prompt], own_v], 2),
            )
            outputs.append(
                _attend(own_q, seen_k, seen_v, scaling, dropout, softcap, sliding_window)
            )
    outputs = [out.permute(2, 0, 1, 3) for out in outputs]  # (n, kv_heads, groups, head_dim)
    return torch.cat(outputs).flatten(1, 2)[None], None


def _attend(
    q: torch.Tensor,  # (kv_heads, groups, n, head_dim), the last n of m positions
    k: torch.Tensor,  # (kv_heads, 1, m, head_dim)
    v: torch.Tensor,  # (kv_heads, 1, m, head_dim)
    scaling: float,
    dropout: float,
    softcap: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of one span: (kv_heads, groups, n, head_dim)."""
    n, m = q.shape[2], k.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < m else None
    if softcap is not None:
        scores = q.flatten(1, 2) @ k[:, 0].transpose(-1, -2)  # (kv_heads, groups * n, m)
        scores = softcap * torch.tanh(scores.view(*q.shape[:3], m) * (scaling / softcap))
        scores = scores.masked_fill(~_causal_mask(n, m, window, q.device), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return (weights.flatten(1, 2) @ v[:, 0]).view(q.shape)
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    if window is None and n == m:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling
        )
    mask = _causal_mask(n, m, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)


def _causal_mask(n: int, m: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(n, m) boolean for the last n of m positions: each sees itself and what is before it, at most
    `window` positions in all."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return mask if window is None else mask.triu(m - n + 1 - window)


def _no_mask(*_: object, **__: object) -> None:
    """The documents' lengths say everything, so transformers need build no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
