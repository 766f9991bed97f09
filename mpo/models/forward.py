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

from mpo.config import LossConfig
from mpo.models import attention
from mpo.models.packing import Batch, PackedSequences
from mpo_kernels import (
    MPOLossOutput,
    linear_mpo_loss,
    linear_token_logprobs,
    mean_pool,
    mpo_loss,
    retention_loss,
)


class Outputs(NamedTuple):
    """Sums over the pairs of one micro-batch; the trainer divides by the number of pairs of the
    whole step."""

    loss: torch.Tensor  # () of weight * (L1 + retention_weight * L2), differentiable
    l1: torch.Tensor  # () float32, detached: of weight * (beta * RG - RG_reference)^2
    l2: torch.Tensor  # () float32, detached: of weight * L2
    reward_gap: torch.Tensor  # (P,) float32, detached


class Scores(NamedTuple):
    """What the reference store and the evaluation keep of a sequence."""

    mean_logp: torch.Tensor  # (S,) float32: log-probability per token of the response
    pooled: torch.Tensor  # (S, D) float32


def bind_mpo_forward(model: PreTrainedModel, loss: LossConfig) -> PreTrainedModel:
    """Replaces `forward` of this instance and of its LM head. Calls take one keyword:

    model(batch=Batch) -> Outputs            losses of a micro-batch, differentiable
    model(batch=PackedSequences) -> Scores   of sequences; call it under no_grad
    """
    bound = _Forward(model, loss)
    model.forward = bound.forward
    model.lm_head.forward = bound.head
    return model


class _Forward:
    """What a model computes of packed sequences."""

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        self._model, self._loss = model, loss
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._takes_documents = model.config._attn_implementation == attention.NAME

    def forward(self, *, batch: Batch | PackedSequences) -> Outputs | Scores:
        """In the place of the model's own."""
        return self._losses(batch) if isinstance(batch, Batch) else self._scores(batch)

    def head(
        self, hidden: torch.Tensor, packed: PackedSequences, pairs: dict[str, Any] | None = None
    ) -> torch.Tensor | MPOLossOutput:
        """In the place of the head's: hidden (N, D) -> (M,) log-probabilities of what its scored
        rows predict; with `pairs` the L1 of the pairs, summed with their weights."""
        weight, bias = self._model.lm_head.weight, self._model.lm_head.bias
        if pairs is None:
            return linear_token_logprobs(
                hidden,
                weight,
                packed.labels,
                bias=bias,
                rows=packed.scored_rows,
                chunk_bytes=self._loss.chunk_bytes,
                softcap=self._softcap,
            )
        # A sum, not a loss per pair: a pair's coefficient is then known in the forward pass, and
        # the head takes three products, not four.
        options = dict(
            pairs,
            beta=self._loss.beta,
            cu_seqlens=packed.scored_cu_seqlens,
            reduction="sum",
            softcap=self._softcap,
        )
        if self._loss.head == "logits":
            rows = packed.scored_rows.to(hidden.device, non_blocking=True)
            logits = torch.nn.functional.linear(hidden[rows], weight, bias)  # (M, V)
            labels = packed.labels.to(logits.device, non_blocking=True)
            return mpo_loss(logits, labels, inplace_backward=logits.requires_grad, **options)
        return linear_mpo_loss(
            hidden,
            weight,
            packed.labels,
            bias=bias,
            rows=packed.scored_rows,
            chunk_bytes=self._loss.chunk_bytes,
            **options,
        )

    def _losses(self, batch: Batch) -> Outputs:
        packed = batch.packed
        hidden = self._hidden_states(packed)
        pairs = {"reference_gap": batch.reference_gap, "pair_weights": batch.pair_weights}
        target = self._model.lm_head(hidden, packed, pairs)
        l2 = hidden.new_zeros((), dtype=torch.float32)
        if packed.pooled_rows.numel():  # its shape, which the host knows
            l2 = retention_loss(
                hidden[packed.pooled_rows],
                batch.pooled_reference,
                cu_seqlens=packed.pooled_cu_seqlens,
                sequence_weights=batch.pooled_weights,
                reduction="sum",
            )
        total = self._loss.total(target.loss, l2)
        return Outputs(total, target.loss.detach(), l2.detach(), target.reward_gap)

    def _scores(self, packed: PackedSequences) -> Scores:
        hidden = self._hidden_states(packed)
        logps = self._model.lm_head(hidden, packed)
        # The mean log-probability of a response is the mean of its rows, which is what pooling a
        # column computes.
        mean_logp = mean_pool(logps[:, None], cu_seqlens=packed.scored_cu_seqlens)[:, 0]
        pooled = mean_pool(hidden[packed.pooled_rows], cu_seqlens=packed.pooled_cu_seqlens)
        return Scores(mean_logp, pooled)

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
