"""`mpo_kernels.losses` beside formulas written out for one group in Python's own floats, and beside
TRL's own code on the same log-probabilities."""

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_kernels import losses
from mpo_kernels.losses import BCO, DPO, KTO, SFT, Scores, Sum, coefficients
from mpo_kernels.losses.__main__ import page


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


def drawn(seed, loss, groups, spread=1.0):
    """Scores and the loss's constants, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low, high):
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    k = loss.sequences
    tokens = torch.randint(1, 40, (k, groups), generator=generator).double()
    sums = tokens * uniform(k, groups, low=-3.0, high=-1e-3) * spread
    constants = {
        "reference_logps": sums + uniform(k, groups, low=-6.0, high=6.0) * spread,
        "reference_gap": uniform(groups, low=-2.0, high=2.0),
        "mean_tokens": torch.full((groups,), 17.25, dtype=torch.float64),
        "is_desirable": (uniform(groups, low=0.0, high=1.0) > 0.5).double(),
        "kl": torch.full((groups,), 0.375, dtype=torch.float64),
    }
    return Scores(sums, tokens), [constants[name] for name in loss.constants]


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


def trl_sequence_batch(scores):
    """What TRL's trainer makes of a batch: the answers' tokens in rows behind one prompt token."""
    tokens = scores.tokens.flatten().long()
    mask = torch.arange(int(tokens.max()) + 1) < tokens[:, None] + 1
    mask[:, 0] = False
    each = (scores.logps.flatten() / tokens)[:, None].expand(mask.shape[0], mask.shape[1] - 1)
    return mask.long(), each * mask[:, 1:]


DPO_TYPES = {
    "sigmoid": (losses.DPO(0.3), 0.0),
    "hinge": (losses.Hinge(0.3), 0.0),
    "ipo": (losses.IPO(0.3), 0.0),
    "exo_pair": (losses.EXO(0.3, 0.01), 0.01),
    "nca_pair": (losses.NCA(0.3), 0.0),
    "robust": (losses.RobustDPO(0.3, 0.2), 0.2),
    "bco_pair": (losses.BCO(0.3), 0.0),
    "sppo_hard": (losses.SPPO(0.3), 0.0),
    "apo_zero": (losses.APOZero(0.3), 0.0),
    "apo_down": (losses.APODown(0.3), 0.0),
    "discopop": (losses.DiscoPOP(0.3, 0.05), 0.0),
    "sigmoid_norm": (losses.NormalisedDPO(0.3), 0.0),
}


def trl_dpo(types, weights, smoothing, scores, reference):
    """The loss of TRL's DPOTrainer, whose model is replaced by one that has these
    log-probabilities."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    mask, per_token = trl_sequence_batch(scores)
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t
    )
    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=0.05),
        beta=0.3,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        loss_types=types,
        loss_weights=weights,
        label_smoothing=smoothing,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return trainer.DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("name", DPO_TYPES)
def test_equal_to_trls_dpo_trainer(name):
    loss, smoothing = DPO_TYPES[name]
    scores, (reference,) = drawn(11, loss, groups=7)
    theirs = trl_dpo([name], [1.0], smoothing, scores, reference)
    torch.testing.assert_close(
        loss(scores, reference).mean(), theirs.double(), rtol=1e-6, atol=1e-6
    )


def test_equal_to_trls_mixed_preference_optimization():
    loss = Sum((0.8, DPO(0.3)), (0.2, BCO(0.3)), (1.0, SFT()))
    scores, (reference, _) = drawn(12, loss, groups=7)
    theirs = trl_dpo(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0, scores, reference)
    mean_tokens = scores.tokens[0].mean().expand(7)
    torch.testing.assert_close(loss(scores, reference, mean_tokens).mean(), theirs)


def test_equal_to_trls_cpo_simpo_and_orpo():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    scores, _ = drawn(13, losses.SimPO(), groups=7)

    def settings(**others):
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        return SimpleNamespace(accelerator=accelerator, beta=0.3, label_smoothing=0.0, **others)

    kind = {"simpo_gamma": 0.5, "alpha": 0.0}
    theirs, *_ = cpo.cpo_loss(settings(loss_type="sigmoid", **kind), *scores.logps)
    torch.testing.assert_close(losses.CPO(0.3, 0.0, per="sequence")(scores), theirs)
    theirs, *_ = cpo.cpo_loss(settings(loss_type="simpo", **kind), *scores.means())
    torch.testing.assert_close(losses.SimPO(0.3, 0.5)(scores), theirs)
    kind["alpha"] = 0.25
    theirs, *_ = cpo.cpo_loss(settings(loss_type="simpo", **kind), *scores.means())
    torch.testing.assert_close(losses.AlphaPO(0.3, 0.5, 0.25)(scores), theirs)
    theirs, *_ = orpo.odds_ratio_loss(settings(), *scores.means())
    torch.testing.assert_close(losses.ORPO(0.3)(scores), -scores.means()[0] - theirs)


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
