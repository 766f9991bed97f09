"""Log-probabilities of labels and their gradient: the kernels that touch every logit.

With final logits z, label y, peak m = max z, total = sum exp(z - m) and the upstream gradient g of
a row's log-probability:

    logp  = -log(1 + sum over j != y of exp(z_j - z_y))                    one read of the row   (4)
    dL/du = g * dz/du * (1 - p_y at the label, -p_j elsewhere)             one read, one write   (5)
    p_j = exp(z_j - m) / total        1 - p_y = -expm1(logp)
    z = cap * tanh(scale * u / cap)  ->  dz/du = scale * (1 - (z / cap)^2)                     (6)
    entropy = -p_y logp + (1 - p_y) (log Z - m' - mean' of (z - m'))    ' over other columns  (7)
    log of sum p^2 = log(p_y^2 + (1 - p_y)^2 sum' q^2)                  q = softmax of these  (11)

The label is kept out of the sum, so a label with p_y -> 1 keeps its digits in logp and in 1 - p_y;
m and total are kept apart, so large logits lose none to the rounding of a log-sum-exp. An ignored
row reads nothing in either kernel. Bytes per bf16 logit: 2 forward, 4 backward.

A row can be shared: by several programs when rows are few, or by the ranks of a vocabulary-parallel
head. Each share emits a partial (peak, total and weighted sum of its other columns, final label
logit or -inf; with the moments two numbers more), and `combine` puts the partials together in their
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mpo_kernels.backends.results import RowStats
from mpo_kernels.backends.triton.launch import kernel, launch
from mpo_kernels.backends.triton.tiles import splits_for, tile_for
from mpo_kernels.labels import IGNORED

PARTIAL = tl.constexpr(4)
"""Numbers of a partial: peak, total, weighted sum of z - peak (0 unless the entropy is wanted),
label's final logit."""

PARTIAL_WITH_MOMENTS = tl.constexpr(6)
"""Two more: sum of the squares of exp(z - peak), and sum of z over all columns."""

COMBINE_BLOCK = 128
"""Rows that one program of `combine` handles."""


WIDE_CAP = 32.0
"""The largest softcap, times fp32 rounding, that a final logit may be off by. Larger ones take a
tanh of more instructions."""

LOG2E = tl.constexpr(1.4426950408889634)
"""exp(x) = 2^(x * LOG2E)."""


@triton.jit
def _exp(x):
    # exp by the hardware's 2^x. tl.exp does the same but keeps results below 2^-126, which costs
    # three instructions an element.
    return tl.exp2(x * LOG2E)


@triton.jit
def _tanh_near_0(x, far):
    # tanh(x) to full relative precision: `far`, a value that is exact relative to 1, but for |x| <
    # 0.6, where a polynomial is (fitted to the least relative error, 3e-9).
    q = x * x
    series = -0.00589516
    series = series * q + 0.02079597
    series = series * q - 0.05378383
    series = series * q + 0.13331924
    series = series * q - 0.33333298
    return tl.where(q < 0.36, x + x * (q * series), far)


@triton.jit
def _tanh(x, IS_WIDE_CAP: tl.constexpr):
    # 1 - 2 / (exp(2x) + 1): right at both infinities, and exact to fp32 rounding relative to 1,
    # which scaled by the cap is what z needs, unless the cap is much larger than the logits.
    t = 1.0 - 2.0 / (_exp(2.0 * x) + 1.0)
    if IS_WIDE_CAP:
        t = _tanh_near_0(x, t)
    return t


@triton.jit
def _tanh_and_slope(x, IS_WIDE_CAP: tl.constexpr):
    # The same, and 1 - tanh(x)^2 without the cancellation that saturated logits would suffer.
    e = _exp(tl.minimum(2.0 * x, 80.0))  # finite, so that the slope is 0 and not NaN far out
    q = 1.0 / (e + 1.0)
    t = 1.0 - 2.0 * q
    if IS_WIDE_CAP:
        t = _tanh_near_0(x, t)
    return t, 4.0 * q * (q * e)


@triton.jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1 to full relative precision: 2 atanh(s) with s = x / (2 + x) <= 1/3,
    # whose series needs eight terms in fp32.
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _one_minus_exp(x):
    # 1 - exp(x) for x <= 0 to full relative precision: near 0, where the difference would cancel,
    # by the series of exp.
    series = 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _final_logit(
    u,
    logit_scale,
    softcap,
    inverse_softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE_CAP: tl.constexpr,
):
    """Equation (6)."""
    if HAS_SCALE:
        u = u * logit_scale
    if HAS_SOFTCAP:
        u = softcap * _tanh(u * inverse_softcap, IS_WIDE_CAP)
    return u


@triton.jit
def _but_for_its_factor(
    u,
    logit_scale,
    inverse_softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE_CAP: tl.constexpr,
):
    """The final logit without the last multiplication. A sum of products may be compiled such that
    the threads that share it round it differently."""
    if HAS_SOFTCAP:
        if HAS_SCALE:
            u = u * logit_scale
        u = _tanh(u * inverse_softcap, IS_WIDE_CAP)
    return u


@triton.jit
def _loaded(logit_scale_ptr, softcap_ptr):
    cap = tl.load(softcap_ptr)
    return tl.load(logit_scale_ptr), cap, 1.0 / cap


@triton.jit
def _decay(peak, new_peak):
    """exp(peak - new_peak), 0 for a sum that is still empty (peak -inf), also when both are."""
    return tl.where(peak == -float("inf"), 0.0, tl.exp(peak - new_peak))


@triton.jit
def _moved(weighted, total, peak, new_peak):
    """The weighted sum of exp(z - peak) * (z - peak), relative to a new peak."""
    return tl.where(
        total > 0.0, (weighted + total * (peak - new_peak)) * _decay(peak, new_peak), 0.0
    )


@triton.jit
def _absorb(
    peak,
    total,
    weighted,
    squares,
    logit_sum,
    z,
    counted,  # the final logits but for their factor where the column is there, else 0
    HAS_TOKEN_OUTPUTS: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
):
    """The sums of columns seen so far and of one more block of them."""
    new_peak = tl.maximum(peak, tl.max(z, axis=0))
    # a block of -inf must not make inf - inf
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    powers = _exp(z - shift)
    if HAS_TOKEN_OUTPUTS:
        weighted = _moved(weighted, total, peak, shift) + tl.sum(
            tl.where(powers > 0.0, powers * (z - shift), 0.0), axis=0
        )
    if HAS_MOMENTS:
        decay = _decay(peak, shift)
        # the choice keeps products out of the sum, as above
        block_squares = tl.sum(tl.where(powers > 0.0, powers * powers, 0.0), axis=0)
        squares = squares * decay * decay + block_squares
        logit_sum += tl.sum(counted, axis=0)
    total = total * _decay(peak, shift) + tl.sum(powers, axis=0)
    return new_peak, total, weighted, squares, logit_sum


@triton.jit
def _log_sum_squares(d, logp, total, squares):
    """Equation (11), with d = log((1 - p_y) / p_y): neither a likely label nor an impossible one
    loses digits."""
    log_others = -(tl.where(d < 0.0, -d, 0.0) + _log1p(tl.exp(-tl.abs(d))))  # log(1 - p_y)
    at_label = 2.0 * logp
    elsewhere = tl.where(
        squares == 0.0, -float("inf"), 2.0 * (log_others - tl.log(total)) + tl.log(squares)
    )
    apart = tl.abs(at_label - elsewhere)  # inf where one of them is -inf
    return tl.maximum(at_label, elsewhere) + _log1p(tl.exp(-apart))


@triton.jit
def _finish(
    peak,
    total,
    weighted,
    squares,
    logit_sum,
    z_label,
    row,  # one row or a block of rows
    vocab,
    logp_ptr,
    normalizer_ptr,
    entropy_ptr,
    is_argmax_ptr,
    moments_ptr,
    mask,
    HAS_TOKEN_OUTPUTS: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
):
    """Stores a row's results from its other columns and its label: equations (4), (7) and (11)."""
    # logp = -log(1 + exp(d)), d = log of the other columns' sum relative to the label. Both
    # branches of |d| stay finite.
    # -inf where no other column counts
    d = tl.where(total == 0.0, -float("inf"), (peak - z_label) + tl.log(total))
    logp = -(tl.where(d > 0.0, d, 0.0) + _log1p(tl.exp(-tl.abs(d))))
    # Where all columns are -inf, one is +inf or one is NaN, the whole row's softmax is NaN, and so
    # is its total by itself: inf - inf.
    row_peak = tl.maximum(peak, z_label)
    row_total = total * _decay(peak, row_peak) + tl.exp(z_label - row_peak)
    logp = tl.where(row_total == row_total, logp, row_total)
    tl.store(logp_ptr + row, logp, mask=mask)
    tl.store(normalizer_ptr + 2 * row, row_peak, mask=mask)
    tl.store(normalizer_ptr + 2 * row + 1, row_total, mask=mask)
    if HAS_TOKEN_OUTPUTS:
        # Every term is positive, so a confident row keeps the digits of its small entropy.
        at_label = tl.where(logp == -float("inf"), 0.0, -tl.exp(logp) * logp)
        log_others = tl.where(
            d > 0.0,
            tl.log(total) + _log1p(tl.exp(-tl.abs(d))),
            (z_label - peak) + _log1p(tl.exp(-tl.abs(d))),
        )  # log Z - m'
        elsewhere = tl.where(
            total > 0.0, _one_minus_exp(logp) * (log_others - weighted / total), 0.0
        )
        tl.store(entropy_ptr + row, at_label + elsewhere, mask=mask)
        # the maximum passes over NaN
        is_number = (row_total == row_total) | (tl.abs(row_peak) == float("inf"))
        tl.store(is_argmax_ptr + row, ((z_label >= peak) & is_number).to(tl.int8), mask=mask)
    if HAS_MOMENTS:
        log_sum_squares = _log_sum_squares(d, logp, total, squares)
        # the maximum passes over NaN
        log_sum_squares = tl.where(logp == logp, log_sum_squares, logp)
        tl.store(moments_ptr + 2 * row, log_sum_squares, mask=mask)
        tl.store(moments_ptr + 2 * row + 1, logit_sum / vocab, mask=mask)


@kernel
def _logprob_stats_kernel(
    logits_ptr,  # (B, T, V) any float, last dimension contiguous
    labels_ptr,  # (N,) int64, N = B * T
    # (N,) float32 out: 0 for ignored rows, NaN for labels outside [0, V). Not written when
    # IS_PARTIAL
    logp_ptr,
    # (N, 2) float32 out: peak and total, not written for ignored rows. Not written when IS_PARTIAL
    normalizer_ptr,
    entropy_ptr,  # (N,) float32 out, with HAS_TOKEN_OUTPUTS
    is_argmax_ptr,  # (N,) int8 out, with HAS_TOKEN_OUTPUTS
    moments_ptr,  # (N, 2) float32 out, with HAS_MOMENTS: log of sum p^2, mean of z
    # (splits, N, 4) float32 out when IS_PARTIAL, (splits, N, 6) with HAS_MOMENTS; not written for
    # ignored rows
    partials_ptr,
    N,
    T,
    V,
    stride_b,
    stride_t,
    splits,  # programs per row
    split_columns,  # columns of each, a multiple of BLOCK
    ignore_index,
    logit_scale,  # a number, or with ARE_STORED a pointer to one, like softcap
    softcap,
    inverse_softcap,
    ARE_STORED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE_CAP: tl.constexpr,
    HAS_TOKEN_OUTPUTS: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    # of a vocabulary-parallel head: a label outside of [0, V) is another rank's
    IS_SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if ARE_STORED:
        logit_scale, softcap, inverse_softcap = _loaded(logit_scale, softcap)
    # int32 divisions; a 64-bit one costs as much as the rest of a program
    program = tl.program_id(0)
    split = program % splits
    row_in_grid = program // splits
    row = row_in_grid.to(tl.int64)  # rows * V exceeds 2^31
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if not IS_PARTIAL:
            tl.store(logp_ptr + row, 0.0)
            if HAS_TOKEN_OUTPUTS:
                tl.store(entropy_ptr + row, 0.0)
                tl.store(is_argmax_ptr + row, 0)
            if HAS_MOMENTS:
                tl.store(moments_ptr + 2 * row, 0.0)
                tl.store(moments_ptr + 2 * row + 1, 0.0)
    else:
        row_ptr = (
            logits_ptr
            + (row_in_grid // T).to(tl.int64) * stride_b
            + (row_in_grid % T).to(tl.int64) * stride_t
        )
        known = (label >= 0) & (label < V)
        # Columns count from this share's first: a loop that starts at 0 takes half the registers.
        first = split * split_columns
        share_ptr = row_ptr + first
        share_columns = tl.minimum(split_columns, V - first)
        share_label = (tl.where(known, label, -1) - first).to(tl.int32)
        here = known & (share_label >= 0) & (share_label < share_columns)
        # Masks cost a third of the instructions, so only two blocks have them: the label's, and the
        # last if it is incomplete.
        full = share_columns // BLOCK
        label_block = tl.where(here, share_label // BLOCK, full)
        lanes = tl.arange(0, BLOCK)
        peak = -float("inf")  # of the other columns
        total = 0.0
        weighted = 0.0
        squares = 0.0
        logit_sum = 0.0  # of all columns
        for i in range(0, tl.where(label_block < full, full - 1, full)):
            start = tl.where(i < label_block, i, i + 1) * BLOCK
            u = tl.load(share_ptr + start + lanes).to(tl.float32)  # (BLOCK,)
            z = _final_logit(
                u, logit_scale, softcap, inverse_softcap, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP
            )
            counted = _but_for_its_factor(
                u, logit_scale, inverse_softcap, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP
            )
            peak, total, weighted, squares, logit_sum = _absorb(
                peak,
                total,
                weighted,
                squares,
                logit_sum,
                z,
                counted,
                HAS_TOKEN_OUTPUTS,
                HAS_MOMENTS,
            )
        for i in range(0, tl.where((label_block < full) & (full * BLOCK < share_columns), 2, 1)):
            start = tl.where(i == 0, label_block, full) * BLOCK
            columns = start + lanes
            # Not `columns < share_columns`: that V divides by 16 would be lost in the minimum.
            inside = columns < tl.where(start < share_columns, V - first, 0)
            u = tl.load(share_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
            z = _final_logit(
                u, logit_scale, softcap, inverse_softcap, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP
            )
            # after the cap, or padding would become -cap
            others = tl.where(inside & (columns != share_label), z, -float("inf"))
            counted = _but_for_its_factor(
                u, logit_scale, inverse_softcap, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP
            )
            counted = tl.where(inside, counted, 0.0)
            peak, total, weighted, squares, logit_sum = _absorb(
                peak,
                total,
                weighted,
                squares,
                logit_sum,
                others,
                counted,
                HAS_TOKEN_OUTPUTS,
                HAS_MOMENTS,
            )
        if HAS_SOFTCAP:
            logit_sum *= softcap
        elif HAS_SCALE:
            logit_sum *= logit_scale
        z_label = tl.load(share_ptr + share_label, mask=here, other=-float("inf")).to(tl.float32)
        z_label = _final_logit(
            z_label, logit_scale, softcap, inverse_softcap, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP
        )
        z_label = tl.where(here, z_label, -float("inf"))
        if not IS_SLICE:
            z_label = tl.where(known, z_label, float("nan"))
        if IS_PARTIAL:
            width = PARTIAL_WITH_MOMENTS if HAS_MOMENTS else PARTIAL
            partial_ptr = partials_ptr + (split.to(tl.int64) * N + row) * width
            tl.store(partial_ptr, peak)
            tl.store(partial_ptr + 1, total)
            tl.store(partial_ptr + 2, weighted)
            tl.store(partial_ptr + 3, z_label)
            if HAS_MOMENTS:
                tl.store(partial_ptr + 4, squares)
                tl.store(partial_ptr + 5, logit_sum)
        else:
            _finish(
                peak,
                total,
                weighted,
                squares,
                logit_sum,
                z_label,
                row,
                V,
                logp_ptr,
                normalizer_ptr,
                entropy_ptr,
                is_argmax_ptr,
                moments_ptr,
                None,
                HAS_TOKEN_OUTPUTS,
                HAS_MOMENTS,
            )


@kernel
def _combine_kernel(
    # (parts, N, 4) float32, (parts, N, 6) with HAS_MOMENTS, not read for ignored rows
    partials_ptr,
    labels_ptr,  # (N,) int64
    logp_ptr,  # (N,) float32 out
    normalizer_ptr,  # (N, 2) float32 out
    entropy_ptr,  # (N,) float32 out, with HAS_TOKEN_OUTPUTS
    is_argmax_ptr,  # (N,) int8 out, with HAS_TOKEN_OUTPUTS
    moments_ptr,  # (N, 2) float32 out, with HAS_MOMENTS
    N,
    parts,
    vocab,  # columns of all parts together, with HAS_MOMENTS
    ignore_index,
    HAS_TOKEN_OUTPUTS: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = rows < N
    scored = inside & (tl.load(labels_ptr + rows, mask=inside, other=ignore_index) != ignore_index)
    tl.store(logp_ptr + rows, tl.zeros([BLOCK], tl.float32), mask=inside & ~scored)
    if HAS_TOKEN_OUTPUTS:
        tl.store(entropy_ptr + rows, tl.zeros([BLOCK], tl.float32), mask=inside & ~scored)
        tl.store(is_argmax_ptr + rows, tl.zeros([BLOCK], tl.int8), mask=inside & ~scored)
    if HAS_MOMENTS:
        zeros = tl.zeros([BLOCK], tl.float32)
        tl.store(moments_ptr + 2 * rows, zeros, mask=inside & ~scored)
        tl.store(moments_ptr + 2 * rows + 1, zeros, mask=inside & ~scored)
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    z_label = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    width = PARTIAL_WITH_MOMENTS if HAS_MOMENTS else PARTIAL
    part_ptr = partials_ptr + rows * width
    for _ in range(parts):  # always in the same order
        part_peak = tl.load(part_ptr, mask=scored, other=0.0)
        part_total = tl.load(part_ptr + 1, mask=scored, other=1.0)
        part_label = tl.load(part_ptr + 3, mask=scored, other=0.0)
        new_peak = tl.maximum(peak, part_peak)
        if HAS_TOKEN_OUTPUTS:
            part_weighted = tl.load(part_ptr + 2, mask=scored, other=0.0)
            weighted = _moved(weighted, total, peak, new_peak) + _moved(
                part_weighted, part_total, part_peak, new_peak
            )
        if HAS_MOMENTS:
            decay, part_decay = _decay(peak, new_peak), _decay(part_peak, new_peak)
            part_squares = tl.load(part_ptr + 4, mask=scored, other=0.0)
            squares = squares * decay * decay + part_squares * part_decay * part_decay
            logit_sum += tl.load(part_ptr + 5, mask=scored, other=0.0)
        total = total * _decay(peak, new_peak) + part_total * _decay(part_peak, new_peak)
        peak = new_peak
        # NaN marks an unknown label
        z_label = tl.where((part_label != part_label) | (part_label > z_label), part_label, z_label)
        part_ptr += N.to(tl.int64) * width
    _finish(
        peak,
        total,
        weighted,
        squares,
        logit_sum,
        z_label,
        rows,
        vocab,
        logp_ptr,
        normalizer_ptr,
        entropy_ptr,
        is_argmax_ptr,
        moments_ptr,
        scored,
        HAS_TOKEN_OUTPUTS,
        HAS_MOMENTS,
    )


@kernel
def _logprob_grad_kernel(
    logits_ptr,  # (B, T, V)
    labels_ptr,  # (N,) int64
    logp_ptr,  # (N,) float32
    normalizer_ptr,  # (N, 2) float32
    row_grad_ptr,  # (N,) float32: dL/dlogp of each row, not read for ignored rows
    entropy_ptr,  # (N,) float32, with HAS_ENTROPY_GRAD
    entropy_grad_ptr,  # (N,) float32, with HAS_ENTROPY_GRAD: dL/dentropy of each row
    grad_ptr,  # (B, T, V) out, may be logits_ptr
    T,
    V,
    blocks,  # blocks of columns per row
    stride_b,
    stride_t,
    grad_stride_b,
    grad_stride_t,
    ignore_index,
    logit_scale,  # a number, or with ARE_STORED a pointer to one, like softcap
    softcap,
    inverse_softcap,
    ARE_STORED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_WIDE_CAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Equations (5) and (12). One program per block of one row: every block is independent, so few
    rows still fill the GPU."""
    if ARE_STORED:
        logit_scale, softcap, inverse_softcap = _loaded(logit_scale, softcap)
    program = tl.program_id(0)  # grid on axis 0, which has no limit of 65,535
    row_in_grid = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    row = row_in_grid.to(tl.int64)  # rows * V exceeds 2^31
    batch = (row_in_grid // T).to(tl.int64)
    position = (row_in_grid % T).to(tl.int64)
    out_ptr = grad_ptr + batch * grad_stride_b + position * grad_stride_t + columns
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(out_ptr, tl.zeros([BLOCK], dtype=grad_ptr.dtype.element_ty), mask=inside)
    else:
        label_column = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        peak = tl.load(normalizer_ptr + 2 * row)
        slope = tl.load(row_grad_ptr + row)
        if HAS_SCALE:
            slope = slope * logit_scale
        # a division per row instead of one per element
        at_others = -slope / tl.load(normalizer_ptr + 2 * row + 1)
        u = tl.load(
            logits_ptr + batch * stride_b + position * stride_t + columns, mask=inside, other=0.0
        ).to(tl.float32)
        if HAS_SCALE:
            u = u * logit_scale
        z = u
        if HAS_SOFTCAP:
            t, capped_slope = _tanh_and_slope(u * inverse_softcap, IS_WIDE_CAP)
            z = softcap * t
        if HAS_ENTROPY_GRAD:
            entropy = tl.load(entropy_ptr + row)
            entropy_slope = tl.load(entropy_grad_ptr + row)
            if HAS_SCALE:
                entropy_slope = entropy_slope * logit_scale
            total = tl.load(normalizer_ptr + 2 * row + 1)
            at_others -= entropy_slope * (entropy - tl.log(total)) / total
            powers = _exp(z - peak)
            log_powers = tl.where(powers == 0.0, 0.0, z - peak)  # 0 log 0 is 0
            grad = powers * (at_others - log_powers * (entropy_slope / total))
        else:
            grad = _exp(z - peak) * at_others
        # the other blocks need no comparison per element
        if label_column // BLOCK == program % blocks:
            if HAS_ENTROPY_GRAD:
                logp = tl.load(logp_ptr + row)
                p = tl.exp(logp)
                at_label = slope * _one_minus_exp(logp)
                at_label -= entropy_slope * p * (tl.where(p == 0.0, 0.0, logp) + entropy)
                grad = tl.where(columns == label_column, at_label, grad)
            else:
                grad = tl.where(
                    columns == label_column, slope * _one_minus_exp(tl.load(logp_ptr + row)), grad
                )
        if HAS_SOFTCAP:
            grad = grad * capped_slope
        tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def logprob_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    token_outputs: bool = False,
    moments: bool = False,
) -> RowStats:
    """Statistics of logits (B, T, V) and labels (N,) int64; entropy and arg-max with
    `token_outputs`, and `moments`. Few rows are split over programs, whose partials a second kernel
    combines."""
    rows, V = labels.numel(), logits.shape[-1]
    tile = tile_for(_stats_name(softcap, moments), V, logits.device)
    splits = splits_for(rows, V, tile.block, logits.device) if rows else 1
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "token_outputs": token_outputs,
        "moments": moments,
    }
    if splits > 1:
        partials = _empty_partials(splits, rows, moments=moments, device=logits.device)
        _launch_stats(logits, labels, partials=partials, splits=splits, **options)
        return combine(partials, labels, V, token_outputs=token_outputs, moments=moments)
    outputs = _outputs(labels, token_outputs, moments)
    _launch_stats(logits, labels, outputs=outputs, **options)
    return _as_stats(outputs)


def logprob_partials(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    token_outputs: bool = False,
    moments: bool = False,
) -> torch.Tensor:
    """A slice of the vocabulary, logits (B, T, V), labels (N,) counted from its start -> partials
    (N, 4) for `combine`, (N, 6) with `moments`.

    A label outside [0, V) that is not ignored belongs to another slice.
    """
    partials = _empty_partials(labels.numel(), moments=moments, device=logits.device)
    _launch_stats(
        logits,
        labels,
        partials=partials,
        is_slice=True,
        logit_scale=logit_scale,
        softcap=softcap,
        token_outputs=token_outputs,
        moments=moments,
    )
    return partials


def combine(
    partials: torch.Tensor,
    labels: torch.Tensor,
    vocab: int,
    *,
    token_outputs: bool = False,
    moments: bool = False,
) -> RowStats:
    """partials (parts, N, 4), with `moments` (parts, N, 6), contiguous, of `vocab` columns
    together, labels (N,) -> what `logprob_stats` returns."""
    parts, rows, _ = partials.shape
    outputs = _outputs(labels, token_outputs, moments)
    if rows:
        launch(
            _combine_kernel, triton.cdiv(rows, COMBINE_BLOCK),
            partials, labels, *outputs, rows, parts, vocab if moments else None, IGNORED,
            HAS_TOKEN_OUTPUTS=token_outputs, HAS_MOMENTS=moments,
            BLOCK=COMBINE_BLOCK, num_warps=4,
        )  # fmt: skip
    return _as_stats(outputs)


def logprob_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    stats: RowStats,
    row_grad: torch.Tensor,
    out: torch.Tensor,
    *,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    entropy_grad: torch.Tensor | None = None,
) -> None:
    """Writes dL/dlogits into `out` (B, T, V), which may be `logits` itself; row_grad (N,) float32
    is dL/dlogp, entropy_grad (N,) dL/dentropy, which needs the rows' entropy."""
    B, T, V = logits.shape
    tile = tile_for("grad", V, logits.device)
    blocks = triton.cdiv(V, tile.block)
    if B * T:
        launch(
            _logprob_grad_kernel, B * T * blocks,
            logits, labels, stats.logp, stats.normalizer, row_grad,
            None if entropy_grad is None else stats.entropy, entropy_grad, out, T, V, blocks,
            logits.stride(0), logits.stride(1), out.stride(0), out.stride(1),
            IGNORED, *_softcap_arguments(logit_scale, softcap),
            HAS_ENTROPY_GRAD=entropy_grad is not None, BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip


def _launch_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    outputs: RowStats | None = None,
    partials: torch.Tensor | None = None,
    splits: int = 1,
    is_slice: bool = False,
    logit_scale: float | torch.Tensor,
    softcap: float | torch.Tensor | None,
    token_outputs: bool,
    moments: bool,
) -> None:
    """Into `outputs`, or into `partials` of rows that are shared."""
    B, T, V = logits.shape
    tile = tile_for(_stats_name(softcap, moments), V, logits.device)
    if B * T:
        launch(
            _logprob_stats_kernel, B * T * splits,
            logits, labels, *(outputs or (None,) * 5), partials,
            B * T, T, V, logits.stride(0), logits.stride(1),
            splits, triton.cdiv(triton.cdiv(V, tile.block), splits) * tile.block, IGNORED,
            *_softcap_arguments(logit_scale, softcap),
            HAS_TOKEN_OUTPUTS=token_outputs, HAS_MOMENTS=moments,
            IS_PARTIAL=partials is not None, IS_SLICE=is_slice,
            BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip


def _empty_partials(*shape: int, moments: bool, device: torch.device) -> torch.Tensor:
    """(..., 4) or (..., 6)."""
    width = PARTIAL_WITH_MOMENTS if moments else PARTIAL
    return torch.empty(*shape, width.value, dtype=torch.float32, device=device)


def _outputs(labels: torch.Tensor, token_outputs: bool, moments: bool) -> RowStats:
    """Memory for the results."""
    rows = labels.numel()

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=labels.device)

    return RowStats(
        made(rows),
        made(rows, 2),
        made(rows) if token_outputs else None,
        made(rows, dtype=torch.int8) if token_outputs else None,
        made(rows, 2) if moments else None,
    )


def _as_stats(outputs: RowStats) -> RowStats:
    """Bytes of the kernels as truth values."""
    if outputs.is_argmax is None:
        return outputs
    return outputs._replace(is_argmax=outputs.is_argmax.view(torch.bool))


def _is_wide(softcap: float | torch.Tensor | None) -> bool:
    """A cap that only the device knows may be."""
    return isinstance(softcap, torch.Tensor) or (softcap is not None and softcap > WIDE_CAP)


def _stats_name(softcap: float | torch.Tensor | None, moments: bool) -> str:
    """Among the tiles."""
    name = "stats with moments" if moments else "stats"
    return f"wide {name}" if _is_wide(softcap) else name


def _softcap_arguments(
    logit_scale: float | torch.Tensor, softcap: float | torch.Tensor | None
) -> tuple:
    """(logit_scale, softcap, 1 / softcap, ARE_STORED, HAS_SCALE, HAS_SOFTCAP, IS_WIDE_CAP):
    reciprocals instead of a division per element.

    Both are numbers, or () float32 on the device."""
    if isinstance(logit_scale, torch.Tensor):
        cap_ptr = logit_scale if softcap is None else softcap
        return logit_scale, cap_ptr, cap_ptr, True, True, softcap is not None, _is_wide(softcap)
    cap = 1.0 if softcap is None else float(softcap)
    return (
        float(logit_scale),
        cap,
        1.0 / cap,
        False,
        logit_scale != 1.0,
        softcap is not None,
        _is_wide(softcap),
    )
