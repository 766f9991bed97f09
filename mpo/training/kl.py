"""How far the policy has moved from the reference: the `kl` of KTO, one number for a whole step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mpo.config import Config
from mpo.data.examples import Answers, Side, TokenizedResponse
from mpo.models.inputs import Inputs
from mpo.models.loading import positions_of
from mpo.models.scoring import Scorer
from mpo.runtime.errors import UserError
from mpo.training.objective import Objective
from mpo.training.reference import Reference


def mismatched_of(config: Config, inputs: Inputs) -> dict[Side, list[Answers]]:
    """`Objective.mismatched` of the training rows, cut to data.max_length, and to the model's
    positions where those are fewer.

    Raises:
        UserError: most rows have the same prompt.
    """
    length = config.data.max_length
    return Objective(config.loss).mismatched(
        inputs.examples.train, config.train.seed, min(length, positions_of(inputs.model) or length)
    )


@dataclass(frozen=True)
class MismatchedAnswers:
    """Prompts with answers of other rows, which policy and reference are compared on.

    Under ZeRO-3 a forward pass is a collective, so every method is called by all ranks.
    """

    scorer: Scorer
    reference: Reference
    of_sides: Mapping[Side, Sequence[Answers]]
    """Of each training row, `Objective.mismatched`."""

    def of_rows(self, rows: Sequence[int]) -> list[TokenizedResponse]:
        """All answers of these rows."""
        return [s for row in rows for answers in self.of_sides.values() for s in answers[row]]

    def kl(self, rows: Sequence[int]) -> float:
        """max(0, mean of r) over the answers of these rows, the same on every rank; r is the sum of
        an answer's log-probabilities minus that under the reference.

        All rows of a step are scored before its first micro-batch, in batches that depend on them
        alone, without gradients and without dropout.

        Raises:
            UserError: the mean is not finite.
        """
        sequences = self.of_rows(rows)
        lengths = torch.tensor([len(sequence.response) for sequence in sequences])
        mean = (self.log_ratios(sequences) * lengths).mean()
        if not bool(mean.isfinite()):
            raise UserError(
                f"The mean log-ratio of answers to other prompts is {float(mean)}: policy or"
                " reference gives log-probabilities that are not finite. Lower"
                " train.learning_rate, or use model.dtype=float32, and train again."
            )
        return max(0.0, float(mean))

    def log_ratios(self, sequences: Sequence[TokenizedResponse]) -> torch.Tensor:
        """(S,) float64 r of each sequence, per token."""
        distinct = list(dict.fromkeys(sequences))
        policy = self.scorer.scores(distinct, pools=False).mean_logp.double()
        difference = policy - self.reference.mean_logps(distinct).double()
        places = {sequence: i for i, sequence in enumerate(distinct)}
        return difference[[places[sequence] for sequence in sequences]]
