"""The forward pass that is bound on a loaded model: from a batch to its losses, or to scores.

One engine forward per backward: a packed row goes through the backbone once, the LM head sees only
the rows that predict scored target tokens and computes the loss in there, and the dominant rows are
pooled in fp32. The forward is bound on the Hugging Face instance and the loss on its `lm_head`
module, so that checkpoint keys stay as they are and ZeRO-3's hooks gather the head's weight for
exactly one call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from mpo.loss_config import LossConfig
from mpo.models import attention
from mpo.models.packing import Batch, PackedSequences
from mpo_kernels import (
    MPOLossOutput,
    SequenceLossOutput,
    linear_mpo_loss,
    linear_sequence_loss,
    linear_token_logprobs,
    mean_pool,
    mpo_loss,
    retention_loss,
    sequence_loss,
)
from mpo_kernels.losses import MPO
from mpo_kernels.ops.transfer import on_device


class Outputs(NamedTuple):
    """Sums over the groups of one micro-batch; the trainer divides by the number of rows of the
    whole step."""

    loss: torch.Tensor  # () of weight * (loss's own value + retention_weight * L2), differentiable
    l1: torch.Tensor  # () float32, detached: of weight * loss's own value, which is L1 for MPO
    l2: torch.Tensor  # () float32, detached: of weight * L2
    # (P,) float32, detached; of groups of one sequence its mean log-probability
    reward_gap: torch.Tensor


class SequenceScores(NamedTuple):
    """What the reference store and the evaluation keep of a sequence."""

    mean_logp: torch.Tensor  # (S,) float32: log-probability per token of the response
    pooled: torch.Tensor  # (S, D) float32


def bind_mpo_forward(model: PreTrainedModel, loss: LossConfig) -> PreTrainedModel:
    """Replaces `forward` of this instance and of its LM head. Calls take one keyword:

    model(batch=Batch) -> Outputs                    losses of a micro-batch, differentiable
    model(batch=PackedSequences) -> SequenceScores   of sequences; call it under no_grad
    """
    bound = _Forward(model, loss)
    model.forward = bound.forward
    model.lm_head.forward = bound.head
    return model


class _Forward:
    """What a model computes of packed sequences."""

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        self._model, self._config, self._loss = model, loss, loss.build()
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._takes_documents = model.config._attn_implementation == attention.NAME

    def forward(self, *, batch: Batch | PackedSequences) -> Outputs | SequenceScores:
        """In the place of the model's own."""
        return self._losses(batch) if isinstance(batch, Batch) else self._scores(batch)

    def head(
        self, hidden: torch.Tensor, packed: PackedSequences, batch: Batch | None = None
    ) -> torch.Tensor | MPOLossOutput | SequenceLossOutput:
        """In the place of the head's: hidden (N, D) -> (M,) log-probabilities of what its scored
        rows predict; with `batch` the loss of its groups, summed with their weights."""
        weight, bias = self._model.lm_head.weight, self._model.lm_head.bias
        if batch is None:
            return linear_token_logprobs(
                hidden,
                weight,
                packed.labels,
                bias=bias,
                rows=packed.scored_rows,
                chunk_bytes=self._config.chunk_bytes,
                softcap=self._softcap,
            )
        if self._config.head == "logits":
            return self._loss_of_logits(hidden, weight, bias, batch)
        options = {
            "bias": bias,
            "rows": packed.scored_rows,
            "chunk_bytes": self._config.chunk_bytes,
            **self._options(packed),
        }
        if isinstance(self._loss, MPO):
            return linear_mpo_loss(hidden, weight, packed.labels, **self._pairs(batch), **options)
        return linear_sequence_loss(
            hidden,
            weight,
            packed.labels,
            self._loss,
            *batch.constants,
            weights=batch.weights,
            **options,
        )

    def _loss_of_logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, batch: Batch
    ) -> MPOLossOutput | SequenceLossOutput:
        packed = batch.packed
        rows = on_device(packed.scored_rows, hidden.device)
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)  # (M, V)
        labels = on_device(packed.labels, logits.device)
        options = {"inplace_backward": logits.requires_grad, **self._options(packed)}
        if isinstance(self._loss, MPO):
            return mpo_loss(logits, labels, **self._pairs(batch), **options)
        return sequence_loss(
            logits, labels, self._loss, *batch.constants, weights=batch.weights, **options
        )

    def _options(self, packed: PackedSequences) -> dict[str, Any]:
        # A sum, not a loss per group: a group's coefficient is then known in the forward pass, and
        # the head takes three products, not four.
        return {
            "cu_seqlens": packed.scored_cu_seqlens,
            "reduction": "sum",
            "softcap": self._softcap,
        }

    def _pairs(self, batch: Batch) -> dict[str, Any]:
        """What MPO's own kernel takes for them."""
        (reference_gap,) = batch.constants
        return {
            "reference_gap": reference_gap,
            "pair_weights": batch.weights,
            "beta": self._loss.beta,
        }

    def _losses(self, batch: Batch) -> Outputs:
        packed = batch.packed
        hidden = self._hidden_states(packed)
        target = self._model.lm_head(hidden, packed, batch)
        l2 = hidden.new_zeros((), dtype=torch.float32)
        if packed.pooled_rows.numel():  # its shape, which the host knows
            l2 = retention_loss(
                hidden[packed.pooled_rows],
                batch.pooled_reference,
                cu_seqlens=packed.pooled_cu_seqlens,
                sequence_weights=batch.pooled_weights,
                reduction="sum",
            )
        total = self._config.total(target.loss, l2)
        return Outputs(total, target.loss.detach(), l2.detach(), _reward_gap(target))

    def _scores(self, packed: PackedSequences) -> SequenceScores:
        hidden = self._hidden_states(packed)
        logps = self._model.lm_head(hidden, packed)
        # The mean log-probability of a response is the mean of its rows, which is what pooling a
        # column computes.
        mean_logp = mean_pool(logps[:, None], cu_seqlens=packed.scored_cu_seqlens)[:, 0]
        pooled = mean_pool(hidden[packed.pooled_rows], cu_seqlens=packed.pooled_cu_seqlens)
        return SequenceScores(mean_logp, pooled)

    def _hidden_states(self, packed: PackedSequences) -> torch.Tensor:
        """(N, D), after the final norm."""
        outputs = self._model.model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=None,
            use_cache=False,
            **({"documents": packed.documents} if self._takes_documents else {}),
        )
        return outputs.last_hidden_state[0]


def _reward_gap(target: MPOLossOutput | SequenceLossOutput) -> torch.Tensor:
    """(P,) of pairs; of single sequences their mean log-probability; detached."""
    if isinstance(target, MPOLossOutput):
        return target.reward_gap
    first, *others = target.scores.means()
    return first - others[0] if others else first
