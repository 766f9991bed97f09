"""Metrics of one optimizer step, summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpo.config import LossConfig
from mpo.models.forward import Outputs
from mpo.models.packing import Batch
from mpo.runtime.ranks import summed

_L1, _L2, _TOKENS, _PADDED, _STOP, _FIRST_LANGUAGE = range(6)


class StepSums:
    """Collects this rank's micro-batches of a step. Nothing is read back from the device before
    `reduce`."""

    def __init__(self, languages: Sequence[str]) -> None:
        self._languages = languages
        self._parts: list[tuple[Batch, Outputs]] = []

    def add(self, batch: Batch, output: Outputs) -> None:
        """Keeps the numbers of a micro-batch, and nothing of its graph."""
        self._parts.append((batch, output._replace(loss=output.loss.detach())))

    def reduce(self, stop_requested: bool, device: torch.device) -> StepTotals:
        """Sums over all ranks in one collective; its read-back is the step's only wait for the
        device."""
        sums = torch.zeros(_FIRST_LANGUAGE + 2 * len(self._languages), dtype=torch.float64)
        sums[_STOP] = float(stop_requested)
        for batch, output in self._parts:
            sums[_L1] += output.l1.double().cpu()
            sums[_L2] += output.l2.double().cpu()
            sums[_TOKENS] += batch.packed.input_ids.numel()
            sums[_PADDED] += batch.packed.padded_tokens()
            gaps, weights = output.reward_gap.tolist(), batch.pair_weights.tolist()
            for language, gap, weight in zip(batch.languages, gaps, weights, strict=True):
                if weight:  # a filler is of no language
                    place = _FIRST_LANGUAGE + 2 * self._languages.index(language)
                    sums[place] += gap * weight
                    sums[place + 1] += weight
        return StepTotals(self._languages, summed(sums, device).tolist())


@dataclass(frozen=True)
class StepTotals:
    """Sums over the pairs of one step, the same on every rank."""

    languages: Sequence[str]
    sums: Sequence[float]

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.sums[_STOP] > 0

    def means(self, pairs: int, loss: LossConfig) -> dict[str, Any]:
        """Loss, L1 and L2 per pair, the mean reward gap per language in nats per token, and the
        packed tokens of the step.

        None of these is padding; `padding_avoided` is the share of it that the same micro-batches
        would have as rectangles.
        """
        l1, l2 = self.sums[_L1] / pairs, self.sums[_L2] / pairs
        by_language = self.sums[_FIRST_LANGUAGE:]
        gaps = {
            language: total / count
            for language, total, count in zip(
                self.languages, by_language[::2], by_language[1::2], strict=True
            )
            if count
        }
        return {
            "loss": loss.total(l1, l2),
            "l1": l1,
            "l2": l2,
            "gap": gaps,
            **self._tokens(),
        }

    def _tokens(self) -> dict[str, Any]:
        tokens = int(self.sums[_TOKENS])
        return {
            "tokens": tokens,
            "padding_avoided": (
                round(1 - tokens / self.sums[_PADDED], 4) if self.sums[_PADDED] else 0.0
            ),
        }
