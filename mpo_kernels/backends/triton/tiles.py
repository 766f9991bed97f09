"""How the kernels that touch logits cut their work: columns per step, warps, and programs per row.

The numbers come from the compiled code (no spills, 128-bit access, four or more 128-bit loads in
flight per thread), not from a clock: `python -m benchmarks.static` prints what they were chosen
from. Where you can measure, override them with `use_tiles`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """Columns that a program handles at a time, a power of two, and the warps that share them."""

    block: int
    num_warps: int


TILES: dict[str, dict[str, Tile]] = {
    # 32 elements a thread: four 128-bit loads of bf16 in flight, in at most 64 registers. On CDNA,
    # whose warps are 64 threads, half of that keeps odd vocabularies free of spills, and four warps
    # reduce a block in half the instructions of eight.
    "stats": {"default": Tile(8192, 8), "gfx942": Tile(4096, 4)},
    # A wide softcap's tanh keeps more numbers at once: half the elements a thread, without spills
    # in odd vocabularies too.
    "wide stats": {"default": Tile(4096, 8), "gfx942": Tile(4096, 4)},
    # So do the moments' sums.
    "stats with moments": {"default": Tile(4096, 8), "gfx942": Tile(4096, 4)},
    "wide stats with moments": {"default": Tile(2048, 8), "gfx942": Tile(4096, 4)},
    # As many elements a thread as "stats" has, in programs of half the size: a program's fixed work
    # is shared by more elements than with 8 warps.
    "grad": {"default": Tile(4096, 4)},
}
"""Per kernel and architecture (`sm_90`, `gfx942`, ...); `default` where an architecture has no
entry of its own."""

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs of the statistics that one multiprocessor should have; where softcap or an odd
vocabulary leave room for two or three, the rest wait."""

UNKNOWN_MULTIPROCESSORS = 128
"""Assumed where the device does not tell, that is when CPU tensors are driven through the
interpreter or an emulator."""

_overrides: dict[str, Tile] = {}


def tile_for(kernel: str, vocab: int, device: torch.device) -> Tile:
    """The tile of a kernel of TILES, no wider than the vocabulary needs."""
    architectures = TILES[kernel]
    overridden = kernel.removeprefix("wide ").removesuffix(" with moments")
    tile = _overrides.get(overridden) or architectures.get(
        _architecture(device), architectures["default"]
    )
    if vocab >= tile.block:
        return tile
    block = triton.next_power_of_2(vocab)
    return Tile(
        block, max(1, min(tile.num_warps, block // 512)) if block < 4096 else tile.num_warps
    )


def splits_for(rows: int, vocab: int, block: int, device: torch.device) -> int:
    """Programs that share a row's statistics: 1 where the rows alone fill the device, else as many
    as fill it.

    At most one per block of columns. The number depends on shapes and device alone, so reruns are
    bitwise equal.
    """
    multiprocessors = _multiprocessors(device)
    if rows >= 2 * multiprocessors:
        return 1
    return max(
        1,
        min(
            triton.cdiv(vocab, block),
            triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, rows),
        ),
    )


@contextmanager
def use_tiles(*, stats: Tile | None = None, grad: Tile | None = None) -> Iterator[None]:
    """Within it the kernels use these tiles, whatever the architecture: `with
    use_tiles(stats=Tile(4096, 4)): ...`

    Raises:
        ValueError: a block is not a power of two, or num_warps not a power of two up to 32.
    """
    given = {name: tile for name, tile in (("stats", stats), ("grad", grad)) if tile is not None}
    for name, tile in given.items():
        for what, value, most in (
            ("block", tile.block, 1 << 20),
            ("num_warps", tile.num_warps, 32),
        ):
            if not 0 < value <= most or value & (value - 1):
                raise ValueError(
                    f"{name}: {what} is {value}; it must be a power of two, at most {most}."
                )
    before = dict(_overrides)
    _overrides.update(given)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@functools.lru_cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return name.split(":")[0] or f"sm_{properties.major}{properties.minor}"


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else UNKNOWN_MULTIPROCESSORS
    )
