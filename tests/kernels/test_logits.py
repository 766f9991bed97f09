"""token_logprobs and mpo_loss from logits, against the float64 oracle."""

import contextlib
import itertools

import pytest
import torch
from cases import INTERPRETED, REGIMES, SOFTCAPS, check_softcap, labels_of, regime, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle

P, T = 2, 5


def both(logits, labels, gap, *, upstream=2.5, inplace=False, **options):
    """(output, gradient) of ours and of the oracle on the same rounded logits."""
    theirs = logits.double().requires_grad_()
    wide = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    expected = oracle.mpo_loss(theirs, labels, gap.double(), **wide)
    (expected[0] * upstream).sum().backward()
    leaf = logits.clone().requires_grad_()
    output = mpo_kernels.mpo_loss(
        leaf * 1 if inplace else leaf, labels, gap, inplace_backward=inplace, **options
    )
    (output.loss * upstream).sum().backward()
    return output, leaf.grad, expected, theirs.grad


def check(logits, labels, gap, **options):
    output, grad, expected, expected_grad = both(logits, labels, gap, **options)
    for ours, theirs in zip(output[:4], expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-5, atol=2e-5)
    assert torch.isfinite(grad).all()
    assert grad.dtype == logits.dtype
    # The bar for half precision: at most 1.25 times the error of plain autograd, which rounds its
    # exact fp32 gradient once.
    best = relative_error(rounded(expected_grad, logits.dtype), expected_grad)
    assert relative_error(grad, expected_grad) < max(1e-5, 1.25 * best)
    assert not grad[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 127, 1000, 8193])
def test_dtypes_and_vocabularies(dtype, vocab):
    labels = labels_of((2 * P, T), vocab)
    logits = regime("normal", (2 * P, T, vocab), labels).to(dtype)
    check(logits, labels, torch.tensor([0.3, -0.2]), beta=1.3)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regimes(name, dtype):
    labels = labels_of((2 * P, T), 300)
    check(
        regime(name, (2 * P, T, 300), labels).to(dtype), labels, torch.tensor([0.3, -0.2]), beta=0.7
    )


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"softcap": 30.0, "logit_scale": 0.25},
        {"logit_scale": 3.0},
        {"pair_weights": torch.tensor([0.0, 2.5])},
        {"reduction": "sum"},
        {"reduction": "none", "upstream": torch.tensor([1.0, -3.0])},
        {"inplace": True},
        {"inplace": True, "softcap": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(options, dtype):
    labels = labels_of((2 * P, T), 257)
    check(
        regime("normal", (2 * P, T, 257), labels).to(dtype),
        labels,
        torch.tensor([0.3, -0.2]),
        beta=1.5,
        **options,
    )


@pytest.mark.parametrize(
    ("softcap", "logit_scale"), zip(SOFTCAPS, itertools.cycle([1.0, 1e-3, 250.0]))
)
def test_softcap_over_its_whole_range(softcap, logit_scale):
    """Logits far below the cap, at it and beyond it."""
    for size in (1e-3, 1.0, 0.3 * softcap, softcap, 100 * softcap):
        check_softcap(softcap, logit_scale, size, contextlib.nullcontext())


def test_a_softcap_that_float32_does_not_hold_is_refused():
    for softcap in (1e-31, 1e31):
        with pytest.raises(
            ValueError, match="it must lie between 1e-30 and 1e30, where float32 holds it"
        ):
            mpo_kernels.token_logprobs(torch.zeros(1, 2), torch.tensor([0]), softcap=softcap)


@pytest.mark.parametrize("mask", ["none", "some", "all_but_one"])
def test_masks(mask):
    labels = labels_of((2 * P, T), 61, mask=mask)
    check(regime("normal", (2 * P, T, 61), labels), labels, torch.tensor([0.3, -0.2]))


def test_one_token_vocabulary_is_certain():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    logits = torch.randn(2, 3, 1, requires_grad=True)
    output = mpo_kernels.mpo_loss(logits, labels, torch.tensor([0.5]))
    output.loss.backward()
    assert output.reward_gap == 0 and output.loss == 0.25 and not logits.grad.any()


def test_error_near_zero_keeps_its_digits():
    """Where the gap is nearly right the loss and its gradient are small, not noise."""
    labels = labels_of((2, T), 61)
    logits = regime("normal", (2, T, 61), labels)
    gap = mpo_kernels.mpo_loss(logits, labels, torch.zeros(1)).reward_gap + 1e-3
    output, grad, expected, expected_grad = both(logits, labels, gap)
    assert relative_error(grad, expected_grad) < 2e-3
    assert float(output.loss) == pytest.approx(float(expected[0]), rel=4e-3)


def test_means_of_long_responses_keep_their_digits():
    """Added one after the other in float32, thousands of log-probabilities would cost the gap an
    order of magnitude."""
    tokens = 300 if INTERPRETED else 5000
    labels = labels_of((2, tokens), 3)
    logits = regime("normal", (2, tokens, 3), labels) * 8
    output, grad, expected, expected_grad = both(logits, labels, torch.tensor([0.3]))
    _, chosen, rejected, gap = (t.detach() for t in expected)
    rounding = torch.finfo(torch.float32).eps * float(chosen.abs() + rejected.abs())
    assert float((output.reward_gap.double() - gap).abs()) <= rounding
    assert relative_error(grad, expected_grad) <= 2e-6 + 2 * rounding / float((gap - 0.3).abs())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shifted_view_is_read_and_written_in_place(inplace):
    labels = labels_of((2 * P, T), 130)
    whole = regime("normal", (2 * P, T + 1, 130), torch.zeros(2 * P, T + 1, dtype=torch.int64))
    leaf = whole.clone().requires_grad_()
    full = leaf * 1
    view = full[:, :-1]
    mpo_kernels.mpo_loss(
        view, labels, torch.tensor([0.3, -0.2]), inplace_backward=inplace
    ).loss.backward()
    exact = whole.double().requires_grad_()
    oracle.mpo_loss(exact[:, :-1], labels, torch.tensor([0.3, -0.2]).double())[0].backward()
    assert relative_error(leaf.grad, exact.grad) < 1e-5
    assert torch.equal(full[:, -1], whole[:, -1])
    assert torch.equal(view, whole[:, :-1]) != inplace


def test_packed_equals_dense_and_padding_does_not_matter():
    labels = labels_of((2 * P, T), 90, mask="none")
    logits = regime("normal", (2 * P, T, 90), labels)
    lengths = [5, 2, 3, 1]
    keep = torch.zeros(2 * P, T, dtype=torch.bool)
    for i, n in enumerate(lengths):
        keep[i, T - n :] = True  # left-padded
    padded_labels = labels.masked_fill(~keep, -100)
    packed, packed_labels = logits[keep], labels[keep]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    gap = torch.tensor([0.1, 0.9])
    dense = mpo_kernels.mpo_loss(logits, padded_labels, gap)
    torch.testing.assert_close(
        mpo_kernels.mpo_loss(packed, packed_labels, gap, cu_seqlens=offsets)[:4],
        dense[:4],
        rtol=1e-6,
        atol=1e-6,
    )
    garbage = logits.masked_fill(~keep[..., None], float("nan"))
    torch.testing.assert_close(
        mpo_kernels.mpo_loss(garbage, padded_labels, gap)[:4], dense[:4], rtol=0, atol=0
    )


def test_swapping_chosen_and_rejected_negates_the_gap():
    labels = labels_of((2 * P, T), 90)
    logits = regime("normal", (2 * P, T, 90), labels)
    one = mpo_kernels.mpo_loss(logits, labels, torch.zeros(P))
    two = mpo_kernels.mpo_loss(logits.roll(P, 0), labels.roll(P, 0), torch.zeros(P))
    assert torch.equal(one.reward_gap, -two.reward_gap) and torch.equal(one.loss, two.loss)


def test_rows_of_the_gradient_sum_to_zero():
    labels = labels_of((2 * P, T), 500)
    logits = regime("normal", (2 * P, T, 500), labels).requires_grad_()
    mpo_kernels.mpo_loss(logits, labels, torch.zeros(P)).loss.backward()
    assert float(logits.grad.sum(-1).abs().max()) < 1e-5 * float(logits.grad.abs().max()) * 50


def test_reruns_are_bitwise_equal_and_inputs_unmodified():
    labels = labels_of((2 * P, T), 1000)
    logits = regime("normal", (2 * P, T, 1000), labels).bfloat16()
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        output = mpo_kernels.mpo_loss(leaf, labels, torch.zeros(P))
        output.loss.backward()
        assert torch.equal(leaf, logits)
        results.append((output.loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_retain_graph_and_the_refusal_after_in_place():
    labels = labels_of((2 * P, T), 77)
    logits = regime("normal", (2 * P, T, 77), labels).requires_grad_()
    output = mpo_kernels.mpo_loss(logits, labels, torch.zeros(P))
    first = torch.autograd.grad(output.loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(output.loss, logits)[0])

    working = logits * 1
    version = working._version
    output = mpo_kernels.mpo_loss(working, labels, torch.zeros(P), inplace_backward=True)
    output.loss.backward(retain_graph=True)
    assert working._version > version
    with pytest.raises(
        RuntimeError, match="overwritten by their gradient in an earlier backward pass"
    ):
        output.loss.backward()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 300)),
    softcap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_token_logprobs_with_any_upstream_gradient(shape, softcap, scale, seed):
    labels = labels_of(shape[:2], shape[2], seed)
    logits = regime("normal", shape, labels, seed)
    upstream = torch.randn(shape[:2], generator=torch.Generator().manual_seed(seed))
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = mpo_kernels.token_logprobs(ours, labels, softcap=softcap, logit_scale=scale)
    want = oracle.token_logprobs(theirs, labels, softcap=softcap, logit_scale=scale)
    assert (got <= 1e-6).all() and not got[labels == -100].any()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_any_leading_shape_and_no_rows():
    logits = torch.randn(2, 3, 4, 11)
    labels = torch.randint(0, 11, (2, 3, 4))
    torch.testing.assert_close(
        mpo_kernels.token_logprobs(logits, labels), oracle.token_logprobs(logits, labels)
    )
    assert mpo_kernels.token_logprobs(
        torch.empty(0, 11), torch.empty(0, dtype=torch.int64)
    ).shape == (0,)


def test_a_label_out_of_range_is_nan_and_reads_nothing_outside():
    """Unchecked, a wrong label is loud and stays inside the row: the neighbouring rows are as
    ever."""
    labels = torch.tensor([1, 11, 3, -5])
    logits = torch.randn(4, 11, requires_grad=True)
    logp = mpo_kernels.token_logprobs(logits, labels, validate=False)
    assert torch.isnan(logp).tolist() == [False, True, False, True]


def test_scalar_kinds_of_reference_gap_do_not_change_the_result():
    labels = labels_of((2, T), 33)
    logits = regime("normal", (2, T, 33), labels)
    wide = mpo_kernels.mpo_loss(logits, labels, torch.tensor([0.25], dtype=torch.float64)).loss
    assert (
        wide == mpo_kernels.mpo_loss(logits, labels, torch.tensor([0.25])).loss
        and wide.dtype == torch.float32
    )
