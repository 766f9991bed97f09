"""What the public functions accept. Every message says what was given and what is needed.

Checks of shapes, dtypes, devices and host values are always made. Checks that read tensor data are
made where that costs no host sync, that is for CPU tensors, and elsewhere only with validate=True.
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_kernels.parallel import Parallel

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


OPTIONAL = (
    *("bias", "pair_weights", "weights", "row_weights", "sequence_weights"),
    *("cu_seqlens", "rows", "mask"),
)
"""Tensors that need not be given."""


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """Refuses lists, arrays and tensors that are divided over ranks, under the names of the
    arguments that they are."""
    for name, tensor in tensors.items():
        if tensor is None and name in OPTIONAL:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{name} must be a tensor, not {type(tensor).__name__}; torch.as_tensor({name})"
                " makes one."
            )
        if type(tensor).__name__ == "DTensor":
            if name in ("weight", "bias"):
                raise ValueError(_partitioned(name, "a DTensor"))
            raise ValueError(
                f"{name} is a DTensor, divided over ranks. Give {name}.to_local() and say with"
                f" `parallel` how the work is divided, or give {name}.full_tensor()."
            )


def _partitioned(name: str, kind: str) -> str:
    return (
        f"{name} is {kind}: its data are partitioned (ZeRO-3, FSDP). Call the loss inside the head"
        " module's forward, where the hooks have gathered the weight."
    )


def check_parallel(parallel: Parallel | None) -> None:
    """Refuses what is no `Parallel`: a process group, say."""
    if parallel is not None and not isinstance(parallel, Parallel):
        raise ValueError(
            f"parallel is {type(parallel).__name__}; needed is a mpo_kernels.Parallel, made once on"
            " all ranks of its groups, or None."
        )


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Refuses dtypes that the kernels do not compute with."""
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; needed is one of float32, bfloat16, float16 (float64"
            " on the torch backend)."
        )


def check_number(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor | None = None
) -> None:
    """Refuses numbers that are not finite or out of range, and tensors for them that are no number,
    elsewhere than on the CPU or with `like`, or trained. The value of a tensor is only read on the
    CPU, outside of torch.compile."""
    if value is None and name == "softcap":
        return
    if isinstance(value, torch.Tensor):
        _check_stored_number(name, value, like)
        return
    # Not math.isfinite, which torch.compile cannot trace for a dynamic float; nor `int | float`,
    # which that of torch 2.8 cannot.
    if not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a finite Python number, not {value!r}.")
    if name == "softcap" and value <= 0:
        raise ValueError(f"softcap is {value}; it must be positive, or None for no cap.")
    if name == "softcap" and not 1e-30 <= value <= 1e30:
        raise ValueError(
            f"softcap is {value}; it must lie between 1e-30 and 1e30, where float32 holds it and"
            " its reciprocal."
        )


def check_reduction(reduction: str) -> None:
    """Refuses other ways to sum."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it can be 'mean', 'sum' or 'none'.")


def _check_stored_number(name: str, value: torch.Tensor, like: torch.Tensor | None) -> None:
    if value.ndim or value.dtype == torch.bool or value.is_complex():
        raise ValueError(
            f"{name} is {value.dtype} {tuple(value.shape)}; needed is a number, or a real tensor of"
            " shape ()."
        )
    if value.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which is not computed: give {name}.detach(), or scale"
            " what comes in or out by it."
        )
    if value.device.type != "cpu" and (like is None or value.device != like.device):
        raise ValueError(
            f"{name} is on {value.device}; needed is a number, or a tensor on the CPU or on the"
            " device of the other tensors."
        )
    if (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(value) is torch.Tensor
    ):
        number = value.item()
        if not abs(number) < float("inf") or (name == "softcap" and number <= 0):
            raise ValueError(
                f"{name} is {number}; it must be {'positive' if name == 'softcap' else 'finite'}."
            )


def check_integers(ignore_index: int, chunk_bytes: int | None = None) -> None:
    """Refuses what is no whole number, and a budget that holds nothing."""
    if (
        isinstance(ignore_index, (bool, float, torch.Tensor))
        or ignore_index is None
        or not -(2**63) <= ignore_index < 2**63
    ):
        raise ValueError(f"ignore_index must be an int of 64 bits, not {ignore_index!r}.")
    if chunk_bytes is not None and (
        isinstance(chunk_bytes, (bool, float, torch.Tensor)) or chunk_bytes < 1
    ):
        raise ValueError(
            f"chunk_bytes is {chunk_bytes!r}; it must be a positive int, or None for 512 MiB."
        )


def check_logits_dtype(logits_dtype: torch.dtype | None, hidden: torch.Tensor) -> None:
    """Refuses logits in anything but the dtype of their product, or float32 where that is half
    precision."""
    if logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"logits_dtype is {logits_dtype!r}; it can be torch.float32, or None for the dtype of"
            " the products."
        )
    if logits_dtype is not None and hidden.dtype == torch.float64:
        raise ValueError(
            "logits_dtype is torch.float32 and hidden torch.float64, which it would round. Leave"
            " it at None."
        )


def check_rows(
    name: str,
    tensor: torch.Tensor,
    labels: torch.Tensor,
    *,
    gathered: torch.Tensor | None = None,
    host_labels_ok: bool = False,
) -> None:
    """tensor (..., X) and labels (...) fit together, or with `gathered` (M,) its rows of that
    number and labels (M,). `host_labels_ok`: labels may stay on the CPU."""
    check_float(name, tensor)
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels have dtype {labels.dtype}; needed is int64 (or int32).")
    if gathered is not None:
        _check_gathered(name, tensor, labels, gathered)
    elif tensor.ndim < 2 or tensor.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and labels {tuple(labels.shape)}; labels must"
            f" have the shape of {name} without its last dimension, and labels[t] is the token that"
            " position t predicts (already shifted)."
        )
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: its last dimension is empty.")
    if labels.device != tensor.device and not (host_labels_ok and labels.device.type == "cpu"):
        raise ValueError(
            f"labels are on {labels.device} and {name} on {tensor.device}; move them to one device."
        )


def _check_gathered(
    name: str, tensor: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
) -> None:
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise ValueError(
            f"rows is {rows.dtype} {tuple(rows.shape)}; needed is int64 of shape (M,), the row of"
            f" {name} that predicts each of the M labels."
        )
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; with rows it is [N, {name} size], of which"
            " rows are read."
        )
    if labels.shape != rows.shape:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)} and labels {tuple(labels.shape)}; needed is one"
            " label for each of rows."
        )
    if rows.device != tensor.device and rows.device.type != "cpu":
        raise ValueError(
            f"rows is on {rows.device} and {name} on {tensor.device}; use that device or the CPU."
        )


def check_row_values(rows: torch.Tensor, count: int) -> None:
    """Reads rows: each is in [0, count)."""
    bad = torch.nonzero((rows < 0) | (rows >= count))
    if bad.numel():
        first = int(bad[0])
        raise ValueError(
            f"rows[{first}] is {int(rows[first])}; rows must be in [0, {count}), the rows of hidden"
            f" ({bad.shape[0]} are not)."
        )


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    any_dtype: bool = False,
) -> None:
    """hidden (..., D), weight (V, D), bias (V,) fit together; `any_dtype`: their dtypes may differ
    (autocast)."""
    check_float("weight", weight)
    if weight.numel() == 0:
        raise ValueError(_partitioned("weight", f"of shape {tuple(weight.shape)}"))
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; needed is (V, {hidden.shape[-1]}) for hidden"
            f" {tuple(hidden.shape)}."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; needed is ({weight.shape[0]},), one value per row"
            " of weight."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (
            (tensor.dtype != hidden.dtype and not any_dtype) or tensor.device != hidden.device
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and hidden {hidden.dtype} on"
                f" {hidden.device}; they must agree."
            )


def check_slice(name: str, tokens: int, parallel: Parallel | None) -> None:
    """A vocabulary-parallel call has the slice that its `Parallel` was made for."""
    if parallel is not None and parallel.vocab_group is not None and tokens != parallel.vocab_slice:
        raise ValueError(
            f"{name} holds {tokens} tokens of the vocabulary, but parallel was made with"
            f" vocab_slice={parallel.vocab_slice}."
        )


def check_layout(
    rows: torch.Tensor, cu_seqlens: torch.Tensor | None, what: str, *, pairs: bool
) -> int:
    """The number of sequences. `rows` is (S, T, X) without cu_seqlens, (N, X) with it; `pairs`
    demands an even number."""
    if cu_seqlens is None:
        if rows.ndim != 3:
            raise ValueError(
                f"{what} has shape {tuple(rows.shape)}; the dense layout is [sequences, T, {what}"
                " size]. For packed rows [N, ...] give cu_seqlens."
            )
        sequences = rows.shape[0]
    else:
        if rows.ndim != 2:
            raise ValueError(
                f"{what} has shape {tuple(rows.shape)}; with cu_seqlens the packed layout is [N,"
                f" {what} size]."
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; needed is int32 of"
                " shape (sequences + 1,)."
            )
        if cu_seqlens.device != rows.device and cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"cu_seqlens is on {cu_seqlens.device} and {what} on {rows.device}; use that device"
                " or the CPU."
            )
        sequences = cu_seqlens.numel() - 1
    if sequences < 1:
        raise ValueError(f"{what} holds no sequence.")
    if pairs and sequences % 2:
        raise ValueError(
            f"{sequences} sequences cannot be pairs; needed are 2P sequences, the P chosen ones"
            " first, then the P rejected ones in the same order."
        )
    return sequences


def check_per(name: str, tensor: torch.Tensor, count: int, unit: str, device: torch.device) -> None:
    """A vector with one float per pair or sequence."""
    if tensor.shape != (count,) or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed is a float tensor of shape"
            f" ({count},), one value per {unit}."
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; move it to {device}.")


def check_cu_seqlens_values(cu_seqlens: torch.Tensor, rows: int) -> None:
    """Reads cu_seqlens: from 0 to the number of rows, never falling."""
    if (
        int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != rows
        or bool((cu_seqlens.diff() < 0).any())
    ):
        raise ValueError(
            f"cu_seqlens is {_short(cu_seqlens)}; it must rise from 0 to the number of rows,"
            f" {rows}, without falling."
        )


def check_label_values(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """Reads labels: each is in [0, vocab) or ignore_index."""
    labels = labels.long()  # int32 would be compared with what is left of a larger ignore_index
    bad = torch.nonzero((labels != ignore_index) & ((labels < 0) | (labels >= vocab)))
    if bad.numel():
        index = tuple(bad[0].tolist())
        raise ValueError(
            f"labels{list(index)} is {int(labels[index])}; labels must be in [0, {vocab}) or the"
            f" ignore_index {ignore_index} ({bad.shape[0]} are not)."
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Reads a small tensor: no NaN, no infinity."""
    bad = torch.nonzero(~tensor.isfinite())
    if bad.numel():
        index = bad[0].tolist()
        raise ValueError(
            f"{name}{index} is {float(tensor[tuple(index)])}; all values must be finite."
        )


def check_no_empty_sequence(
    counts: torch.Tensor, *, pairs: bool = False, kind: str = "scored"
) -> None:
    """counts (S,): every sequence has a scored position, or one of another kind."""
    empty = torch.nonzero(counts == 0)
    if empty.numel():
        sequence = int(empty[0])
        half = counts.numel() // 2
        side = (
            f" ({'chosen' if sequence < half else 'rejected'} of pair {sequence % half})"
            if pairs
            else ""
        )
        raise ValueError(
            f"Sequence {sequence}{side} has no {kind} position, so its mean is undefined. Drop it,"
            " or keep at least one position."
        )


def _short(tensor: torch.Tensor) -> str:
    values: list[Any] = tensor.tolist()
    return str(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]])
