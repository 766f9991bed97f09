"""Attention over one packed row that cannot look into a neighbour: each sequence is its own attention call.

Registered with transformers under the name `packed`. The sequences' lengths travel to it as the keyword `sequence_lengths` of the
backbone's forward. Compared with one call under a block-diagonal mask it needs no mask, does sum(n_i^2) instead of (sum n_i)^2 work, keeps
SDPA's fused kernels, and runs on any device. Soft-capped attention (Gemma-2), which SDPA lacks, is written out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, N, head_dim)
    key: torch.Tensor,  # (1, kv_heads, N, head_dim)
    value: torch.Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: None,
    *,
    sequence_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of `sequence_lengths` (host integers that sum to N). Returns (1, N, heads, head_dim)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    outputs = []
    lengths = list(sequence_lengths)
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        if softcap is not None:
            out = _softcapped_attention(q, k, v, scaling or q.shape[-1] ** -0.5, softcap, window)
        elif window is not None:
            mask = _causal_mask(q.shape[2], window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, softcap: float, window: int | None
) -> torch.Tensor:
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap))  # (1, heads, n, n)
    scores = scores.masked_fill(~_causal_mask(q.shape[2], window, q.device), float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, length) boolean: position i sees i, i-1, ... and with a window only `window` positions, itself included."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _no_mask(*_: object, **__: object) -> None:
    """The sequences' lengths say everything, so transformers need build no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
