"""Losses of pairs that candidates compute side by side, each as a plain formula of the pair's sums.

The exact results and all peers that give log-probabilities use these formulas. This package uses
its own (`mpo_kernels.losses`), and Liger its own of DPO, SimPO and ORPO, so that a slip in one of
them shows as a wrong row. Constants are the same for all pairs, because Liger's base class does not
tell which pairs a chunk holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from mpo_kernels import losses
from mpo_kernels.losses import Scores

GAP = 2.0
REFERENCE_LOGPS = (-1000.0, -1005.0)
"""Of a chosen and of a rejected answer; only their difference matters to DPO."""


@dataclass(frozen=True)
class Objective:
    """A loss of P pairs, chosen answers first."""

    name: str
    formula: Callable[[Scores], torch.Tensor]
    """(2, P) sums and numbers of tokens -> (P,)"""
    ours: Callable[..., torch.Tensor]
    """The same as `linear_sequence_loss` takes it."""
    constants: tuple[float | tuple[float, float], ...] = ()
    """What `ours` takes beside the scores: a number for each pair, or for each of its answers."""

    def of_tokens(self, logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over pairs, from log-probabilities (2P, T)."""
        scored = labels != -100
        return self.of_sequences((logps * scored).sum(1), scored.sum(1))

    def of_sequences(self, sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The same from sums of log-probabilities and numbers of tokens, (2P,) each."""
        return self.formula(Scores(sums.view(2, -1), tokens.to(sums.dtype).view(2, -1))).mean()

    def constants_of(self, pairs: int, device: torch.device) -> list[torch.Tensor]:
        """(P,) or (2, P) each."""
        return [
            torch.tensor(values, device=device)[..., None].repeat_interleave(pairs, -1)
            for values in self.constants
        ]


def _mpo(scores: Scores) -> torch.Tensor:
    chosen, rejected = scores.means()
    return (chosen - rejected - GAP) ** 2


def _dpo(scores: Scores) -> torch.Tensor:
    chosen, rejected = scores.logps
    of_chosen, of_rejected = REFERENCE_LOGPS
    return -logsigmoid(0.1 * ((chosen - of_chosen) - (rejected - of_rejected)))


def _simpo(scores: Scores) -> torch.Tensor:
    chosen, rejected = scores.means()
    return -logsigmoid(2.5 * (chosen - rejected) - 1.375)


def _orpo(scores: Scores) -> torch.Tensor:
    chosen, rejected = scores.means()
    log_odds = (chosen - rejected) - ((-chosen.exp()).log1p() - (-rejected.exp()).log1p())
    return -chosen - 0.1 * logsigmoid(log_odds)


def held_margin(scores: Scores) -> torch.Tensor:
    """A loss that no library has, as a user would write it: a squared hinge on the margin of the
    means, while the chosen answer is held up. Its two derivatives are not each other's negative."""
    chosen, rejected = scores.means()
    return torch.relu(1 - 2 * (chosen - rejected)) ** 2 - 0.1 * chosen


MPO = Objective("MPO", _mpo, losses.MPO(beta=1.0), (GAP,))
DPO = Objective("DPO", _dpo, losses.DPO(beta=0.1), (REFERENCE_LOGPS,))
SIMPO = Objective("SimPO", _simpo, losses.SimPO(beta=2.5, gamma=1.375))
ORPO = Objective("ORPO", _orpo, losses.ORPO(beta=0.1))
OWN = Objective("user's own", held_margin, held_margin)

OBJECTIVES = (MPO, DPO, SIMPO, ORPO, OWN)
