"""The meter on kernels with planted faults, each beside its clean twin, and exact byte counts.

TRITON_INTERPRET binds when triton is imported: without it, this file runs itself in one process
that has it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from benchmarks.instruments.traffic import Meter  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]

inside = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts"
)
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")


@outside
def test_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-o", "addopts="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 0


@outside
def test_without_the_interpreter_it_refuses():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), Meter():
        pass


@outside
def test_imports_without_triton():
    script = (
        "import sys, benchmarks.instruments.traffic, benchmarks.instruments.machine_code;"
        " sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_unknown_order():
    with pytest.raises(ValueError, match="sideways"):
        Meter(order="sideways")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < n), mask=columns < n)


# Counts


@inside
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("order", [None, "reverse", "shuffle"])
def test_copy(dtype, order):
    x, y = torch.arange(100).to(dtype), torch.zeros(100, dtype=dtype)
    with Meter(order) as meter:
        _copy_kernel[(4,)](x, y, 100, BLOCK=32)  # the last program has four lanes
    assert torch.equal(x, y) and meter.clean
    assert meter.loaded == {"x_ptr": 100 * dtype.itemsize} and meter.stored == {
        "y_ptr": 100 * dtype.itemsize
    }


@inside
def test_launches_add_up_and_the_interpreter_is_restored():
    x, y = torch.ones(64), torch.zeros(64)
    with Meter() as meter:
        _copy_kernel[(2,)](x, y, 64, BLOCK=32)
        _copy_kernel[(1,)](x, y, 0, BLOCK=32)
        _copy_kernel[(1,)](x_ptr=x, y_ptr=y, n=10, BLOCK=32)
    _copy_kernel[(2,)](x, y, 64, BLOCK=32)
    assert meter.loaded["x_ptr"] == meter.stored["y_ptr"] == (64 + 10) * 4 and meter.clean


@triton.jit
def _broadcast_kernel(x_ptr, scale_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    pairs = tl.load(x_ptr + columns // 2)  # two lanes an address
    everywhere = tl.load(scale_ptr + columns * 0)  # all lanes one address
    tl.store(y_ptr + columns, pairs * everywhere * tl.load(scale_ptr))


@inside
def test_lanes_that_share_an_address_count_once():
    y = torch.zeros(32)
    with Meter() as meter:
        _broadcast_kernel[(1,)](torch.ones(16), torch.full((1,), 3.0), y, BLOCK=32)
    assert (y == 9).all() and meter.clean
    assert meter.loaded == {"x_ptr": 16 * 4, "scale_ptr": 2 * 4} and meter.stored == {
        "y_ptr": 32 * 4
    }


@triton.jit
def _strided_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    odd = columns % 2 == 1
    tl.store(
        y_ptr + columns,
        tl.load(x_ptr + (BLOCK - 1 - columns) * stride, mask=odd, other=-1.0),
        mask=columns >= 4,
    )


@inside
def test_masked_lanes_count_for_nothing():
    x, y = torch.arange(24.0).view(8, 3), torch.zeros(8)
    with Meter() as meter:
        _strided_kernel[(1,)](x, y, 3, BLOCK=8)
    assert meter.loaded == {"x_ptr": 4 * 4} and meter.stored == {"y_ptr": 4 * 4} and meter.clean
    assert y.tolist() == [0, 0, 0, 0, -1, 6, -1, 0]


@triton.jit
def _add_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + columns), axis=0))


@inside
def test_an_atomic_loads_and_stores():
    total = torch.zeros(1)
    with Meter() as meter:
        _add_kernel[(4,)](torch.ones(32), total, BLOCK=8)
    assert total.item() == 32 and meter.clean  # atomics of several programs are no race
    assert meter.loaded == {"x_ptr": 128, "total_ptr": 16} and meter.stored == {"total_ptr": 16}


@inside
def test_bytes_of_overlapping_arguments_go_to_the_shorter_one():
    storage = torch.ones(64)
    with Meter() as meter:
        _copy_kernel[(1,)](storage, storage[32:], 32, BLOCK=32)
    assert meter.loaded == {"x_ptr": 128} and meter.stored == {"y_ptr": 128} and meter.clean


# Out of bounds


@inside
@pytest.mark.parametrize("view", [False, True], ids=["tensor", "view"])
@pytest.mark.parametrize("at", ["start", "end"])
def test_out_of_bounds(view, at):
    storage = torch.full((64,), 7.0)
    x, y = (storage[8:14] if view else torch.ones(6)), torch.zeros(8)
    with Meter() as clean:
        _copy_kernel[(1,)](x, y, 6, BLOCK=8)
    assert clean.clean
    with Meter() as meter:
        if at == "end":
            _copy_kernel[(1,)](x, y, 8, BLOCK=8)
        else:
            _before_kernel[(1,)](x, y, BLOCK=4)
    (finding,) = meter.out_of_bounds
    assert "load of 2 x 4 bytes" in finding and "x_ptr" in finding and not meter.clean
    assert re.match(r"test_traffic\.py:\d+ \(_(copy|before)_kernel, program 0\) ", finding)
    assert meter.loaded["x_ptr"] == (24 if at == "end" else 8)  # what was in bounds
    # lanes out of bounds are off: a view's neighbours do not come through
    assert 7.0 not in y[6:] or not view


@triton.jit
def _before_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns - 2))


@inside
@pytest.mark.parametrize("view", [False, True], ids=["tensor", "view"])
def test_store_out_of_bounds(view):
    storage = torch.full((64,), 7.0)
    x, y = torch.ones(8), (storage[8:14] if view else torch.zeros(6))
    with Meter() as meter:
        _copy_kernel[(1,)](x, y, 8, BLOCK=8)
    (finding,) = meter.out_of_bounds
    assert "store of 2 x 4 bytes" in finding
    assert (y == 1).all() and (storage[14:] == 7).all()  # nothing was written behind the view
    assert meter.stored["y_ptr"] == 24


@triton.jit
def _wild_kernel(x_ptr, y_ptr, far):
    tl.store(
        y_ptr + far,
        tl.load(x_ptr + far) + tl.atomic_add(x_ptr + far, 1) + tl.atomic_cas(x_ptr + far, 0, 1),
    )


@inside
def test_the_process_survives_wild_addresses():
    with Meter() as meter:
        _wild_kernel[(1,)](
            torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 2**40
        )
    assert len(meter.out_of_bounds) == 3  # load, atomics (one line a kind and statement), store
    assert meter.loaded.total() == meter.stored.total() == 0


# Races


@triton.jit
def _overlap_kernel(y_ptr, step, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(
        y_ptr + program * step + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32) * program
    )


@inside
@pytest.mark.parametrize("order", [None, "reverse", "shuffle"])
def test_race_of_stores(order):
    with Meter(order) as clean:
        _overlap_kernel[(4,)](torch.zeros(64), 16, BLOCK=16)
    assert clean.clean
    with Meter(order) as meter:
        _overlap_kernel[(4,)](torch.zeros(64), 15, BLOCK=16)
    (finding,) = meter.races
    assert "store of y_ptr" in finding and "has written it" in finding and not meter.clean


@triton.jit
def _shift_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns + shift))


@inside
@pytest.mark.parametrize("order", [None, "reverse", "shuffle"])
def test_race_of_a_load_and_a_store(order):
    storage = torch.arange(40.0)
    with Meter(order) as clean:
        _shift_kernel[(4,)](storage, storage, 0, BLOCK=8)  # in place, each program its own
    assert clean.clean
    with Meter(order) as meter:
        _shift_kernel[(4,)](storage, storage, 4, BLOCK=8)
    assert meter.races and not (meter.hazards or meter.out_of_bounds)
    with Meter(order) as aliased:
        # the same, through overlapping arguments
        _shift_kernel[(4,)](storage[4:], storage[:36], 0, BLOCK=8)
    assert aliased.races


@triton.jit
def _mixed_kernel(x_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(x_ptr, 1.0)
    else:
        if tl.program_id(0) == 1:
            tl.store(x_ptr, 1.0)
        else:
            tl.atomic_add(x_ptr, 1.0)


@inside
@pytest.mark.parametrize("order", [None, "reverse"])
def test_race_of_an_atomic_and_a_plain_store(order):
    with Meter(order) as clean:
        _mixed_kernel[(3,)](torch.zeros(1), ATOMIC=True)
    assert clean.clean
    with Meter(order) as meter:
        _mixed_kernel[(3,)](torch.zeros(1), ATOMIC=False)
    assert meter.races


@triton.jit
def _last_kernel(x_ptr, y_ptr, barrier: tl.constexpr):
    tl.atomic_add(x_ptr, 1.0)
    if barrier:
        tl.debug_barrier()
    if tl.program_id(0) == 1:
        tl.store(y_ptr, tl.load(x_ptr))


@inside
def test_atomics_of_earlier_programs_are_not_forgotten():
    with Meter() as meter:
        _last_kernel[(2,)](torch.zeros(1), torch.zeros(1), barrier=True)
    (finding,) = meter.races  # program 1 added last, but program 0 did before
    assert "several programs" in finding and not meter.hazards


@inside
def test_one_launch_after_the_other_is_no_race():
    x, y = torch.ones(32), torch.zeros(32)
    with Meter() as meter:
        _copy_kernel[(2,)](x, y, 32, BLOCK=16)
        _copy_kernel[(1,)](y, x, 32, BLOCK=32)
    assert meter.clean


# Hazards


@triton.jit
def _put(pointer, value):
    tl.store(pointer, value)


@triton.jit
def _reverse_kernel(y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, columns)
    if BARRIER:
        tl.debug_barrier()
    _put(y_ptr + BLOCK + columns, tl.load(y_ptr + BLOCK - 1 - columns))


@triton.jit
def _twice_kernel(y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    _put(y_ptr + columns, columns)
    if BARRIER:
        tl.debug_barrier()
    _put(y_ptr + BLOCK - 1 - columns, columns)


@inside
@pytest.mark.parametrize(
    "kernel", [_reverse_kernel, _twice_kernel], ids=["store and load", "stores by one helper"]
)
def test_hazard(kernel):
    with Meter() as clean:
        kernel[(1,)](torch.zeros(16, dtype=torch.int32), BARRIER=True, BLOCK=8)
    assert clean.clean
    with Meter() as meter:
        kernel[(1,)](torch.zeros(16, dtype=torch.int32), BARRIER=False, BLOCK=8)
    (finding,) = meter.hazards
    assert "no barrier in between" in finding and not meter.races and not meter.clean


@triton.jit
def _loop_kernel(y_ptr, BLOCK: tl.constexpr):
    for i in range(3):
        tl.store(y_ptr + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + i)


@inside
def test_a_statement_that_repeats_its_store_is_no_hazard():
    with Meter() as meter:
        _loop_kernel[(1,)](torch.zeros(8, dtype=torch.int32), BLOCK=8)
    assert meter.clean


# Memory that nobody wrote


@inside
def test_read_of_unwritten_memory():
    x, y, z = torch.ones(32), torch.empty(32), torch.zeros(32)
    with Meter(uninitialised=[y, z]) as clean:
        _copy_kernel[(2,)](x, y, 32, BLOCK=16)
        _copy_kernel[(2,)](y, z, 32, BLOCK=16)  # written by the launch before
    assert clean.clean
    with Meter(uninitialised=[y]) as meter:
        _copy_kernel[(2,)](x, y, 20, BLOCK=16)
        _copy_kernel[(2,)](y, z, 32, BLOCK=16)
    (finding,) = meter.uninitialised
    assert "reads 48 unwritten bytes of x_ptr" in finding and not meter.clean


@inside
def test_an_atomic_reads_what_it_adds_to():
    total = torch.empty(1)
    with Meter(uninitialised=[total]) as meter:
        _add_kernel[(2,)](torch.ones(16), total, BLOCK=8)
    assert len(meter.uninitialised) == 1


# Order


@triton.jit
def _ticket_kernel(counter_ptr, y_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(y_ptr + place, tl.atomic_add(counter_ptr, 1))


@inside
@pytest.mark.parametrize("grid", [(6,), (3, 2), (1, 2, 3)])
def test_order_shows_what_depends_on_it(grid):
    def tickets(order, seed=0):
        counter, y = torch.zeros(1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
        with Meter(order, seed=seed) as meter:
            _ticket_kernel[grid](counter, y)
        assert meter.clean  # a result that depends on the order is no race where atomics make it
        return y.tolist()

    assert tickets(None) == [0, 1, 2, 3, 4, 5]
    assert tickets("reverse") == [5, 4, 3, 2, 1, 0]
    shuffled = tickets("shuffle")
    assert (
        sorted(shuffled) == [0, 1, 2, 3, 4, 5]
        and shuffled == tickets("shuffle")
        and shuffled != tickets(None)
    )
    assert shuffled != tickets("shuffle", seed=1)


# Cost


@inside
def test_bookkeeping_of_megabytes_takes_a_fraction_of_a_second():
    x, y = torch.ones(4 << 20, dtype=torch.bfloat16), torch.empty(4 << 20, dtype=torch.bfloat16)
    started = time.perf_counter()
    with Meter(uninitialised=[y]) as meter:
        _copy_kernel[(512,)](x, y, x.numel(), BLOCK=8192)
    assert time.perf_counter() - started < 10  # about 0.3 s on a slow core
    assert meter.clean and meter.loaded["x_ptr"] == meter.stored["y_ptr"] == 8 << 20
