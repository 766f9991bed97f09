"""Losses of single sequences: each group is one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mpo_kernels.losses.base import (
    LikelihoodLoss,
    Scores,
    SequenceLoss,
    log_ratios,
    not_negative,
    positive,
)


@dataclass(eq=False)
class SFT(LikelihoodLoss):
    """NLL

    Supervised fine-tuning: the mean over the tokens of the batch; see `LikelihoodLoss`.
    """

    sequences: ClassVar[int] = 1

    def __call__(self, scores: Scores, *mean_tokens: torch.Tensor) -> torch.Tensor:
        return self.likelihood(scores, *mean_tokens)


@dataclass(eq=False)
class KTO(SequenceLoss):
    """desirable:   desirable_weight (1 - sigmoid(beta (r - kl)))
    undesirable: undesirable_weight (1 - sigmoid(beta (kl - r)))

    Kahneman-Tversky optimization, arXiv 2402.01306. r = s - reference_logps (1, P); `is_desirable`
    (P,) is 1 or 0; `kl` (P,) is the same number for all groups, max(0, mean r of answers to
    mismatched prompts), which the caller computes without gradient.

    Over which answers `kl` is a mean differs. `mpo train`: all of an optimizer step, whatever
    micro-batches and ranks it is cut into; each answer is given to a prompt of another row. TRL
    1.16: those of a micro-batch, then the mean over ranks; each prompt has the answer of the row
    before it in its batch when the data are tokenised. LLaMA-Factory: the same, with the row before
    it in a piece of the data set. The row before may hold the other answer to the same prompt.
    """

    sequences: ClassVar[int] = 1
    beta: float = positive(0.1)
    desirable_weight: float = not_negative(1.0)
    undesirable_weight: float = not_negative(1.0)

    @property
    def constants(self) -> tuple[str, ...]:
        return ("reference_logps", "is_desirable", "kl")

    def __call__(  # type: ignore[override]
        self,
        scores: Scores,
        reference_logps: torch.Tensor,
        is_desirable: torch.Tensor,
        kl: torch.Tensor,
    ) -> torch.Tensor:
        above = self.beta * (log_ratios(scores, reference_logps)[0] - kl)
        good = self.desirable_weight * (1 - above.sigmoid())
        bad = self.undesirable_weight * (1 - (-above).sigmoid())
        return torch.where(is_desirable.bool(), good, bad)
