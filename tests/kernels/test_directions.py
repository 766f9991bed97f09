"""Logits that were overwritten by the directions of their gradients, against the float64 oracle:
one exponential, no pass of the gradient, the same digits."""

import pytest
import torch
from cases import INTERPRETED, REGIMES, infinities, labels_of, regime
from torch.utils._python_dispatch import TorchDispatchMode

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle
from mpo_kernels.backends import backend_for, eager
from mpo_kernels.backends.results import RowDirections
from mpo_kernels.ops.stats import row_stats, write_logit_grads
from mpo_kernels.options import LogitOptions

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels write gradients")


def options_of(logits, logit_scale=1.0, softcap=None):
    return LogitOptions.checked(logits, logit_scale, softcap, None)


def by_directions(logits, labels, row_grads, logit_scale=1.0):
    """Log-probabilities and gradients of logits (N, V), which are left as they are."""
    found, options = logits.clone()[None], options_of(logits, logit_scale)
    stats = row_stats(found, labels, options, overwrite=True)
    assert isinstance(stats, RowDirections)
    factors = write_logit_grads(found, labels, stats, row_grads, options, out=found)
    return stats, found[0] * factors[:, None]


def by_oracle(logits, labels, row_grads, logit_scale=1.0):
    wide = logits.double().clone().requires_grad_()
    logp = oracle.token_logprobs(wide, labels, logit_scale=logit_scale)
    logp.backward(row_grads.double())
    return logp.detach(), wide.grad


@pytest.mark.parametrize("logit_scale", [1.0, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [2, 300, 20_011])
@pytest.mark.parametrize("name", REGIMES)
def test_digits(name, vocab, dtype, logit_scale):
    """As many as the pass that keeps nothing has: also where p -> 1, whose gradient is made of the
    others, and where the label is impossible."""
    labels = labels_of((9,), vocab, mask="none")
    logits = regime(name, (9, vocab), labels).to(dtype)
    row_grads = torch.linspace(-1, 2, 9, dtype=dtype)
    stats, grad = by_directions(logits, labels, row_grads, logit_scale)
    want, theirs = by_oracle(logits, labels, row_grads, logit_scale)
    kept = row_stats(logits[None], labels, options_of(logits, logit_scale))
    again = torch.empty_like(logits)[None]
    write_logit_grads(
        logits[None], labels, kept, row_grads, options_of(logits, logit_scale), out=again
    )
    floor = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative_error(stats.logp, want) <= max(1.5 * relative_error(kept.logp, want), floor)
    assert relative_error(grad, theirs) <= max(1.5 * relative_error(again[0], theirs), floor)
    # the normalizer is that of the softmax, which backward may want
    peak, total = (part.double() for part in stats.normalizer.split(1, 1))
    final = oracle.final_logits(logits.double(), logit_scale=logit_scale)
    torch.testing.assert_close(
        (final - peak).exp() / total, final.softmax(-1), rtol=1e-3, atol=1e-6
    )


def test_infinities_at_every_place():
    cases = infinities(100)
    logits = torch.stack([z for z, _ in cases.values()])
    labels, ones = torch.tensor([y for _, y in cases.values()]), torch.ones(len(cases))
    stats, grad = by_directions(logits, labels, ones)
    want, theirs = by_oracle(logits, labels, ones)
    for i, name in enumerate(cases):
        for got, exact in ((stats.logp[i], want[i]), (grad[i], theirs[i])):
            torch.testing.assert_close(
                got.double(),
                exact,
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda text, at=name: f"{at}: {text}",
            )


@pytest.mark.parametrize(
    ("dtype", "softcap", "token_outputs"),
    [
        (torch.bfloat16, None, False),
        (torch.float16, None, False),
        (torch.float32, 5.0, False),
        (torch.float32, None, True),
    ],
    ids=str,
)
def test_logits_that_are_wanted_again_are_left_as_they_are(dtype, softcap, token_outputs):
    """Half precision would round the directions; a soft-cap's slope and the entropy need the
    logits."""
    labels = labels_of((4,), 50, mask="none")
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    stats = row_stats(
        logits,
        labels,
        options_of(logits, softcap=softcap),
        token_outputs=token_outputs,
        overwrite=True,
    )
    assert not isinstance(stats, RowDirections) and torch.equal(logits, before)


class LargeResults(TorchDispatchMode):
    """Names of the operations inside that hand out as many numbers as the logits have."""

    def __init__(self, count):
        super().__init__()
        self.count, self.names = count, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.count and not func.is_view:
            self.names.append(func.name().removeprefix("aten::").split(".")[0])
        return out


def test_one_exponential_and_no_pass_of_the_gradient():
    labels = labels_of((7,), 500, mask="none")
    logits = torch.randn(1, 7, 500, generator=torch.Generator().manual_seed(0))
    options = options_of(logits)
    with LargeResults(logits.numel()) as results:
        stats = row_stats(logits, labels, options, overwrite=True)
        write_logit_grads(logits, labels, stats, torch.ones(7), options, out=logits)
    # which write one number of a row each
    assert [name for name in results.names if name != "scatter_"] == ["softmax"]


@pytest.mark.parametrize("trained", ["both", "frozen head", "frozen hidden"])
@pytest.mark.parametrize("chunk_bytes", [None, 1], ids=["one chunk", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_losses(trained, chunk_bytes, dtype, monkeypatch):
    """By every way from directions to gradients, as those of logits that are not overwritten."""
    monkeypatch.setattr("mpo_kernels.ops.chunks.ROW_MULTIPLE", 8)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 20, generator=generator).to(dtype) for n in (36, 90))
    bias = torch.randn(90, generator=generator).to(dtype)
    labels = labels_of((36,), 90)
    offsets = torch.tensor([0, 9, 18, 27, 36], dtype=torch.int32)

    def gradients():
        leaves = [
            hidden.clone().requires_grad_(trained != "frozen hidden"),
            weight.clone().requires_grad_(trained != "frozen head"),
            bias.clone().requires_grad_(trained != "frozen head"),
        ]
        found = mpo_kernels.linear_mpo_loss(
            *leaves[:2],
            labels,
            torch.tensor([0.3, -0.2]).to(dtype),
            bias=leaves[2],
            cu_seqlens=offsets,
            logit_scale=0.7,
            chunk_bytes=chunk_bytes,
        ).loss
        logp = mpo_kernels.linear_token_logprobs(
            *leaves[:2], labels, bias=leaves[2], chunk_bytes=chunk_bytes
        )
        total = found + (logp * torch.linspace(-1, 1, 36)).sum()
        total.backward(retain_graph=True)
        total.backward()
        return [total.detach(), *(t.grad for t in leaves if t.grad is not None)]

    assert backend_for(hidden) is eager
    ours = gradients()
    monkeypatch.setattr("mpo_kernels.ops.stats.leaves_directions", lambda *_: False)
    monkeypatch.setattr("mpo_kernels.ops.linear_tokens.leaves_directions", lambda *_: False)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for got, want in zip(ours, gradients(), strict=True):
        assert relative_error(got, want.double()) < tolerance


def test_directions_are_known_by_what_made_them(monkeypatch):
    """The environment may name another backend before backward."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (5, 30))
    weight.requires_grad_()
    logp = mpo_kernels.linear_token_logprobs(hidden, weight, torch.arange(5))
    monkeypatch.setattr("mpo_kernels.ops.linear_tokens.leaves_directions", lambda *_: False)
    logp.sum().backward()
    wide = weight.detach().double().requires_grad_()
    oracle.linear_token_logprobs(hidden.double(), wide, torch.arange(5)).sum().backward()
    assert relative_error(weight.grad, wide.grad) < 1e-5
