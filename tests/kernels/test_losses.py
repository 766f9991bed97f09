"""`mpo_kernels.losses` beside formulas written out for one group in Python's own floats. What other
libraries make of the same log-probabilities is in test_peer_losses.py."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import INTERPRETED, drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_kernels import losses, oracle
from mpo_kernels.losses import BCO, DPO, KTO, SFT, Scores, Sum, coefficients
from mpo_kernels.losses.__main__ import page
from mpo_kernels.sequence_losses import linear_sequence_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def ls(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log_odds(mean):
    return mean - math.log(-math.expm1(mean))


def of_ratios(formula):
    """A formula of the ratios and lengths of chosen and rejected."""

    def oracle(s, n, reference_logps):
        chosen, rejected = (own - before for own, before in zip(s, reference_logps, strict=True))
        return formula(chosen, rejected, *n)

    return oracle


def of_sums(formula):
    """A formula of sums and lengths of chosen and rejected, and of mean_tokens."""
    return lambda s, n, mean_tokens=None: formula(*s, *n, mean_tokens)


ORACLES = {
    losses.MPO(beta=1.5): lambda s, n, gap: (1.5 * (s[0] / n[0] - s[1] / n[1]) - gap) ** 2,
    losses.DPO(beta=0.3): of_ratios(lambda c, r, nc, nr: -ls(0.3 * (c - r))),
    losses.CDPO(beta=0.3, flipped=0.2): of_ratios(
        lambda c, r, nc, nr: -0.8 * ls(0.3 * (c - r)) - 0.2 * ls(0.3 * (r - c))
    ),
    losses.RobustDPO(beta=0.3, flipped=0.2): of_ratios(
        lambda c, r, nc, nr: (-0.8 * ls(0.3 * (c - r)) + 0.2 * ls(0.3 * (r - c))) / 0.6
    ),
    losses.IPO(tau=0.25): of_ratios(lambda c, r, nc, nr: (c / nc - r / nr - 2.0) ** 2),
    losses.Hinge(beta=0.3): of_ratios(lambda c, r, nc, nr: max(0.0, 1 - 0.3 * (c - r))),
    losses.EXO(beta=0.3, flipped=0.01): of_ratios(
        lambda c, r, nc, nr: (
            sigmoid(0.3 * (c - r)) * (ls(0.3 * (c - r)) - math.log(0.99))
            + sigmoid(0.3 * (r - c)) * (ls(0.3 * (r - c)) - math.log(0.01))
        )
    ),
    losses.NCA(beta=0.2): of_ratios(
        lambda c, r, nc, nr: -ls(0.2 * c) - 0.5 * ls(-0.2 * c) - 0.5 * ls(-0.2 * r)
    ),
    losses.BCO(beta=0.2, delta=0.7): of_ratios(
        lambda c, r, nc, nr: -ls(0.2 * c - 0.7) - ls(-(0.2 * r - 0.7))
    ),
    losses.SPPO(beta=0.25): of_ratios(lambda c, r, nc, nr: (c - 2) ** 2 + (r + 2) ** 2),
    losses.APOZero(beta=0.2): of_ratios(
        lambda c, r, nc, nr: 1 - sigmoid(0.2 * c) + sigmoid(0.2 * r)
    ),
    losses.APODown(beta=0.2): of_ratios(
        lambda c, r, nc, nr: sigmoid(0.2 * c) + 1 - sigmoid(0.2 * (c - r))
    ),
    losses.DiscoPOP(beta=0.1, tau=0.5): of_ratios(
        lambda c, r, nc, nr: (
            (1 - sigmoid(0.2 * (c - r))) * -ls(0.1 * (c - r))
            + sigmoid(0.2 * (c - r)) * math.exp(-0.1 * (c - r))
        )
    ),
    losses.LengthDPO(beta=0.3, alpha=0.05): of_ratios(
        lambda c, r, nc, nr: -ls(0.3 * (c - r) + 0.05 * (nc - nr))
    ),
    losses.NormalisedDPO(beta=3.0): of_ratios(lambda c, r, nc, nr: -ls(3 * (c / nc - r / nr))),
    losses.DPOP(beta=0.3, penalty=2.0): of_ratios(
        lambda c, r, nc, nr: -ls(0.3 * (c - r - 2 * max(0.0, -c)))
    ),
    losses.CalDPO(beta=0.25): of_ratios(
        lambda c, r, nc, nr: -ls(c - r) + 0.5 * ((c - 2) ** 2 + (r + 2) ** 2)
    ),
    losses.CPO(beta=0.2, alpha=0.5): of_sums(
        lambda c, r, nc, nr, mean: -ls(0.2 * (c - r)) - 0.5 * c / mean
    ),
    losses.CPO(beta=0.2, alpha=0.5, per="sequence"): of_sums(
        lambda c, r, nc, nr, _: -ls(0.2 * (c - r)) - 0.5 * c / nc
    ),
    losses.SLiC(margin=2.0, alpha=0.3): of_sums(
        lambda c, r, nc, nr, mean: max(0.0, 2 - (c - r)) - 0.3 * c / mean
    ),
    losses.ORPO(beta=0.4): of_sums(
        lambda c, r, nc, nr, _: -c / nc - 0.4 * ls(log_odds(c / nc) - log_odds(r / nr))
    ),
    losses.ORPO(beta=0.4, per="tokens"): of_sums(
        lambda c, r, nc, nr, mean: -c / mean - 0.4 * ls(log_odds(c / nc) - log_odds(r / nr))
    ),
    losses.SimPO(beta=2.0, gamma=0.5): of_sums(
        lambda c, r, nc, nr, _: -ls(2 * (c / nc - r / nr) - 0.5)
    ),
    losses.AlphaPO(beta=2.0, gamma=0.1, alpha=0.25): of_sums(
        lambda c, r, nc, nr, _: (
            -ls(2 * ((1 - math.exp(-0.25 * c / nc)) - (1 - math.exp(-0.25 * r / nr))) / 0.25 - 0.1)
        )
    ),
    losses.AlphaPO(beta=2.0, gamma=0.1, alpha=0.0): of_sums(
        lambda c, r, nc, nr, _: -ls(2 * (c / nc - r / nr) - 0.1)
    ),
    losses.SimPER(): of_sums(lambda c, r, nc, nr, _: -math.exp(c / nc) + math.exp(r / nr)),
    losses.SFT(): lambda s, n, mean: -s[0] / mean,
    losses.SFT(per="sequence"): lambda s, n: -s[0] / n[0],
    losses.KTO(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5): (
        lambda s, n, reference, good, kl: (
            1.5 * (1 - sigmoid(0.2 * (s[0] - reference[0] - kl)))
            if good
            else 0.5 * (1 - sigmoid(0.2 * (kl - s[0] + reference[0])))
        )
    ),
    Sum((0.8, DPO(0.3)), (0.2, BCO(0.2)), (1.0, SFT())): (
        lambda s, n, reference, mean: (
            -0.8 * ls(0.3 * (s[0] - reference[0] - s[1] + reference[1]))
            + 0.2 * (-ls(0.2 * (s[0] - reference[0])) - ls(-0.2 * (s[1] - reference[1])))
            - s[0] / mean
        )
    ),
}
IDS = [f"{place}-{type(loss).__name__}" for place, loss in enumerate(ORACLES)]


def one(values, group):
    """A constant of one group, as floats."""
    return values[..., group].tolist()


@pytest.mark.parametrize(("loss", "oracle"), ORACLES.items(), ids=IDS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([1e-3, 1.0, 5.0]))
def test_each_group_has_the_loss_of_its_formula(loss, oracle, seed, spread):
    scores, constants = drawn(seed, loss, groups=5, spread=spread)
    values = loss(scores, *constants)
    expected = [
        oracle(one(scores.logps, p), one(scores.tokens, p), *(one(c, p) for c in constants))
        for p in range(5)
    ]
    assert values.shape == (5,) and values.dtype == torch.float64
    torch.testing.assert_close(
        values, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("loss", ORACLES, ids=IDS)
def test_coefficients_are_the_slopes_of_the_loss(loss):
    scores, constants = drawn(3, loss, groups=4)
    with torch.inference_mode():
        values, found = coefficients(loss, scores, *constants)
    torch.testing.assert_close(values, loss(scores, *constants))
    width = 1e-5
    for place in range(loss.sequences):
        step = torch.zeros_like(scores.logps)
        step[place] = width
        above = loss(scores._replace(logps=scores.logps + step), *constants)
        below = loss(scores._replace(logps=scores.logps - step), *constants)
        torch.testing.assert_close(
            found[place], (above - below) / (2 * width), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("loss", ORACLES, ids=IDS)
def test_a_group_alone_has_the_loss_that_it_has_among_others(loss):
    scores, constants = drawn(5, loss, groups=6)
    together = loss(scores, *constants)
    alone = [
        loss(Scores(*(s[:, p : p + 1] for s in scores)), *(c[..., p : p + 1] for c in constants))
        for p in range(6)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("loss", ORACLES, ids=IDS)
def test_float32_is_as_good_as_float32_can_be_and_extremes_stay_finite(loss):
    scores, constants = drawn(7, loss, groups=64)
    exact = loss(scores, *constants)
    single = loss(Scores(*(s.float() for s in scores)), *(c.float() for c in constants))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-4, atol=2e-4)
    certain = scores._replace(logps=scores.logps * 1e-7), constants  # nearly certain of every token
    unlikely = scores._replace(logps=scores.logps * 100), constants
    for given_scores, given_constants in (certain, unlikely):
        values, slopes = coefficients(loss, given_scores, *given_constants)
        if not isinstance(loss, losses.AlphaPO | losses.DiscoPOP):  # these hold exp(-sum)
            assert values.isfinite().all() and slopes.isfinite().all()


def from_the_head(loss, compiler):
    """Losses (P,), scores and constants of `linear_sequence_loss`, and the gradients of states and
    weight; then those gradients by plain autograd."""
    generator = torch.Generator().manual_seed(19)
    k, groups = loss.sequences, 3
    hidden = torch.randn(k * groups, 5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(13, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(13, (k * groups, 5), generator=generator)
    labels[torch.arange(5) < torch.arange(k * groups)[:, None] % 4] = -100
    constants = drawn(20, loss, groups)[1]
    if "reference_logps" in loss.constants:  # near what the model gives
        constants[0] = -14 + constants[0] / 10

    def ours(hidden, weight):
        out = linear_sequence_loss(hidden, weight, labels, loss, *constants, reduction="none")
        return out.loss, out.scores

    def plain(hidden, weight):
        logps = oracle.token_logprobs(hidden @ weight.T, labels).sum(1).view(k, -1)
        tokens = (labels != -100).sum(1).view(k, -1).double()
        return loss(Scores(logps, tokens), *constants), None

    values, scores, gradients = None, None, []
    for function in (compiler(ours), plain):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        result = function(*leaves)
        values, scores = (values, scores) if gradients else result
        gradients.append(torch.autograd.grad(result[0].sum(), leaves))
    return values, scores, constants, *gradients


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("loss", "oracle"), ORACLES.items(), ids=IDS)
def test_each_loss_is_its_formula_behind_a_head(loss, oracle, is_compiled):
    if INTERPRETED:
        pytest.skip("torch.compile and the interpreter do not meet")
    torch._dynamo.reset()
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    values, scores, constants, found, exact = from_the_head(
        loss, whole if is_compiled else lambda function: function
    )
    expected = [
        oracle(one(scores.logps, p), one(scores.tokens, p), *(one(c, p) for c in constants))
        for p in range(3)
    ]
    torch.testing.assert_close(values.tolist(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DPO(0.0), "DPO: beta is 0.0; needed is a number above 0."),
        (lambda: DPO(math.inf), "needed is a number above 0"),
        (lambda: DPO("0.1"), "DPO: beta is '0.1'"),
        (lambda: DPO(True), "DPO: beta is True"),
        (lambda: losses.CDPO(flipped=0.5), "needed is a number of at least 0 and below 0.5"),
        (lambda: losses.EXO(flipped=0.0), "needed is a number above 0 and below 0.5"),
        (lambda: losses.SimPO(gamma=math.nan), "needed is a finite number"),
        (lambda: KTO(desirable_weight=-1), "needed is a number of at least 0"),
        (lambda: losses.CPO(per="batch"), "needed is sequence or tokens"),
        (lambda: setattr(DPO(), "beta", -1.0), "DPO: beta is -1.0"),
        (lambda: setattr(DPO(), "bta", 1.0), "DPO has no bta; its fields are: beta."),
        (lambda: setattr(losses.SimPER(), "beta", 1.0), "its fields are: none"),
        (Sum, "pairs of a weight and a loss"),
        (lambda: Sum((math.nan, DPO())), "a finite number and a loss"),
        (lambda: Sum((1.0, abs)), "a finite number and a loss"),
    ],
)
def test_refused_settings(make, words):
    with pytest.raises(ValueError) as refusal:
        make()
    assert words in str(refusal.value)


def test_a_setting_may_change_while_training_goes_on():
    loss = DPO(0.1)
    scores, constants = drawn(17, loss, groups=3)
    loss.beta = 0.5
    assert torch.equal(loss(scores, *constants), DPO(0.5)(scores, *constants))


def test_the_page_of_losses_is_current():
    written = (Path(__file__).parents[2] / "docs/losses.md").read_text(encoding="utf-8")
    assert written == page(), "python -m mpo_kernels.losses > docs/losses.md"
    for kind in (type(loss) for loss in ORACLES):
        assert f"## {kind.__name__}\n" in written
