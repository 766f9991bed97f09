"""What instructions compute, by PTX's names, on arrays of one number a thread."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np


def _rounded_to_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient of integers as the GPU rounds it; by zero it is 0 here, and anything there."""
    wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
    x, y = a.astype(wide), np.where(b == 0, 1, b).astype(wide)
    quotient = np.abs(x) // np.abs(y)
    return np.where(b == 0, 0, quotient * np.sign(x) * np.sign(y)).astype(a.dtype)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(c.dtype)


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ROUNDINGS: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
REDUCTIONS: dict[str, Callable] = {
    "add": lambda v: v.sum(1, dtype=v.dtype),
    "min": lambda v: np.fmin.reduce(v, 1),
    "max": lambda v: np.fmax.reduce(v, 1),
}
FLOAT_FUNCTIONS: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "copysign": lambda a, b: np.copysign(b, a),
    "div": np.divide,
    "ex2": np.exp2,
    "fma": _fused,
    "lg2": np.log2,
    # of a NaN and a number, the number; sm_100 takes three
    "max": lambda *v: functools.reduce(np.fmax, v),
    "min": lambda *v: functools.reduce(np.fmin, v),
    "mul": np.multiply,
    "neg": np.negative,
    "rcp": np.reciprocal,
    "rsqrt": lambda v: 1 / np.sqrt(v),
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "tanh": np.tanh,
}
INTEGER_FUNCTIONS: dict[str, Callable] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "div": _rounded_to_zero,
    "mad": lambda a, b, c: a * b + c,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
