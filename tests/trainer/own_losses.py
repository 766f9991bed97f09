"""Losses as a user would write them, for `loss.name=own_losses:...`."""

from dataclasses import dataclass

import torch

from mpo_kernels.losses import SequenceLoss, positive


def squared(scores, reference_logps):
    """A function of pairs that takes the reference's sums."""
    chosen, rejected = scores.logps - reference_logps
    return ((chosen - rejected) / scores.tokens.sum(0) - 0.7).square()


@dataclass(eq=False)
class Lift(SequenceLoss):
    """A loss of chosen answers with a field of its own."""

    sequences = 1
    rate: float = positive(0.5)

    def __call__(self, scores):
        return torch.exp(-self.rate * scores.means()[0])


@dataclass(eq=False)
class Nearer(SequenceLoss):
    """Of chosen answers too, with their sums under the reference: 1 where nothing has moved."""

    sequences = 1
    constants = ("reference_logps",)

    def __call__(self, scores, reference_logps):
        return torch.exp(-(scores.logps - reference_logps)[0] / scores.tokens[0])


lift = Lift(rate=0.25)


def of_the_batch(scores):
    chosen, rejected = scores.logps
    return (chosen - rejected) - (chosen - rejected).mean()


def too_few(scores):
    return scores.logps.mean()[None]


def detached(scores):
    return scores.logps.detach()[0]


def of_a_parameter(scores):
    return torch.ones(scores.logps.shape[1]) * torch.nn.Parameter(torch.tensor(2.0))


def good_pairs(scores, is_desirable):
    return -scores.logps[0] * is_desirable


def fails(scores):
    raise RuntimeError("out of luck")


def wants_more(scores, margin_rewards):
    return scores.logps[0] - margin_rewards


def of_field(name, default=2.0):
    """A loss with one field."""

    def call(self, scores):
        return -scores.logps[0]

    fields = {"__annotations__": {name: object}, name: default, "__call__": call}
    return dataclass(eq=False)(type("OfField", (SequenceLoss,), fields))


Pairs, Weight, Code, Build = map(of_field, ("pairs", "retention_weight", "code_sha256", "build"))
Hidden, Function = of_field("_scale"), of_field("scale", torch.sigmoid)

nothing = 3
