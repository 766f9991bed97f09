"""Where documents lie in a packed row: as integers of the host, and as what attention kernels take.

A document is a prompt with its responses behind it. A span is what attends in one piece: the prompt
with its first response, or a further response, whose keys are the prompt's and its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch

Document = tuple[int, ...]
"""Tokens of a prompt, then of each response to it, in the order in which they lie in the row."""

Moved = TypeVar("Moved")


@dataclass(frozen=True)
class Documents:
    """The documents of a row of N tokens, which are S spans with K keys in all.

    In the order of the row, a span's queries are consecutive rows, and so are its keys in
    `row[key_rows]`. Attention within a span is causal, its last query beside its last key.
    """

    lengths: tuple[Document, ...]
    query_offsets: torch.Tensor  # (S + 1,) int32: where each span's queries begin
    key_offsets: torch.Tensor  # (S + 1,) int32: where each span's keys begin in `key_rows`
    key_rows: torch.Tensor | None  # (K,) int64; None where no prompt is shared, and K is N
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, lengths: Iterable[Document]) -> Documents:
        """Documents behind each other, on the CPU."""
        lengths = tuple(lengths)
        queries: list[int] = []
        keys: list[range] = []  # rows, in pieces
        key_counts: list[int] = []
        end = 0
        for prompt, first, *others in lengths:
            start, end = end, end + prompt + first
            queries.append(prompt + first)
            keys.append(range(start, end))
            key_counts.append(prompt + first)
            for response in others:
                keys += [range(start, start + prompt), range(end, end + response)]
                end += response
                queries.append(response)
                key_counts.append(prompt + response)
        shared = sum(key_counts) > end
        return cls(
            lengths=lengths,
            query_offsets=offsets(queries),
            key_offsets=offsets(key_counts),
            key_rows=torch.tensor([row for piece in keys for row in piece]) if shared else None,
            longest_query=max(queries),
            longest_key=max(key_counts),
        )

    def to(self, device: torch.device) -> Documents:
        return moved(self, device)


def moved(record: Moved, device: torch.device, stay: Iterable[str] = ()) -> Moved:
    """The same dataclass with its tensors on `device`, but for the fields `stay`.

    A copy to a GPU is from page-locked memory: from other memory it may wait for all that the GPU
    still has to do.
    """
    values: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        values[field.name] = value if field.name in stay else _on(device, value)
    return replace(record, **values)  # type: ignore[type-var]


def _on(device: torch.device, value: Any) -> Any:
    """A field on `device`: a tensor, several, or a record of them; anything else as it is."""
    if isinstance(value, torch.Tensor):
        host = value.pin_memory() if device.type == "cuda" and value.is_cpu else value
        return host.to(device, non_blocking=True)
    if isinstance(value, tuple) and all(isinstance(each, torch.Tensor) for each in value):
        return tuple(_on(device, each) for each in value)
    return value.to(device) if hasattr(value, "to") else value


def offsets(counts: Iterable[int]) -> torch.Tensor:
    """Where pieces of so many rows begin, and where the last ends: int32."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
