"""Memory of a launch and of its programs, with who touched each byte."""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

SHARED_BASE = 1 << 24
"""Where a program's shared memory begins."""


class Access(NamedTuple):
    """One instruction's access to bytes of a memory."""

    places: np.ndarray  # (threads, n), of the bytes
    warps: np.ndarray  # (threads,), of the threads
    interval: int  # between barriers
    program: int
    # None for a read, else which bytes get another value: storing a value that is there already is
    # no conflict
    changed: np.ndarray | None


class Memory(abc.ABC):
    """Bytes with, for each, who last wrote and read it: interval between barriers * 256 + warp, or
    255 for several warps. -1: nobody."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.bytes = np.zeros(size, np.uint8)
        self._writers = np.full(size, -1, np.int64)
        self._readers = np.full(size, -1, np.int64)

    @abc.abstractmethod
    def locate(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the accesses lie in it, and where in `bytes` those do."""

    @abc.abstractmethod
    def distance(self, address: int) -> int:
        """Of an access that does not: how far from what it might have meant, in bytes."""

    def put(self, places: np.ndarray, data: np.ndarray) -> None:
        self.bytes[places] = data

    def is_written(self, places: np.ndarray) -> bool:
        """Whether something was stored there; a launch's arguments always hold something."""
        return True

    def track(self, access: Access) -> str | None:
        """Notes an access; says what conflicts."""
        places, changed, interval = access.places, access.changed, access.interval
        warp = access.warps[:, None]
        writers, readers = self._writers[places], self._readers[places]
        conflict = (writers >> 8 == interval) & (writers & 255 != warp)
        if changed is None:
            other = (readers >> 8 == interval) & (readers & 255 != warp)
            mine = interval << 8 | np.where(other, 255, warp)
            self._readers[places] = mine
            shared = self._readers[places] != mine  # by several warps in this very instruction
            self._readers[places[shared]] = interval << 8 | 255
            if conflict.any():
                return f"{self.name} memory: reads what another warp wrote since the last barrier"
            return None
        self._writers[places] = interval << 8 | warp
        if (conflict & changed).any():
            return f"{self.name} memory: writes what another warp wrote since the last barrier"
        if ((readers >> 8 == interval) & (readers & 255 != warp) & changed).any():
            return f"{self.name} memory: writes what another warp read since the last barrier"
        return None


class SharedMemory(Memory):
    """The memory of one program, which holds nothing when the program begins."""

    def __init__(self, size: int) -> None:
        super().__init__("shared", max(size, 16))
        self._stored = np.zeros(len(self.bytes), bool)

    def locate(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        places = addresses - SHARED_BASE
        inside = (places >= 0) & (places + size <= len(self.bytes))
        return inside, places[inside]

    def distance(self, address: int) -> int:
        """Bytes from its beginning."""
        return address - SHARED_BASE

    def put(self, places: np.ndarray, data: np.ndarray) -> None:
        super().put(places, data)
        self._stored[places] = True

    def is_written(self, places: np.ndarray) -> bool:
        return bool(self._stored[places].all())


class GlobalMemory(Memory):
    """The tensors of a launch at their real addresses, as a list of runs of bytes without gaps."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        runs = _merged(sorted(run for tensor in tensors for run in _runs(tensor)))
        self._starts = np.array([start for start, _ in runs], np.int64)
        self._ends = np.array([end for _, end in runs], np.int64)
        sizes = self._ends - self._starts
        self._offsets = np.cumsum(sizes) - sizes
        super().__init__("global", int(sizes.sum()))
        for start, offset, size in zip(self._starts, self._offsets, sizes, strict=True):
            self.bytes[offset : offset + size] = _at(int(start), int(size))
        self._writing_program = np.full(len(self.bytes), -1, np.int32)
        self._reading_program = np.full(len(self.bytes), -1, np.int32)  # -2: several

    def write_back(self) -> None:
        """What was stored goes to the tensors."""
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            target = _at(int(start), int(end - start))
            source = self.bytes[offset : offset + end - start]
            if not np.array_equal(target, source):
                target[:] = source

    def locate(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """An access that lies in two runs lies in none."""
        if not len(self._starts):
            return np.zeros(len(addresses), bool), np.empty(0, np.int64)
        run = np.maximum(np.searchsorted(self._starts, addresses, side="right") - 1, 0)
        inside = (addresses >= self._starts[run]) & (addresses + size <= self._ends[run])
        return inside, (addresses - self._starts[run] + self._offsets[run])[inside]

    def distance(self, address: int) -> int:
        """Bytes from the end of the nearest run that starts before."""
        return min(
            (
                address - int(end)
                for start, end in zip(self._starts, self._ends, strict=True)
                if start <= address
            ),
            default=0,
            key=abs,
        )

    def track(self, access: Access) -> str | None:
        within = super().track(access)
        return self._between_programs(access) or within

    def _between_programs(self, access: Access) -> str | None:
        places, program, changed = access.places, access.program, access.changed
        writers, readers = self._writing_program[places], self._reading_program[places]
        foreign = (writers >= 0) & (writers != program)
        if changed is None:
            self._reading_program[places] = np.where(
                (readers == -1) | (readers == program), program, -2
            )
            if foreign.any():
                return "global memory: reads what another program of the launch wrote"
            return None
        self._writing_program[places] = program
        if (foreign & changed).any():
            return "global memory: writes what another program of the launch wrote"
        if ((readers != -1) & (readers != program) & changed).any():
            return "global memory: writes what another program of the launch read"
        return None


def _runs(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Address ranges that the elements of a tensor fill, outer dimensions one by one where their
    rows leave gaps."""
    if not tensor.numel():
        return []
    if tensor.is_contiguous():
        return [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())]
    return [run for part in tensor.unbind(0) for run in _runs(part)]


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with those that overlap made one; those that only touch stay apart."""
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
