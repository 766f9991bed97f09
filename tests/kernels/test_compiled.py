"""The kernels compiled for four GPUs: no spills anywhere, 128-bit access to the logits where the vocabulary allows it."""

import pytest

triton = pytest.importorskip("triton")
from cases import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("compiles, so not under the interpreter", allow_module_level=True)

from compiled import compile_for  # noqa: E402

from mpo_kernels.kernels.logprob import _combine_kernel, _logprob_grad_kernel, _logprob_stats_kernel  # noqa: E402
from mpo_kernels.kernels.pair import _pair_kernel, _row_grad_kernel, _sequence_sums_kernel  # noqa: E402
from mpo_kernels.kernels.pool import _pool_kernel, _unpool_kernel  # noqa: E402
from mpo_kernels.kernels.tiles import TILES  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SCALARS = {"logit_scale": "fp32", "softcap": "fp32", "inverse_softcap": "fp32"}
INTEGERS = dict.fromkeys(
    ("N", "T", "V", "splits", "split_columns", "stride_b", "stride_t", "grad_stride_b", "grad_stride_t", "ignore_index", "blocks"), "i32"
)
LOGPROB = {
    **SCALARS,
    **INTEGERS,
    **dict.fromkeys(("logits_ptr", "grad_ptr"), "*bf16"),
    **dict.fromkeys(("logp_ptr", "normalizer_ptr", "row_grad_ptr", "entropy_ptr", "partials_ptr"), "*fp32"),
    "labels_ptr": "*i64",
    "is_argmax_ptr": "*i8",
}
POINTERS = {name for name in LOGPROB if name.endswith("_ptr")}
STRIDES = {"V", "split_columns", "stride_b", "stride_t", "grad_stride_b", "grad_stride_t"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [_logprob_stats_kernel, _logprob_grad_kernel], ids=["stats", "grad"])
@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("divisible", [True, False], ids=["V128256", "odd V"])
def test_logit_kernels(target, kernel, softcap, divisible):
    tiles = TILES["stats" if kernel is _logprob_stats_kernel else "grad"]
    tile = tiles.get(target, tiles["default"])
    constants = {"HAS_SCALE": False, "HAS_SOFTCAP": softcap, "BLOCK": tile.block}
    if kernel is _logprob_stats_kernel:
        constants |= {"HAS_TOKEN_OUTPUTS": False, "IS_PARTIAL": False, "IS_SLICE": False}
    aligned = POINTERS | STRIDES if divisible else POINTERS
    code = compile_for(kernel, LOGPROB, constants, aligned, target, tile.num_warps)
    assert code.local_bytes == 0
    assert (128 in code.widths) == divisible
    assert code.registers <= 128


@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels(target):
    signature = {
        **dict.fromkeys(("labels_ptr",), "*i64"),
        **dict.fromkeys(("cu_seqlens_ptr",), "*i32"),
        **dict.fromkeys(("mask_ptr",), "*u8"),
        **dict.fromkeys(("hidden_ptr", "grad_ptr"), "*bf16"),
        **dict.fromkeys(("N", "P", "D", "stride_n", "ignore_index", "blocks", "parts"), "i32"),
        "beta": "fp32",
        "is_argmax_ptr": "*i8",
    }
    flags = {"HAS_WEIGHTS": True, "HAS_MASK": True, "HAS_SUMS": False, "HAS_TOKEN_OUTPUTS": True, "ROWS": 16, "BLOCK": 128}
    for kernel in (_combine_kernel, _sequence_sums_kernel, _pair_kernel, _row_grad_kernel, _pool_kernel, _unpool_kernel):
        names = kernel.arg_names
        types = {name: signature.get(name, "*fp32") for name in names}
        constants = {name: value for name, value in flags.items() if name in names}
        aligned = {name for name in names if name.endswith("_ptr")} | {"D", "stride_n"} & set(names)
        assert compile_for(kernel, types, constants, aligned, target, 4).local_bytes == 0, kernel
