"""The PTX emulator: each kind of planted fault is found and named, and right code gives right
results and no finding."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which the interpreter does not", allow_module_level=True)

import torch
import triton
import triton.language as tl

from benchmarks.instruments.emulator import emulate
from benchmarks.instruments.launch import TARGETS, gpu_on_cpu
from benchmarks.instruments.ptx import parse

HEAD = """
.version 8.0
.target sm_80
.visible .entry probe(.param .u64 .ptr .global .align 1 probe_param_0) .reqntid 64 {
  .reg .pred %p<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  ld.param.b64 %rd1, [probe_param_0];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mov.b32 %r3, global_smem;
  add.s32 %r4, %r3, %r2;
  cvt.u64.u32 %rd2, %r2;
  add.s64 %rd3, %rd1, %rd2;
"""


def probe(body, size=64):
    """Runs hand-written instructions in 64 threads on an int32 tensor; %rd3 is the thread's
    element, %r4 its place in shared memory."""
    data = torch.arange(size, dtype=torch.int32)
    findings = emulate(
        parse(HEAD + body + "\n ret;\n}"), (1,), [data], num_warps=2, shared_bytes=256
    )
    return findings, data


# Each thread hands its element to the thread of the other warp, through shared memory.
HAND_OVER = """
  ld.global.b32 %r5, [%rd3];
  st.shared.b32 [%r4], %r5;
  {barrier}
  xor.b32 %r6, %r2, 128;
  add.s32 %r7, %r3, %r6;
  ld.shared.b32 %r8, [%r7];
  st.global.b32 [%rd3], %r8;
"""


def test_barrier_between_warps():
    findings, data = probe(HAND_OVER.format(barrier="bar.sync 0;"))
    assert findings.clean
    assert torch.equal(data, torch.arange(64, dtype=torch.int32).roll(32))


def test_race_in_shared_memory():
    findings, _ = probe(HAND_OVER.format(barrier=""))
    assert (
        "shared memory: reads what another warp wrote since the last barrier" in findings.races[0]
    )
    assert "ld.shared" in findings.races[0]


HALF_WRITTEN = "setp.lt.s32 %p1, %r1, 8; @%p1 mov.b32 %r9, 0;"

FAULTS = {
    "read of a register that was never written": (
        "add.s32 %r9, %r10, 1;",
        "undefined",
        "%r10 is read and was never written",
    ),
    "stored where another branch wrote": (
        f"{HALF_WRITTEN} add.s32 %r10, %r9, 1; st.global.b32 [%rd3], %r10;",
        "undefined",
        "a register is used in threads that did not write it: st.global",
    ),
    "stored after a shuffle from threads that did not write": (
        f"{HALF_WRITTEN} shfl.sync.idx.b32 %r10, %r9, 31, 31, -1; st.global.b32 [%rd3], %r10;",
        "undefined",
        "a register is used in threads that did not write it: st.global",
    ),
    "a branch on what another branch wrote": (
        f"{HALF_WRITTEN} setp.lt.s32 %p2, %r9, 8; @%p2 bra $AROUND; mov.b32 %r10, 1;\n$AROUND:",
        "undefined",
        "a register is used in threads that did not write it: @%p2 bra",
    ),
    "an address that another branch wrote": (
        f"{HALF_WRITTEN} add.s32 %r10, %r4, %r9; ld.shared.b32 %r11, [%r10];",
        "undefined",
        "a register is used in threads that did not write it: ld.shared",
    ),
    "shared memory that was never written": (
        "ld.shared.b32 %r9, [%r4];",
        "undefined",
        "shared memory is read and was not written",
    ),
    "outside of shared memory": ("st.shared.b32 [%r4+256], %r1;", "out_of_bounds", "shared memory"),
    "read past the end": (
        "ld.global.b32 %r9, [%rd3+4];",
        "out_of_bounds",
        "1 threads of program 0, thread 63 at +0 bytes",
    ),
    "write before the start": (
        "st.global.b32 [%rd3+-4], %r1;",
        "out_of_bounds",
        "1 threads of program 0, thread 0",
    ),
    "vector access off its alignment": (
        "ld.global.v2.b32 {%r9, %r10}, [%rd1+4];",
        "misaligned",
        "8-byte access at an address that is 4 mod 8",
    ),
    "threads store different values to one place": (
        "st.global.b32 [%rd1], %r1;",
        "races",
        "threads write different values to a byte at once",
    ),
    "one warp overwrites what the other reads": (
        (
            "ld.global.b32 %r9, [%rd1]; add.s32 %r9, %r9, 7; setp.gt.s32 %p1, %r1, 62; @%p1"
            " st.global.b32 [%rd1], %r9;"
        ),
        "races",
        "writes what another warp read",
    ),
    "a barrier that half of the threads miss": (
        "setp.lt.s32 %p1, %r1, 32; @%p1 bra $AROUND; bar.sync 0;\n$AROUND:",
        "undefined",
        "a barrier that 32 threads of the program miss",
    ),
    "a shuffle from threads that left": (
        "setp.gt.s32 %p1, %r1, 15; @%p1 ret; shfl.sync.bfly.b32 %r9, %r1, 16, 31, -1;",
        "undefined",
        "a shuffle reads a thread that takes no part in it",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name):
    body, kind, message = FAULTS[name]
    findings, _ = probe(body)
    assert message in "\n".join(getattr(findings, kind)), findings


@pytest.mark.parametrize(
    "body",
    [
        # among the threads that wrote it
        f"{HALF_WRITTEN} shfl.sync.bfly.b32 %r10, %r9, 4, 31, -1; @%p1 st.global.b32 [%rd3], %r10;",
        # and written again
        f"{HALF_WRITTEN} add.s32 %r10, %r9, 1; mov.b32 %r10, 2; st.global.b32 [%rd3], %r10;",
    ],
    ids=["shuffled", "written again"],
)
def test_what_was_not_written_and_has_no_effect_is_no_fault(body):
    findings, _ = probe(body)
    assert findings.clean, findings


def test_storing_the_same_value_twice_is_no_race():
    findings, data = probe("mov.b32 %r9, 5; st.global.b32 [%rd1], %r9;")
    assert findings.clean and data[0] == 5


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("atom.global.add.u32 %r9, [%rd1], 1;", "atom"),
        ("lop3.b32 %r9, %r1, %r1, %r1, 1;", "lop3"),
        ("mul.hi.s32 %r9, %r1, %r1;", "mul.hi"),
        ("add.f32 %r9, %r1, %r1, %r1;", "add.f32"),
        ("mov.b32 %r9, %clock;", "%clock"),
    ],
)
def test_unknown_instruction_is_named(instruction, name):
    with pytest.raises(NotImplementedError, match=name):
        probe(instruction)


def test_endless_loop_ends(monkeypatch):
    monkeypatch.setattr("benchmarks.instruments.emulator.scheduler.MOST_STEPS", 100)
    with pytest.raises(TimeoutError, match="still runs after 100"):
        probe("$AGAIN:\n bra $AGAIN;")


def test_text_without_a_kernel():
    with pytest.raises(ValueError, match=r"no \.entry"):
        parse(".version 8.0")
    with pytest.raises(ValueError, match="ends inside"):
        parse(HEAD)


# What Triton compiles


@triton.jit
def _row_sum_kernel(x_ptr, y_ptr, row_stride, columns, BLOCK: tl.constexpr, HINT: tl.constexpr):
    row = tl.program_id(0)
    start = row * row_stride
    if HINT:
        start = tl.multiple_of(start, 16)
    places = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + start + places, mask=places < columns, other=0.0)
    tl.store(y_ptr + row, tl.sum(values.to(tl.float32), 0))


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + places, mask=places < n).to(tl.float32) * factor
    tl.store(y_ptr + places, value.to(y_ptr.dtype.element_ty), mask=places < n)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("columns", [1024, 1000, 77])
def test_sums_over_warps(target, columns):
    x, y = torch.randn(3, columns), torch.empty(3)
    with gpu_on_cpu(target) as launches:
        _row_sum_kernel[(3,)](x, y, x.stride(0), columns, BLOCK=1024, HINT=False)
    assert torch.allclose(y, x.sum(1), atol=1e-4)
    assert launches[0].kernel == "_row_sum_kernel" and launches[0].grid == (3,)
    if columns == 1024:
        # specialised on what divides by 16, as on a GPU
        assert "ld.global.v4.b32" in launches[0].ptx


def test_missing_barrier_in_compiled_code():
    x, y = torch.randn(1, 1024), torch.empty(1)
    with gpu_on_cpu("sm_90") as launches:
        _row_sum_kernel[(1,)](x, y, 1024, 1024, BLOCK=1024, HINT=False)
    without = launches[0].ptx.replace("bar.sync", "// bar.sync")
    findings = emulate(
        parse(without), (1,), [x, y, 1024, 1024], launches[0].num_warps, shared_bytes=256
    )
    assert findings.races


def test_false_claim_of_divisibility():
    x, y = torch.randn(3 * 1009), torch.empty(3)
    with pytest.raises(AssertionError, match=r"misaligned=.*16-byte access"), gpu_on_cpu("sm_80"):
        _row_sum_kernel[(3,)](x, y, 1009, 1008, BLOCK=1024, HINT=True)


def test_bounds_are_those_of_a_view():
    storage = torch.randn(4, 64)
    view, y = storage[:, :48], torch.empty(4)
    with gpu_on_cpu("sm_80"):
        _row_sum_kernel[(4,)](view, y, 64, 48, BLOCK=64, HINT=False)
    with (
        pytest.raises(AssertionError, match=r"out_of_bounds=.*threads of program"),
        gpu_on_cpu("sm_80"),
    ):
        _row_sum_kernel[(4,)](view, y, 64, 49, BLOCK=64, HINT=False)


@triton.jit
def _all_to_first_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_race_between_programs():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)
    with (
        pytest.raises(AssertionError, match="writes what another program of the launch wrote"),
        gpu_on_cpu("sm_90"),
    ):
        _all_to_first_kernel[(3,)](x, y)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_ieee(target, dtype):
    """All magnitudes, ties, subnormal numbers, infinities and NaN, on the way to 16 bits and
    back."""
    bits = torch.randint(-(2**31), 2**31, (1536,), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    ties = (torch.arange(256, dtype=torch.int32) << 16 | 0x8000) + 0x3F000000
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), 1e-40, -1e-45, 65519.0, 65520.0]
    )
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    x = x[~x.isnan()]
    y, back = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape)
    n = len(x)
    with gpu_on_cpu(target):
        _scale_kernel[(triton.cdiv(n, 256),)](x, y, n, 1.0, BLOCK=256)
        _scale_kernel[(triton.cdiv(n, 256),)](y, back, n, 1.0, BLOCK=256)
    assert torch.equal(y, x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())


def test_target_is_checked():
    with pytest.raises(ValueError, match="sm_80, sm_90, sm_100"), gpu_on_cpu("gfx942"):
        pass


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count):
    """What stmatrix laid down lies row by row, and ldmatrix reads the same."""
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    body = f"""
      and.b32 %r5, %r1, 31; shr.b32 %r6, %r1, 5; shl.b32 %r6, %r6, 9; shl.b32 %r7, %r5, 4;
      add.s32 %r8, %r3, %r6; add.s32 %r8, %r8, %r7; ld.global.b32 %r10, [%rd3];
      add.s32 %r11, %r10, 100; add.s32 %r12, %r10, 200; add.s32 %r13, %r10, 300;
      stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r8], {{{names}}}; bar.sync 0; """
    plain = (
        "add.s32 %r9, %r3, %r6; shl.b32 %r7, %r5, 2; add.s32 %r9, %r9, %r7; ld.shared.b32 %r15,"
        " [%r9+{at}]; st.global.b32 [%rd3], %r15;"
    )
    again = (
        f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{names}}}, [%r8]; st.global.b32 [%rd3],"
        f" %r{9 + count};"
    )
    expected = torch.arange(64, dtype=torch.int32) + 100 * (count - 1)
    for read in (plain.format(at=128 * (count - 1)), again):
        data = torch.arange(64, dtype=torch.int32)
        findings = emulate(
            parse(HEAD + body + read + "\n ret;\n}"), (1,), [data], num_warps=2, shared_bytes=1024
        )
        assert findings.clean, findings
        assert torch.equal(data, expected)
