"""What a multiprocessor holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Resources of one multiprocessor, from NVIDIA's occupancy calculator and LLVM's AMDGPU
    subtarget."""

    lanes: int  # threads of a warp
    warps: int
    ctas: Callable[[int, int, int], int]  # of registers, shared bytes and warps


def _nvidia_ctas(registers: int, shared: int, num_warps: int, shared_per_sm: int) -> int:
    # registers are given out in units of 256, from four files of 16384
    per_warp = _round_up(registers * 32, 256)
    by_registers = 4 * (16384 // per_warp) // num_warps
    by_shared = shared_per_sm // (_round_up(shared, 128) + 1024)  # 1 KB of each CTA is the system's
    return min(by_registers, by_shared, 64 // num_warps, 32)


def _amd_ctas(registers: int, shared: int, num_warps: int) -> int:
    # four SIMDs, each with 512 registers and 8 waves
    waves = 4 * min(8, 512 // _round_up(max(registers, 1), 8))
    by_shared = 65536 // _round_up(shared, 512) if shared else waves
    by_barriers = waves if num_warps == 1 else 16
    return min(waves // num_warps, by_shared, by_barriers)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _nvidia(shared_per_sm: int) -> Limits:
    return Limits(32, 64, functools.partial(_nvidia_ctas, shared_per_sm=shared_per_sm))


LIMITS = {
    "sm_80": _nvidia(164 << 10),
    "sm_90": _nvidia(228 << 10),
    "sm_100": _nvidia(228 << 10),
    "gfx942": Limits(64, 32, _amd_ctas),
}
