"""Bits as numbers of a PTX type, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNSIGNED: dict[int, type] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 -> bits, rounded to nearest even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def without_subnormals(value: np.ndarray) -> np.ndarray:
    return np.where(
        np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value
    )


def _halves(bits: np.ndarray) -> np.ndarray:
    """(threads,) of 2n bits -> (2, threads) of n bits, low half first."""
    size = bits.dtype.itemsize * 4
    low = bits & bits.dtype.type((1 << size) - 1)
    return np.stack([low, bits >> bits.dtype.type(size)]).astype(UNSIGNED[size])


def joined(parts: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The parts' bits side by side in one number per thread, the first lowest."""
    size = parts[0].dtype.itemsize * 8
    kind = UNSIGNED[size * len(parts)]
    total: np.ndarray = np.zeros(parts[0].shape, kind)
    for i, part in enumerate(parts):
        total |= part.astype(kind) << kind(i * size)
    return total


def width_of(kind: str) -> int:
    """Bits of a type."""
    if kind == "pred":
        return 1
    return {"bf16": 16, "bf16x2": 32, "f16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Bits as numbers: bf16 as float32, packed types as (2, threads)."""
    if kind == "pred":
        return bits
    if kind == "bf16":
        return _from_bfloat16(bits)
    if kind == "bf16x2":
        return _from_bfloat16(_halves(bits))
    if kind == "f16x2":
        return _halves(bits).view(np.float16)
    if kind == "f32x2":
        return _halves(bits).view(np.float32)
    return bits.view({"f": FLOAT, "s": SIGNED}.get(kind[0], UNSIGNED)[width_of(kind)])


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `decode`."""
    if kind == "pred":
        return np.asarray(value, bool)
    if kind == "bf16":
        return _bfloat16(value)
    if kind == "bf16x2":
        return joined(_bfloat16(value))
    if kind in ("f16x2", "f32x2"):
        half = FLOAT[width_of(kind) // 2]
        return joined(np.ascontiguousarray(value, half).view(UNSIGNED[width_of(kind) // 2]))
    target = {"f": FLOAT, "s": SIGNED}.get(kind[0], UNSIGNED)[width_of(kind)]
    return np.ascontiguousarray(value).astype(target, copy=False).view(UNSIGNED[width_of(kind)])


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")
