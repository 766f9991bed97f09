"""Scores of sequences without gradients: what the reference store keeps and what the evaluation
reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import deepspeed.comm as dist
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mpo.data.examples import Example, TokenizedResponse
from mpo.models.attention import shares_prompts_of
from mpo.models.forward import SequenceScores
from mpo.models.packing import PackedSequences, Pool, pack_for_scoring
from mpo.runtime.files import new_folder
from mpo.runtime.ranks import summed

TOKENS_PER_BATCH = 4096
"""Packed tokens of one forward pass without gradients. It bounds memory; the scores do not depend
on the number of ranks."""
MEASURED = "gaps.safetensors"
"""The file of a measurement that is kept."""


@dataclass(frozen=True)
class Measurement:
    """What a model makes of R measured examples: their reward gaps, and the pooled hidden states of
    their dominant sequences."""

    target: torch.Tensor  # (R,) float32
    dominant: torch.Tensor  # (R,) float32
    pooled: torch.Tensor  # (R, 2, D) float32: dominant chosen, dominant rejected

    def save(self, folder: Path) -> None:
        """Keeps it in a folder of its own. Raises UserError where that cannot be written."""
        with new_folder(folder) as temporary:
            save_file(
                {name: value.contiguous() for name, value in vars(self).items()},
                temporary / MEASURED,
            )

    @classmethod
    def load(cls, folder: Path, rows: int) -> Measurement | None:
        """The kept measurement of so many examples, or None where there is none that is whole."""
        try:
            kept = cls(**load_file(folder / MEASURED))
        except (OSError, SafetensorError, ValueError, TypeError):
            return None
        fits = (
            kept.target.shape == kept.dominant.shape == (rows,)
            and kept.pooled.ndim == 3
            and kept.pooled.shape[:2] == (rows, 2)
        )
        return kept if fits else None

    @property
    def is_finite(self) -> bool:
        """Whether all of it is numbers."""
        return all(bool(torch.isfinite(value).all()) for value in vars(self).values())


def sign_accuracy(gaps: torch.Tensor) -> float:
    """Share of gaps (R,) above 0; NaN where one is NaN, which is neither."""
    return float(torch.where(gaps.isnan(), gaps, (gaps > 0).to(gaps.dtype)).mean())


@dataclass(frozen=True)
class Scorer:
    """A model that scores sequences without gradients.

        scorer = Scorer(engine, "response", device)
        scorer.measure(examples).target.mean()

    Under ZeRO-3 a forward pass is a collective, so both methods are called by all ranks.
    """

    engine: torch.nn.Module
    """A bound model, or the DeepSpeed engine around one."""
    pool: Pool
    device: torch.device

    @property
    def model(self) -> PreTrainedModel:
        """The bound model."""
        return cast(PreTrainedModel, getattr(self.engine, "module", self.engine))

    def pack(self, sequences: Sequence[TokenizedResponse]) -> PackedSequences:
        """Sequences in one row on the model's device, all of them scored and pooled."""
        share_prompts = shares_prompts_of(self.model)
        return pack_for_scoring(sequences, self.pool, share_prompts).to(self.device)

    def scores(
        self,
        sequences: Sequence[TokenizedResponse],
        advance: Callable[[int], None] = lambda count: None,
        *,
        pools: bool = True,
    ) -> SequenceScores:
        """Mean log-probability and pooled hidden state of each sequence, on the CPU in fp32, on
        every rank.

        The ranks share the work: rank r takes every world-th batch, and all run the same number of
        passes.

        Args:
            advance: called with the number of sequences done since its last call.
            pools: whether the pooled states are wanted; else they stay on the device, and the
                result has (S, 0) of them.
        """
        batches = _batches(sequences)
        rank, world = dist.get_rank(), dist.get_world_size()
        mean_logp = torch.zeros(len(sequences))
        pooled: torch.Tensor | None = None
        was_training = self.engine.training
        self.engine.eval()
        for start in range(0, len(batches), world):
            mine = batches[min(start + rank, len(batches) - 1)]
            with torch.no_grad():
                scores = self.engine(batch=self.pack([sequences[i] for i in mine]))
            if pooled is None:
                pooled = torch.zeros(len(sequences), scores.pooled.shape[1] if pools else 0)
            # a rank without a batch of its own repeats the last one and drops the result
            if start + rank < len(batches):
                mean_logp[mine] = scores.mean_logp.float().cpu()
                if pools:
                    pooled[mine] = scores.pooled.float().cpu()
            advance(sum(len(batch) for batch in batches[start : start + world]))
        self.engine.train(was_training)
        assert pooled is not None, "there is at least one sequence"
        # each row is non-zero on one rank only, so the sums are exact
        mean_logp = summed(mean_logp, self.device)
        return SequenceScores(mean_logp, summed(pooled, self.device) if pools else pooled)

    def measure(
        self, examples: Sequence[Example], advance: Callable[[int], None] = lambda count: None
    ) -> Measurement:
        """Reward gap of the target and of the dominant pair of each example. Sequences that
        examples share are scored once."""
        unique = distinct_sequences(examples)
        place = {sequence: i for i, sequence in enumerate(unique)}
        scores = self.scores(unique, advance)

        def gap(pairs: torch.Tensor) -> torch.Tensor:
            chosen, rejected = scores.mean_logp[pairs].unbind(1)
            return chosen - rejected

        target, dominant = (
            torch.tensor([[place[sequence] for sequence in pair] for pair in pairs])
            for pairs in ([e.target for e in examples], [e.dominant for e in examples])
        )
        return Measurement(
            target=gap(target), dominant=gap(dominant), pooled=scores.pooled[dominant]
        )


def distinct_sequences(examples: Sequence[Example]) -> list[TokenizedResponse]:
    """All sequences of the examples, each once, in order of appearance."""
    return list(dict.fromkeys(sequence for e in examples for sequence in e.sequences()))


def _batches(sequences: Sequence[TokenizedResponse]) -> list[list[int]]:
    """Indices in batches of about TOKENS_PER_BATCH tokens, whatever the number of ranks: answers to
    one prompt together, similar lengths next to each other."""
    answers: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        answers.setdefault(sequence.input_ids[: sequence.response_start], []).append(i)
    batches: list[list[int]] = []
    tokens = TOKENS_PER_BATCH
    for together in sorted(
        answers.values(), key=lambda together: max(len(sequences[i].input_ids) for i in together)
    ):
        for i in together:
            length = len(sequences[i].input_ids)
            if tokens + length > TOKENS_PER_BATCH:
                batches.append([])
                tokens = 0
            batches[-1].append(i)
            tokens += length
    return batches
