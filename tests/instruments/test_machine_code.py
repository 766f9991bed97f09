"""The static report on small kernels whose machine code is known, for all four targets."""

import os

import pytest

triton = pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not under the interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

from benchmarks.instruments.machine_code import CLASSES, TARGETS, report  # noqa: E402

pytestmark = pytest.mark.parametrize("target", TARGETS)
BLOCK, WARPS = 4096, 4


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < n), mask=columns < n)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total += tl.exp2(tl.load(x_ptr + columns, mask=columns < n, other=0.0).to(tl.float32))
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _rows_kernel(x_ptr, y_ptr, rows, n, BLOCK: tl.constexpr):
    """A loop in a loop; the outer one stores."""
    for row in range(rows):
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _two_paths_kernel(x_ptr, y_ptr, flag, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if flag == 0:
        tl.store(y_ptr + columns, tl.zeros([BLOCK], tl.bfloat16))
    else:
        tl.store(y_ptr + columns, (tl.load(x_ptr + columns).to(tl.float32) * 3.0).to(tl.bfloat16))


@triton.jit
def _hold_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every element must be held until the sum of all is known."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns).to(tl.float32)
    tl.store(y_ptr + columns, x - tl.sum(x, axis=0))


COPY = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "flag": "i32"}
SUM = {**COPY, "y_ptr": "*fp32", "rows": "i32"}
ALIGNED = {"x_ptr", "y_ptr", "n"}


def lanes(target):
    return 64 if target.startswith("gfx") else 32


def per_thread(target):
    return BLOCK / (lanes(target) * WARPS)


def test_width_of_accesses(target):
    aligned = report(_copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, target, WARPS)
    vectors = per_thread(target) / 8  # of eight bf16
    assert aligned.accesses == {("load", 128): vectors, ("store", 128): vectors}
    assert aligned.widths == {128}
    # n may cut a vector in two
    odd = report(_copy_kernel, COPY, {"BLOCK": BLOCK}, {"x_ptr", "y_ptr"}, target, WARPS)
    assert odd.accesses == {("load", 16): per_thread(target), ("store", 16): per_thread(target)}


def test_straight_line_per_element(target):
    inferred = report(_copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, target, WARPS)
    given = report(
        _copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, target, WARPS, elements_per_program=BLOCK
    )
    assert inferred.bodies == given.bodies
    (body,) = given.bodies
    assert body.kind == "straight" and body.elements == per_thread(target)
    assert body.bytes_loaded_per_element == body.bytes_stored_per_element == 2
    assert body.instructions == given.instructions == sum(body.mix.values())
    assert body.instructions_per_element == given.instructions / per_thread(target)
    assert set(body.mix) == set(CLASSES) and body.mix["memory"] >= 2 * per_thread(target) / 8
    assert body.mix["special"] == body.mix["conversion"] == body.mix["tensor"] == 0


def test_all_paths_are_counted(target):
    facts = report(
        _two_paths_kernel,
        COPY,
        {"BLOCK": BLOCK},
        ALIGNED,
        target,
        WARPS,
        elements_per_program=BLOCK,
    )
    (body,) = facts.bodies
    assert body.bytes_loaded_per_element == 2
    # on either path; a compiler may let them share some of the stores
    assert 2 < body.bytes_stored_per_element <= 4
    assert body.elements == per_thread(target)
    straight = report(
        _copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, target, WARPS, elements_per_program=BLOCK
    ).bodies[0]
    # The main path is the one that loads; of a kernel with one path it is nearly all (AMD has jumps
    # over what no lane wants).
    assert 0.8 * straight.instructions < straight.main_path <= body.main_path < body.instructions


@pytest.mark.parametrize("divisible", [True, False], ids=["aligned", "odd"])
def test_loop_per_element(target, divisible):
    aligned = ALIGNED if divisible else {"x_ptr", "y_ptr"}
    # elements_per_program is not used: there is a loop
    facts = report(
        _sum_kernel, SUM, {"BLOCK": BLOCK}, aligned, target, WARPS, elements_per_program=1
    )
    (body,) = facts.bodies
    assert body.kind == "loop" and body.elements == per_thread(target)
    assert body.bytes_loaded_per_element == 2 and body.bytes_stored == 0
    assert body.mix_per_element["special"] == 1  # the exp2
    assert body.main_path == body.instructions < facts.instructions
    assert facts.main_width == (128 if divisible else 16)
    assert facts.shared_bytes == 4 * WARPS and ("store", 32) in facts.accesses


def test_only_the_innermost_loop_counts(target):
    facts = report(_rows_kernel, SUM, {"BLOCK": BLOCK}, ALIGNED, target, WARPS)
    (body,) = facts.bodies
    assert body.elements == per_thread(target) and body.bytes_stored == 0
    assert ("store", 32) in facts.accesses


def test_element_size(target):
    signature = {**COPY, "x_ptr": "*fp32", "y_ptr": "*fp32"}
    (body,) = report(
        _copy_kernel, signature, {"BLOCK": BLOCK}, ALIGNED, target, WARPS, elem_bytes=4
    ).bodies
    assert body.elements == per_thread(target) and body.bytes_loaded_per_element == 4


def test_spills(target):
    fine = report(_hold_kernel, COPY, {"BLOCK": 2048}, ALIGNED, target, WARPS)
    assert fine.spill_ops == fine.local_bytes == 0
    # 128 elements a thread, and registers for half of them.
    tight = {"waves_per_eu": 8} if target.startswith("gfx") else {"maxnreg": 64}
    spilled = report(
        _hold_kernel, COPY, {"BLOCK": 128 * lanes(target)}, ALIGNED, target, 1, options=tight
    )
    assert spilled.spill_ops > 0 and spilled.local_bytes > 0
    assert spilled.registers <= 64


def test_occupancy(target):
    facts = report(_copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, target, WARPS)
    assert facts.registers <= 32
    # programs of four warps that fill a multiprocessor
    full = 8 if target.startswith("gfx") else 16
    assert facts.ctas_per_sm == full and facts.occupancy == 1
    held = report(_hold_kernel, COPY, {"BLOCK": 64 * lanes(target) * WARPS}, ALIGNED, target, WARPS)
    assert 64 < held.registers <= 128
    assert held.ctas_per_sm < full and held.occupancy == held.ctas_per_sm / full


def test_refusals(target):
    with pytest.raises(ValueError, match="sm_75"):
        report(_copy_kernel, COPY, {"BLOCK": BLOCK}, ALIGNED, "sm_75", WARPS)
