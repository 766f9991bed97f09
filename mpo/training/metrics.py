"""Metrics of one optimizer step, summed over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpo.loss_config import LossConfig
from mpo.models.forward import Outputs
from mpo.models.packing import Batch
from mpo.runtime.ranks import summed
from mpo.training.micro_batches import MicroBatch

_L1, _L2, _TOKENS, _PADDED, _STOP, _FIRST_LANGUAGE = range(6)


class StepSums:
    """Collects this rank's micro-batches of a step. Nothing is read back from the device before
    `reduce`."""

    def __init__(self) -> None:
        self._parts: list[tuple[MicroBatch, Batch, Outputs]] = []

    def add(self, part: MicroBatch, batch: Batch, output: Outputs) -> None:
        """Keeps the numbers of a micro-batch, and nothing of its graph."""
        self._parts.append((part, batch, output._replace(loss=output.loss.detach())))

    def reduce(
        self, stop_requested: bool, languages: Sequence[str], device: torch.device
    ) -> StepTotals:
        """Sums over all ranks in one collective; its read-back is the step's only wait for the
        device. Single answers have a gap where both of a pair are in the loss."""
        sums = torch.zeros(_FIRST_LANGUAGE + 2 * len(languages), dtype=torch.float64)
        sums[_STOP] = float(stop_requested)
        for part, batch, output in self._parts:
            sums[_L1] += output.l1.double().cpu()
            sums[_L2] += output.l2.double().cpu()
            sums[_TOKENS] += batch.packed.input_ids.numel()
            sums[_PADDED] += batch.packed.padded_tokens()
            # a filler is of no group
            for group, gap in zip(part.groups, output.reward_gap.tolist(), strict=False):
                if group.is_target:
                    place = _FIRST_LANGUAGE + 2 * languages.index(group.example.language)
                    sign, pairs = group.share_of_gap
                    sums[place] += sign * gap
                    sums[place + 1] += pairs
        l1, l2, tokens, padded, stops, *by_language = summed(sums, device).tolist()
        counted = zip(languages, by_language[::2], by_language[1::2], strict=True)
        return StepTotals(
            l1=l1,
            l2=l2,
            gap={language: total / count for language, total, count in counted if count},
            tokens=int(tokens),
            padded_tokens=int(padded),
            stop_requested=stops > 0,
        )


@dataclass(frozen=True)
class StepTotals:
    """Of all rows of one step, the same on every rank."""

    l1: float
    """The loss's own value, summed over the rows."""
    l2: float
    """Sum over the rows; 0 where no dominant pair goes through the model."""
    gap: Mapping[str, float]
    """Mean reward gap of each language that the step has, in nats per token. Empty where the loss
    sees chosen answers alone."""
    tokens: int
    """Packed; none of them is padding."""
    padded_tokens: int
    """What the same micro-batches would have as rectangles."""
    stop_requested: bool
    """Whether any rank was asked to stop."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    step: int
    """Steps done, this one among them."""
    epoch: float
    """Passes over the rows that are done."""
    pairs: int
    totals: StepTotals
    kl: float | None
    """Mean log-ratio of the step's answers to other prompts, at least 0; None where the loss takes
    none."""
    objective: LossConfig
    """Which knows the loss of its own value and L2."""
    learning_rate: float
    grad_norm: float | None
    """Before clipping; None where DeepSpeed does not tell."""
    skipped: bool
    """Whether the weights stayed as they were, because a gradient was not finite."""
    seconds: float
    peak_memory_gib: float

    @property
    def l1(self) -> float:
        """The loss's own value per row: L1 for MPO."""
        return self.totals.l1 / self.pairs

    @property
    def l2(self) -> float | None:
        """Per row; None where no dominant pair goes through the model."""
        return self.totals.l2 / self.pairs if self.objective.pools_dominant else None

    @property
    def loss(self) -> float:
        """Per row."""
        return self.objective.total(self.l1, self.l2 or 0.0)

    @property
    def padding_avoided(self) -> float:
        """The share of padding that the same micro-batches would have as rectangles."""
        padded = self.totals.padded_tokens
        return round(1 - self.totals.tokens / padded, 4) if padded else 0.0

    def as_row(self) -> dict[str, Any]:
        """A line of `metrics.jsonl`."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "pairs": self.pairs,
            "loss_name": self.objective.name,
            "loss": self.loss,
            "l1": self.l1,
            "l2": self.l2,
            **({} if self.kl is None else {"kl": self.kl}),
            "gap": dict(self.totals.gap),
            "tokens": self.totals.tokens,
            "padding_avoided": self.padding_avoided,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "tokens_per_second": round(self.totals.tokens / self.seconds, 1),
            "peak_memory_gib": self.peak_memory_gib,
        }

    def in_words(self) -> list[str]:
        """For people, the most important first: a narrow terminal shows as many as fit."""
        gaps = [f"{language} {gap:+.2f}" for language, gap in self.totals.gap.items()]
        label = self.objective.label
        return [
            f"loss {self.loss:.4f}",
            *(["SKIPPED: non-finite gradients"] if self.skipped else []),
            *([] if self.kl is None else [f"KL {self.kl:.3f}"]),
            *([] if self.l2 is None else [f"{label} {self.l1:.4f}", f"L2 {self.l2:.2e}"]),
            f"{self.pairs / self.seconds:.2f} pairs/s",
            *([f"gap {gaps[0]}", *gaps[1:]] if gaps else []),
        ]
