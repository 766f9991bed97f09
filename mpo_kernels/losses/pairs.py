"""Losses of pairs of answers, chosen (w) and rejected (l), to the same prompt.

s is the sum of an answer's log-probabilities, n the number of its tokens, m = s / n, r = s minus
that sum under the reference model, ls = log sigmoid. D = r_w - r_l is the margin.

A default is the method's published one, or the docstring says that it is our choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from mpo_kernels.losses.base import (
    LikelihoodLoss,
    Scores,
    SequenceLoss,
    any_number,
    divided_per,
    flip_rate,
    log_ratios,
    not_negative,
    positive,
    positive_flip_rate,
)


@dataclass(eq=False)
class MPO(SequenceLoss):
    """(beta (m_w - m_l) - gap)^2

    Multilingual reward gap optimization, arXiv 2505.16869: its L1. `gap` (P,) is the reference
    model's m_w - m_l of the dominant pair, in nats per token. `mpo_kernels.mpo_loss` and
    `linear_mpo_loss` compute the same in one kernel.
    """

    beta: float = positive(1.0)

    @property
    def constants(self) -> tuple[str, ...]:
        return ("reference_gap",)

    def __call__(self, scores: Scores, reference_gap: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        chosen, rejected = scores.means()
        return (self.beta * (chosen - rejected) - reference_gap).square()


@dataclass(eq=False)
class _WithReference(SequenceLoss):
    """A loss of r = s - reference_logps, which are (2, P) sums under the reference model."""

    @property
    def constants(self) -> tuple[str, ...]:
        return ("reference_logps",)

    def __call__(self, scores: Scores, reference_logps: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        chosen, rejected = log_ratios(scores, reference_logps)
        return self.of_ratios(chosen, rejected, scores)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """r_w (P,), r_l (P,) -> losses (P,)."""
        raise NotImplementedError


@dataclass(eq=False)
class DPO(_WithReference):
    """-ls(beta D)

    Direct preference optimization, arXiv 2305.18290, equation 7.
    """

    beta: float = positive(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return -logsigmoid(self.beta * (chosen - rejected))


@dataclass(eq=False)
class CDPO(_WithReference):
    """-(1 - e) ls(beta D) - e ls(-beta D)

    Conservative DPO (E. Mitchell, "A note on DPO with noisy preferences", 2023): a share e of the
    pairs is labelled the wrong way round.
    """

    beta: float = positive(0.1)
    flipped: float = flip_rate(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        margin = self.beta * (chosen - rejected)
        return -(1 - self.flipped) * logsigmoid(margin) - self.flipped * logsigmoid(-margin)


@dataclass(eq=False)
class RobustDPO(_WithReference):
    """(-(1 - e) ls(beta D) + e ls(-beta D)) / (1 - 2 e)

    Provably robust DPO, arXiv 2403.00409: an unbiased estimate of DPO's loss where a share e of the
    pairs is labelled the wrong way round. It may be negative. (R-DPO, which some call rDPO too, is
    `LengthDPO`.)
    """

    beta: float = positive(0.1)
    flipped: float = flip_rate(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        margin = self.beta * (chosen - rejected)
        clean, turned = -logsigmoid(margin), -logsigmoid(-margin)
        return ((1 - self.flipped) * clean - self.flipped * turned) / (1 - 2 * self.flipped)


@dataclass(eq=False)
class IPO(_WithReference):
    """(r_w / n_w - r_l / n_l - 1 / (2 tau))^2

    Identity preference optimization, arXiv 2310.12036, equation 17, with ratios per token: the form
    that TRL uses and says its authors confirmed.
    """

    tau: float = positive(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        tokens_chosen, tokens_rejected = scores.tokens
        return (chosen / tokens_chosen - rejected / tokens_rejected - 0.5 / self.tau).square()


@dataclass(eq=False)
class Hinge(_WithReference):
    """max(0, 1 - beta D)

    SLiC's hinge on DPO's margin, as in RSO, arXiv 2309.06657.
    """

    beta: float = positive(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return torch.relu(1 - self.beta * (chosen - rejected))


@dataclass(eq=False)
class EXO(_WithReference):
    """q log(q / (1 - e)) + (1 - q) log((1 - q) / e),  q = sigmoid(beta D)

    Efficient exact optimization for pairs, arXiv 2402.00856, equation 16.
    """

    beta: float = positive(0.1)
    flipped: float = positive_flip_rate(1e-3)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        margin = self.beta * (chosen - rejected)
        towards = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-self.flipped))
        away = (-margin).sigmoid() * (logsigmoid(-margin) - math.log(self.flipped))
        return towards + away


@dataclass(eq=False)
class NCA(_WithReference):
    """-ls(beta r_w) - ls(-beta r_w) / 2 - ls(-beta r_l) / 2

    Noise contrastive alignment for pairs, arXiv 2402.05369.
    """

    beta: float = positive(0.01)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        up, down = self.beta * chosen, self.beta * rejected
        return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)


@dataclass(eq=False)
class BCO(_WithReference):
    """-ls(beta r_w - delta) - ls(-(beta r_l - delta))

    Binary classifier optimization, arXiv 2404.04656. `delta` is its reward shift, a running mean of
    rewards that the caller keeps; TRL's pair form has 0.
    """

    beta: float = positive(0.01)
    delta: float = any_number(0.0)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        up, down = self.beta * chosen - self.delta, self.beta * rejected - self.delta
        return -logsigmoid(up) - logsigmoid(-down)


@dataclass(eq=False)
class SPPO(_WithReference):
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    Self-play preference optimization, arXiv 2405.00675, equation 4.7 with the hard probabilities 1
    and 0. 1 / beta is the paper's eta.
    """

    beta: float = positive(0.001)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(eq=False)
class APOZero(_WithReference):
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l)

    Anchored preference optimization, arXiv 2408.06266, equation 7: for chosen answers that are
    better than the model's own.
    """

    beta: float = positive(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return 1 - (self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()


@dataclass(eq=False)
class APODown(_WithReference):
    """sigmoid(beta r_w) + 1 - sigmoid(beta D)

    Anchored preference optimization, arXiv 2408.06266, equation 8: for chosen answers that are
    worse than the model's own.
    """

    beta: float = positive(0.1)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return (self.beta * chosen).sigmoid() + 1 - (self.beta * (chosen - rejected)).sigmoid()


@dataclass(eq=False)
class DiscoPOP(_WithReference):
    """(1 - u) (-ls(x)) + u exp(-x),  x = beta D,  u = sigmoid(x / tau)

    The discovered loss of arXiv 2406.08414, equation 5.
    """

    beta: float = positive(0.05)
    tau: float = positive(0.05)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        margin = self.beta * (chosen - rejected)
        mixed = (margin / self.tau).sigmoid()
        return (1 - mixed) * -logsigmoid(margin) + mixed * (-margin).exp()


@dataclass(eq=False)
class LengthDPO(_WithReference):
    """-ls(beta D + alpha (n_w - n_l))

    R-DPO, arXiv 2403.19159: a pair whose lengths alone explain the choice is pushed less. alpha is
    our choice. (The other rDPO is `RobustDPO`.)
    """

    beta: float = positive(0.1)
    alpha: float = not_negative(0.01)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        longer = scores.tokens[0] - scores.tokens[1]
        return -logsigmoid(self.beta * (chosen - rejected) + self.alpha * longer)


@dataclass(eq=False)
class NormalisedDPO(_WithReference):
    """-ls(beta (r_w / n_w - r_l / n_l))

    Length-normalised DPO, arXiv 2411.15124 (Tulu 3). beta is our choice of what suits ratios per
    token.
    """

    beta: float = positive(5.0)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        tokens_chosen, tokens_rejected = scores.tokens
        return -logsigmoid(self.beta * (chosen / tokens_chosen - rejected / tokens_rejected))


@dataclass(eq=False)
class DPOP(_WithReference):
    """-ls(beta (D - penalty max(0, -r_w)))

    DPO-positive, arXiv 2402.13228: the chosen answer may not become less likely than it was. Both
    defaults are our choice.
    """

    beta: float = positive(0.1)
    penalty: float = not_negative(5.0)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        return -logsigmoid(self.beta * (chosen - rejected - self.penalty * torch.relu(-chosen)))


@dataclass(eq=False)
class CalDPO(_WithReference):
    """-ls(D) + ((r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2) / 2

    Calibrated DPO, arXiv 2412.14516.
    """

    beta: float = positive(0.001)

    def of_ratios(
        self, chosen: torch.Tensor, rejected: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        error = (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()
        return -logsigmoid(chosen - rejected) + 0.5 * error


@dataclass(eq=False)
class CPO(LikelihoodLoss):
    """-ls(beta (s_w - s_l)) + alpha NLL(w)

    Contrastive preference optimization, arXiv 2401.08417. NLL is per token of the batch, as in its
    authors' code; see `LikelihoodLoss`.
    """

    beta: float = positive(0.1)
    alpha: float = not_negative(1.0)

    def __call__(self, scores: Scores, *mean_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = scores.logps
        likelihood = self.likelihood(scores, *mean_tokens)
        return -logsigmoid(self.beta * (chosen - rejected)) + self.alpha * likelihood


@dataclass(eq=False)
class SLiC(LikelihoodLoss):
    """max(0, margin - (s_w - s_l)) + alpha NLL(w)

    Sequence likelihood calibration, arXiv 2305.10425.
    """

    margin: float = positive(1.0)
    alpha: float = not_negative(0.1)

    def __call__(self, scores: Scores, *mean_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = scores.logps
        likelihood = self.likelihood(scores, *mean_tokens)
        return torch.relu(self.margin - (chosen - rejected)) + self.alpha * likelihood


@dataclass(eq=False)
class ORPO(LikelihoodLoss):
    """NLL(w) - beta ls(log odds(w) - log odds(l)),  log odds = m - log(1 - exp(m))

    Odds ratio preference optimization, arXiv 2403.07691. The paper calls beta lambda. NLL is that
    of the answer alone.
    """

    beta: float = positive(0.1)
    per: str = divided_per("sequence")

    def __call__(self, scores: Scores, *mean_tokens: torch.Tensor) -> torch.Tensor:
        chosen, rejected = scores.means()
        odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        likelihood = self.likelihood(scores, *mean_tokens)
        return likelihood - self.beta * logsigmoid(odds_ratio)


@dataclass(eq=False)
class SimPO(SequenceLoss):
    """-ls(beta (m_w - m_l) - gamma)

    Simple preference optimization, arXiv 2405.14734, equation 6. gamma / beta is 0.55.
    """

    beta: float = positive(2.5)
    gamma: float = any_number(1.375)

    def __call__(self, scores: Scores) -> torch.Tensor:  # type: ignore[override]
        chosen, rejected = scores.means()
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(eq=False)
class AlphaPO(SequenceLoss):
    """-ls(beta (f(m_w) - f(m_l)) - gamma),  f(m) = (1 - exp(-alpha m)) / alpha

    AlphaPO, arXiv 2501.03884: SimPO (alpha -> 0) with another shape of reward.
    """

    beta: float = positive(2.5)
    gamma: float = any_number(0.1)
    alpha: float = any_number(0.25)

    def __call__(self, scores: Scores) -> torch.Tensor:  # type: ignore[override]
        means = scores.means()
        chosen, rejected = -torch.expm1(-self.alpha * means) / self.alpha if self.alpha else means
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(eq=False)
class SimPER(SequenceLoss):
    """-exp(m_w) + exp(m_l)

    SimPER, arXiv 2502.00883: inverse perplexities, without a hyper-parameter.
    """

    def __call__(self, scores: Scores) -> torch.Tensor:  # type: ignore[override]
        chosen, rejected = scores.means().exp()
        return rejected - chosen


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0 without cancellation, -inf at 0."""
    near = x > -math.log(2)
    half = torch.full_like(x, -math.log(2))
    # Where a branch is not taken it computes at a harmless place: its NaN would meet the gradient.
    close, far = torch.where(near, x, half), torch.where(near, half, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
