"""What a run's loss is computed from: which sequences of a row are scored together, and which
numbers the loss takes beside their scores.

A loss sees groups: single answers, or pairs. Its constants are known before a micro-batch runs:
numbers of a row or a sequence come from the reference, numbers of a whole step are the same for all
of its groups, so that neither micro-batches nor ranks change the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mpo.data.examples import Answers, Example, Side, TokenizedResponse
from mpo.data.mismatched import mismatched_answers
from mpo.data.run_date import mismatched_folder, target_folder
from mpo.loss_config import LossConfig
from mpo.models.packing import Batch
from mpo.training.reference import ReferenceStore
from mpo_kernels.losses import Scores


@dataclass(frozen=True)
class Group:
    """Sequences of a row that have one loss together: an answer, or chosen and rejected."""

    sequences: tuple[TokenizedResponse, ...]
    example: Example
    weight: float
    """What its loss is multiplied with; those of a row sum to 1."""
    is_target: bool = True
    """Of the row's target side, not of its dominant one."""
    is_desirable: bool | None = None
    """Of a single answer whose pair is in the loss as a whole: whether it is the chosen one."""

    @property
    def share_of_gap(self) -> tuple[int, int]:
        """What one adds to the reward gap of a pair: the sign of its own number (the gap, or of a
        single answer its mean log-probability), and how many pairs it counts for."""
        if len(self.sequences) == 2:
            return 1, 1
        return {True: (1, 1), False: (-1, 0), None: (0, 0)}[self.is_desirable]


class StoreOf(NamedTuple):
    """A store of the reference that a loss takes. Its folder says what it holds of the rows,
    whichever loss: both answers of a pair, also where the loss takes one."""

    folder: Path
    name: str
    """What a bar calls it while it is built."""
    side: Side
    is_mismatched: bool = False

    @property
    def pools(self) -> bool:
        """Whether it has pooled hidden states, for L2; only the dominant pairs do."""
        return self.side == "dominant" and not self.is_mismatched

    def sequences(
        self, examples: Sequence[Example], mismatched: Mapping[Side, Sequence[Answers]]
    ) -> list[TokenizedResponse]:
        """What it holds, each once, in order of appearance."""
        pairs = mismatched[self.side] if self.is_mismatched else [e.of(self.side) for e in examples]
        return list(dict.fromkeys(s for answers in pairs for s in answers))


class Objective:
    """The loss of a run, asked for what it needs.

    objective = Objective(config.loss)
    objective.groups(example)
    """

    def __init__(self, config: LossConfig) -> None:
        self.sides: tuple[Side, ...] = (
            ("target", "dominant") if config.pairs == "both" else ("target",)
        )
        """Which pairs of a row it sees."""
        self.loss = config.build()
        self.pools_dominant = config.pools_dominant
        """Whether dominant sequences go through the model for L2."""
        self.takes_logps = "reference_logps" in self.loss.constants
        """Whether it takes the reference's sums of what it scores."""
        self.takes_kl = "kl" in self.loss.constants
        """Whether it takes how far the policy is from the reference on mismatched answers."""
        self.takes_dominant = self.pools_dominant or "reference_gap" in self.loss.constants
        """Whether it takes anything of the reference on dominant sequences."""

    @property
    def takes_reference(self) -> bool:
        """Whether a run needs the model before training at all."""
        return self.takes_dominant or self.takes_logps or self.takes_kl

    def stores(self, root: Path, seed: int) -> list[StoreOf]:
        """Those of the reference that a run opens, beside each other; that of the dominant pairs,
        `root`, is the first. It has their log-probabilities too."""
        stores = []
        if self.takes_dominant or (self.takes_logps and "dominant" in self.sides):
            stores.append(StoreOf(root, "Reference store", "dominant"))
        if self.takes_logps:
            name = "Reference store of target pairs"
            stores.append(StoreOf(target_folder(root), name, "target"))
        for side in self.sides if self.takes_kl else ():
            name = f"Reference store of answers to other {side} prompts"
            stores.append(StoreOf(mismatched_folder(root, side, seed), name, side, True))
        return stores

    @property
    def size(self) -> int:
        """Sequences of a group."""
        return self.loss.sequences

    def groups(self, example: Example) -> list[Group]:
        """Those of a row, the target's first."""
        per_side = [(side, each) for side in self.sides for each in self._split(example.of(side))]
        return [
            Group(sequences, example, 1 / len(per_side), side == "target", is_desirable)
            for side, (sequences, is_desirable) in per_side
        ]

    def _split(self, answers: Answers) -> list[tuple[tuple[TokenizedResponse, ...], bool | None]]:
        """The groups of a pair of answers, and whether they are desirable."""
        if "is_desirable" in self.loss.constants:
            return [((answers.chosen,), True), ((answers.rejected,), False)]
        return [(tuple(answers[: self.size]), None)]

    def mismatched(
        self, examples: Sequence[Example], seed: int, max_length: int
    ) -> dict[Side, list[Answers]]:
        """Of each side that the loss sees, and each row, its prompt with both answers of another
        row. Empty where the loss takes no `kl`.

        Raises:
            UserError: most rows have the same prompt.
        """
        sides = self.sides if self.takes_kl else ()
        return {side: mismatched_answers(examples, side, seed, max_length) for side in sides}

    def referenced(
        self, examples: Sequence[Example], mismatched: Mapping[Side, Sequence[Answers]]
    ) -> set[TokenizedResponse]:
        """All sequences that the model before training scores once."""
        stores = self.stores(Path("reference"), seed=0)
        return {s for store in stores for s in store.sequences(examples, mismatched)}

    def numbers_of_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """The constants that all groups of a step share, by name; from all of its rows, whichever
        rank has them. `kl`, which takes the model, is in `mpo.training.kl`."""
        if "mean_tokens" not in self.loss.constants:
            return {}
        groups = [group for e in examples for group in self.groups(e)]
        tokens = sum(group.weight * len(group.sequences[0].response) for group in groups)
        return {"mean_tokens": tokens / sum(group.weight for group in groups)}

    def constants(
        self, groups: Sequence[Group], store: ReferenceStore, of_step: Mapping[str, float]
    ) -> tuple[torch.Tensor, ...]:
        """What the loss takes beside the scores of P groups, (P,) or (k, P) float32 each, in its
        order. No groups: those of one filler."""
        found = []
        for name in self.loss.constants:
            if name == "reference_gap":
                values = torch.tensor([store.gap(group.example) for group in groups] or [0.0])
            elif name == "reference_logps":
                values = torch.tensor(
                    [[store.logp(group.sequences[i]) for group in groups] for i in range(self.size)]
                    if groups
                    else [[0.0]] * self.size
                )
            elif name == "is_desirable":
                values = torch.tensor([float(bool(g.is_desirable)) for g in groups] or [1.0])
            else:
                values = torch.full((max(len(groups), 1),), of_step[name])
            found.append(values)
        return tuple(found)

    def at_reference(self, batch: Batch, off: float) -> tuple[float, float]:
        """The loss of a batch whose policy gives what the reference gave, summed with its weights;
        and how far it may be from that where tokens are off by so many nats, each in its own
        direction: a sum is then off by that times the root of its tokens."""
        place = self.loss.constants.index("reference_logps")
        constants = [constant.cpu() for constant in batch.constants]
        lengths = batch.packed.scored_cu_seqlens.cpu().diff().view(self.size, -1).float()

        def loss(sign: tuple[float, ...]) -> float:
            logps = constants[place] + torch.tensor(sign)[:, None] * off * lengths.sqrt()
            return float(
                (batch.weights.cpu() * self.loss(Scores(logps, lengths), *constants)).sum()
            )

        exact = loss((0.0,) * self.size)
        signs = itertools.product((-1.0, 1.0), repeat=self.size)
        moved = max(abs(loss(sign) - exact) for sign in signs)
        return exact, moved + 1e-6 * abs(exact)
