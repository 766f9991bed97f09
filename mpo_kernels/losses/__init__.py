"""Losses of sequences and of pairs of answers, as small functions of sums of log-probabilities.

from mpo_kernels import token_logprobs
from mpo_kernels.losses import DPO, Scores

logps = token_logprobs(logits, labels)  # (2P, T), chosen first
sums, tokens = logps.sum(-1).view(2, -1), (labels != -100).sum(-1).view(2, -1)
loss = DPO(beta=0.1)(Scores(sums, tokens.to(sums.dtype)), reference_logps).mean()
"""

from mpo_kernels.losses.base import (
    Custom,
    LikelihoodLoss,
    Scores,
    SequenceLoss,
    Sum,
    any_number,
    divided_per,
    flip_rate,
    not_negative,
    positive,
)
from mpo_kernels.losses.contract import coefficients
from mpo_kernels.losses.pairs import (
    BCO,
    CDPO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    MPO,
    NCA,
    ORPO,
    SPPO,
    AlphaPO,
    APODown,
    APOZero,
    CalDPO,
    DiscoPOP,
    Hinge,
    LengthDPO,
    NormalisedDPO,
    RobustDPO,
    SimPER,
    SimPO,
    SLiC,
)
from mpo_kernels.losses.single import KTO, SFT

__all__ = [
    "BCO",
    "CDPO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "KTO",
    "MPO",
    "NCA",
    "ORPO",
    "SFT",
    "SPPO",
    "APODown",
    "APOZero",
    "AlphaPO",
    "CalDPO",
    "Custom",
    "DiscoPOP",
    "Hinge",
    "LengthDPO",
    "LikelihoodLoss",
    "NormalisedDPO",
    "RobustDPO",
    "SLiC",
    "Scores",
    "SequenceLoss",
    "SimPER",
    "SimPO",
    "Sum",
    "any_number",
    "coefficients",
    "divided_per",
    "flip_rate",
    "not_negative",
    "positive",
]
