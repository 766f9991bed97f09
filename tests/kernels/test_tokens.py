"""Per-token outputs, and rows whose statistics several programs share, against the float64
oracle."""

import contextlib
import functools

import pytest
import torch
from cases import INTERPRETED, REGIMES, infinities, labels_of, regime
from hypothesis import given, settings
from hypothesis import strategies as st

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle
from mpo_kernels.backends import backend_for

GAP = torch.tensor([0.3, -0.2])


def shared_by_several_programs():
    """Tiles so small that every row is split, whatever its vocabulary. The PyTorch backend has
    none."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from mpo_kernels.backends.triton.tiles import Tile, use_tiles

    return use_tiles(stats=Tile(32, 1), grad=Tile(64, 1))


def check(logits, labels, **options):
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = mpo_kernels.token_statistics(ours, labels, moments=True, **options)
    logp = oracle.token_logprobs(theirs, labels, **options)
    torch.testing.assert_close(got.logprobs.double(), logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.entropy.double(),
        oracle.token_entropy(logits.double(), labels, **options),
        rtol=1e-5,
        atol=2e-6,
    )
    assert torch.equal(got.is_argmax, oracle.token_is_argmax(logits.float(), labels, **options))
    moments = oracle.token_moments(logits.double(), labels, **options)
    for found, want, bar in zip(got[3:], moments, (2e-6, 1e-5), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=bar)
    assert got.is_argmax.dtype == torch.bool and not any(found.requires_grad for found in got[1:])
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    (got.logprobs * upstream).sum().backward()
    (logp * upstream.double()).sum().backward()
    if logits.dtype == torch.float32:
        assert relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_regimes(name, split):
    labels = labels_of((4, 5), 300)
    with shared_by_several_programs() if split else contextlib.nullcontext():
        check(regime(name, (4, 5, 300), labels), labels)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"softcap": 30.0, "logit_scale": 0.25}, {"ignore_index": 3}],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 257])
def test_options_and_vocabularies_with_split_rows(options, vocab):
    labels = labels_of((2, 6), vocab, mask="none")
    with shared_by_several_programs():
        check(regime("normal", (2, 6, vocab), labels), labels, **options)


def test_a_confident_token_keeps_the_digits_of_its_entropy():
    """p_y = 1 - 1e-6: in fp32, log of the sum or p log p would leave noise."""
    logits = torch.randn(1, 3, 500)
    labels = torch.tensor([[4, 4, 4]])
    logits[..., 4] = 20.0
    entropy = mpo_kernels.token_statistics(logits, labels).entropy
    expected = oracle.token_entropy(logits.double(), labels)
    assert float(((entropy.double() - expected) / expected).abs().max()) < 1e-4


def slices_of(logits, labels, sizes, **options):
    """The statistics of a vocabulary in slices: what their ranks exchange, combined."""
    backend, parts, start = backend_for(logits), [], 0
    for part in logits[None].split(sizes, -1):
        local = labels - start
        local = local.where((local >= 0) & (local < part.shape[-1]), -1)
        parts.append(
            backend.logprob_partials(part, local, **options, token_outputs=True, moments=True)
        )
        start += part.shape[-1]
    return backend.combine(
        torch.stack(parts), labels, logits.shape[-1], token_outputs=True, moments=True
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("divided", ["whole", "split", "slices"])
def test_infinities_at_every_place(divided, softcap):
    """Log-probabilities, entropy, arg-max, moments and gradients are the oracle's, NaN where it has
    NaN."""
    cases = infinities(100)
    logits, labels = (
        torch.stack([z for z, _ in cases.values()]),
        torch.tensor([y for _, y in cases.values()]),
    )
    exact = logits.double().requires_grad_()
    options = {"softcap": softcap}
    logp, entropy = (f(exact, labels, **options) for f in (oracle.token_logprobs, ENTROPY))
    wanted = {
        "logp": logp,
        "entropy": entropy,
        "gradient": torch.autograd.grad(logp.sum(), exact, retain_graph=True)[0],
        "gradient of the entropy": torch.autograd.grad(entropy.sum(), exact)[0],
        **dict(zip(MOMENTS, oracle.token_moments(exact, labels, **options), strict=True)),
    }
    if divided == "slices":
        found, is_argmax = by_slices(logits, labels, [33, 1, 60, 6], **options)
    else:
        with shared_by_several_programs() if divided == "split" else contextlib.nullcontext():
            found, is_argmax = by_the_function(logits, labels, **options)
    for i, name in enumerate(cases):
        for what, want in wanted.items():
            torch.testing.assert_close(
                found[what][i].detach().double(),
                want[i].detach(),
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda text, at=f"{what}, {name}": f"{at}: {text}",
            )
        assert is_argmax[i] == oracle.token_is_argmax(exact, labels, **options)[i], name


MOMENTS = ("log of sum p^2", "mean logit")
ENTROPY = oracle.token_entropy


def by_the_function(logits, labels, **options):
    """What `token_statistics` finds, by name, and whether the label is the arg-max."""
    ours = logits.clone().requires_grad_()
    got = mpo_kernels.token_statistics(ours, labels, moments=True, entropy_grad=True, **options)
    return {
        "logp": got.logprobs,
        "entropy": got.entropy,
        "gradient": torch.autograd.grad(got.logprobs.sum(), ours, retain_graph=True)[0],
        "gradient of the entropy": torch.autograd.grad(got.entropy.sum(), ours)[0],
        **dict(zip(MOMENTS, got[3:], strict=True)),
    }, got.is_argmax


def by_slices(logits, labels, sizes, softcap):
    """The same by way of what ranks with slices of the vocabulary exchange."""
    options = {"logit_scale": 1.0, "softcap": softcap}
    stats = slices_of(logits, labels, sizes, **options)
    grads, one = [torch.empty_like(logits) for _ in range(2)], torch.ones(len(labels))
    grad_of = functools.partial(backend_for(logits).logprob_grad, logits[None], labels, stats)
    grad_of(one, grads[0][None], **options)
    grad_of(0 * one, grads[1][None], entropy_grad=one, **options)
    return {
        "logp": stats.logp,
        "entropy": stats.entropy,
        "gradient": grads[0],
        "gradient of the entropy": grads[1],
        **dict(zip(MOMENTS, stats.moments.unbind(1), strict=True)),
    }, stats.is_argmax


def test_infinities_reach_the_losses():
    """A row of -inf, as by a mask that leaves nothing, makes the loss NaN; an impossible label
    makes it infinite."""
    logits, labels = torch.zeros(2, 2, 9), torch.tensor([[1, 2], [3, 4]])
    for where, value in (
        ((0, 1), float("-inf")),
        ((1, 0, 5), float("inf")),
        ((0, 1, 2), float("-inf")),
    ):
        broken = logits.clone()
        broken[where] = value
        want, *means = oracle.mpo_loss(broken.double(), labels, GAP[:1].double())
        out = mpo_kernels.mpo_loss(broken, labels, GAP[:1])
        torch.testing.assert_close(out.loss.double(), want, equal_nan=True)
        for got, mean in zip(out[1:4], means, strict=True):
            torch.testing.assert_close(got.double(), mean, equal_nan=True)
    for bias in (
        torch.full((9,), float("-inf")),
        torch.zeros(9).index_fill(0, torch.tensor([7]), float("inf")),
    ):
        logp = mpo_kernels.linear_token_logprobs(
            torch.ones(2, 3), torch.ones(9, 3), labels[0], bias=bias
        )
        assert logp.isnan().all()


@pytest.mark.parametrize("others", [1, 40])
def test_digits_of_a_likely_label(others):
    """1 - p of the label's gradient, and the entropy, to a few roundings, for p from a half to
    nearly 1."""
    gaps = torch.linspace(0, 14, 60)[None]
    logits = torch.zeros(1, 60, 1 + others)
    logits[..., 0] = gaps + torch.tensor(float(others)).log()
    logits[..., 1:] += torch.linspace(-1, 1, others)
    labels = torch.zeros(1, 60, dtype=torch.int64)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = mpo_kernels.token_statistics(ours, labels)
    got.logprobs.sum().backward()
    logp = oracle.token_logprobs(theirs, labels)
    logp.sum().backward()
    assert float((got.logprobs.detach().double() / logp - 1).abs().max()) < 8e-7
    entropy = oracle.token_entropy(theirs.detach(), labels)
    # others have the error of their exp
    assert float((ours.grad.double() / theirs.grad - 1)[..., 0].abs().max()) < 1.5e-6
    assert float((got.entropy.double() / entropy - 1).abs().max()) < 1.5e-6


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 200),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_split_rows_equal_whole_rows(rows, vocab, scale, seed):
    labels = labels_of((1, rows), vocab, seed)
    logits = regime("normal", (1, rows, vocab), labels, seed) * scale
    whole = mpo_kernels.token_statistics(logits, labels, moments=True)
    with shared_by_several_programs():
        split = mpo_kernels.token_statistics(logits, labels, moments=True)
    for one, other in zip(split[3:], whole[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(split.is_argmax, whole.is_argmax)


def test_a_label_out_of_range_is_nan_when_rows_are_split():
    logits, labels = torch.randn(1, 3, 70), torch.tensor([[3, 70, -7]])
    with shared_by_several_programs():
        logp = mpo_kernels.token_logprobs(logits, labels, validate=False)
    assert torch.isnan(logp).tolist() == [[False, True, True]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_hand_out_the_same_numbers(reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(4, 5, 8, generator=generator),
        torch.randn(60, 8, generator=generator),
    )
    labels = labels_of((4, 5), 60)
    logits = hidden @ weight.T
    expected = mpo_kernels.token_statistics(logits, labels)
    for out in (
        mpo_kernels.mpo_loss(logits, labels, GAP, reduction=reduction, token_outputs=True),
        mpo_kernels.linear_mpo_loss(
            hidden.requires_grad_(), weight, labels, GAP, reduction=reduction, token_outputs=True
        ),
    ):
        assert out.tokens[3:] == (None, None)
        for got, want in zip(out.tokens[:3], expected[:3], strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    linear = mpo_kernels.linear_token_statistics(hidden, weight, labels)
    for got, want in zip(linear[:3], expected[:3], strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5)
    assert mpo_kernels.mpo_loss(logits, labels, GAP).tokens is None


@pytest.mark.skipif(not INTERPRETED, reason="tiles are of the Triton kernels")
def test_tiles_can_be_overridden_and_wrong_ones_are_refused():
    from mpo_kernels.backends.triton.tiles import Tile, tile_for, use_tiles

    cpu = torch.device("cpu")
    with use_tiles(stats=Tile(1024, 2)):
        assert tile_for("stats", 5000, cpu) == Tile(1024, 2)
        assert tile_for("grad", 5000, cpu) == Tile(4096, 4)
    assert tile_for("stats", 50000, cpu) == Tile(8192, 8)
    with (
        pytest.raises(ValueError, match="stats: block is 1000; it must be a power of two"),
        use_tiles(stats=Tile(1000, 4)),
    ):
        pass
    with pytest.raises(ValueError, match="grad: num_warps is 3"), use_tiles(grad=Tile(1024, 3)):
        pass
