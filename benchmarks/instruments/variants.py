"""The package's kernels as they are launched: argument types, alignment and tiles, for whoever
compiles them without launching them.

`python -m benchmarks.instruments.variants tests/kernels/compiled` writes the table that the tests
hold the kernels to, one for each version of triton: other compilers, other registers.

`aligned` variants stand for every vocabulary that divides by 16 (128256, 151936, 152064, 256000,
262144: triton specialises on nothing else), `odd` ones for the others (50257, 128257).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.instruments.machine_code import TARGETS, Report, report
from mpo_kernels.backends.triton.logprob import (
    _combine_kernel,
    _logprob_grad_kernel,
    _logprob_stats_kernel,
)
from mpo_kernels.backends.triton.pool import (
    POOL_BLOCK,
    POOL_ROWS,
    UNPOOL_BLOCK,
    _pool_kernel,
    _unpool_kernel,
)
from mpo_kernels.backends.triton.sequences import (
    _pair_kernel,
    _row_grad_kernel,
    _sequence_sums_kernel,
)
from mpo_kernels.backends.triton.tiles import TILES, Tile

_TYPES = {
    **dict.fromkeys(("logits_ptr", "grad_ptr", "hidden_ptr"), "*bf16"),
    **dict.fromkeys(("labels_ptr",), "*i64"),
    **dict.fromkeys(("cu_seqlens_ptr",), "*i32"),
    **dict.fromkeys(("is_argmax_ptr",), "*i8"),
    **dict.fromkeys(("mask_ptr",), "*u8"),
    **dict.fromkeys(("logit_scale", "softcap", "inverse_softcap", "beta"), "fp32"),
}
_INTEGERS = {
    *("N", "P", "D", "T", "V", "splits", "split_columns", "parts", "vocab", "blocks"),
    "ignore_index",
}
# and all strides, where the vocabulary or the hidden size divides by 16
_DIVISIBLE = {"V", "D", "split_columns"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constexpr arguments."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    aligned: bool
    tiled_as: str | None = None
    """Its entry in TILES; None for the small kernels, which have fixed blocks."""

    def tile(self, target: str) -> Tile:
        """Columns at a time, and warps."""
        if self.tiled_as is None:
            return Tile(self.constants.get("BLOCK", 1024), 4)
        return TILES[self.tiled_as].get(target, TILES[self.tiled_as]["default"])

    def compiled(self, target: str) -> Report:
        """What the compiler makes of it for sm_80, sm_90, sm_100 or gfx942."""
        tile = self.tile(target)
        constants, elements = dict(self.constants), None
        if self.tiled_as is not None:
            constants["BLOCK"] = tile.block
            elements = tile.block if self.tiled_as == "grad" else None
        names = self.kernel.arg_names
        aligned = {n for n in names if n.endswith("_ptr")}
        if self.aligned:
            aligned |= {n for n in names if n in _DIVISIBLE or "stride" in n}
        return report(
            self.kernel,
            {n: _type(n) for n in names},
            constants,
            aligned,
            target,
            tile.num_warps,
            elements_per_program=elements,
        )


def _type(name: str) -> str:
    if name in _INTEGERS or "stride" in name:
        return "i32"
    return _TYPES.get(name, "*fp32")


# what is not asked for has no memory, as at a launch
_NO_MOMENTS: dict[str, Any] = {"HAS_MOMENTS": False, "moments_ptr": None}
_NO_ENTROPY_GRAD: dict[str, Any] = {
    "HAS_ENTROPY_GRAD": False,
    "entropy_ptr": None,
    "entropy_grad_ptr": None,
}


def variants() -> Iterator[Variant]:
    """Every kernel of the package, those that touch logits in all their forms."""
    for aligned in (True, False):
        place = "aligned" if aligned else "odd"
        for kind in ("plain", "softcap", "wide softcap"):
            is_wide = kind == "wide softcap"
            head = {
                "ARE_STORED": False,
                "HAS_SCALE": False,
                "HAS_SOFTCAP": kind != "plain",
                "IS_WIDE_CAP": is_wide,
            }
            tile = "wide stats" if is_wide else "stats"
            for form, flags in (
                ("", _NO_MOMENTS),
                (" split", {**_NO_MOMENTS, "IS_PARTIAL": True}),
                (" token outputs", {**_NO_MOMENTS, "HAS_TOKEN_OUTPUTS": True}),
                (" moments", {"HAS_TOKEN_OUTPUTS": True, "HAS_MOMENTS": True}),
            ):
                constants = {
                    **head,
                    "HAS_TOKEN_OUTPUTS": False,
                    "IS_PARTIAL": False,
                    "IS_SLICE": False,
                    **flags,
                }
                tiled_as = f"{tile} with moments" if constants["HAS_MOMENTS"] else tile
                yield Variant(
                    f"stats{form} {kind} {place}",
                    _logprob_stats_kernel,
                    constants,
                    aligned,
                    tiled_as,
                )
            for form, flags in (
                ("", _NO_ENTROPY_GRAD),
                (" of entropy", {"HAS_ENTROPY_GRAD": True}),
            ):
                constants = {**head, **flags}
                yield Variant(
                    f"grad{form} {kind} {place}", _logprob_grad_kernel, constants, aligned, "grad"
                )
        yield Variant(
            f"pool {place}",
            _pool_kernel,
            {"HAS_MASK": True, "ROWS": POOL_ROWS, "BLOCK": POOL_BLOCK},
            aligned,
        )
        yield Variant(
            f"unpool {place}", _unpool_kernel, {"HAS_MASK": True, "BLOCK": UNPOOL_BLOCK}, aligned
        )
    for form, flags in (
        ("", {**_NO_MOMENTS, "vocab": None}),
        (" moments", {"HAS_MOMENTS": True}),
    ):
        constants = {"HAS_TOKEN_OUTPUTS": True, "BLOCK": 128, **flags}
        yield Variant(f"combine{form}", _combine_kernel, constants, True)
    yield Variant("sequence sums", _sequence_sums_kernel, {"BLOCK": 1024}, True)
    yield Variant(
        "pair",
        _pair_kernel,
        {"BETA_IS_STORED": False, "HAS_SUMS": False, "HAS_WEIGHTS": True, "BLOCK": 1024},
        True,
    )
    yield Variant("row grad", _row_grad_kernel, {"BLOCK": 1024}, True)


def facts(made: Report) -> dict[str, int | float]:
    """What is held at bars: the fewer the better, except for the widest access. `main` is the body
    with the least work per element, through which all but a block or two of a row go; not one that
    only writes, which is an ignored row's."""
    main = min(
        (body.instructions_per_element for body in made.bodies if body.bytes_loaded), default=0.0
    )
    return {
        "registers": made.registers,
        "spilled": made.local_bytes + made.spill_ops,
        "widest_bits": max(made.widths),
        "instructions_per_element": round(main, 1),
        "programs_per_multiprocessor": made.ctas_per_sm,
    }


def table() -> dict[str, dict[str, dict[str, int | float]]]:
    """Facts by variant and target."""
    return {
        variant.name: {target: facts(variant.compiled(target)) for target in TARGETS}
        for variant in variants()
    }


def _write(folder: Path) -> None:
    """`<triton's version>.json`: one line per variant and target, so that a change shows as one in
    a diff."""
    lines = []
    for name, targets in table().items():
        rows = ",\n    ".join(
            f"{json.dumps(target)}: {json.dumps(values)}" for target, values in targets.items()
        )
        lines.append(f"  {json.dumps(name)}: {{\n    {rows}\n  }}")
    (folder / f"{triton.__version__}.json").write_text(
        "{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    # the default until triton 3.10; it decides about instruction counts
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    _write(Path(sys.argv[1]))
