"""From tokenised sequences to one packed row, which the model takes.

Everything here is host-side integers: which positions are scored and pooled is known before the
tensors reach the device, so the forward pass never waits for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mpo.data.examples import TokenizedResponse
from mpo.models.documents import Document, Documents, moved, offsets

Pool = Literal["response", "all"]

FILLER = TokenizedResponse((0, 0), 1)
"""Both answers of a pair with weight 0, for a forward pass that has no pair of its own but must
make the same calls as the other ranks'."""


@dataclass(frozen=True)
class PackedSequences:
    """S sequences in one row of N tokens, M of which are scored.

    A scored token is predicted by the hidden state of the token before it in its sequence; that is
    its row in `scored_rows`. Where responses share a prompt, the prompt lies in the row once, and
    its last row predicts the first token of each of them.
    """

    input_ids: torch.Tensor  # (1, N) int64
    position_ids: torch.Tensor  # (1, N) int64, each token's place in its own sequence
    documents: Documents  # the prompts with their responses; sum N
    scored_rows: torch.Tensor  # (M,) int64 rows of the hidden states that predict a scored token
    labels: torch.Tensor  # (M,) int64 the tokens they predict
    # (S' + 1,) int32 offsets of each scored sequence in `scored_rows`
    scored_cu_seqlens: torch.Tensor
    pooled_rows: torch.Tensor  # (K,) int64 rows of the hidden states that are pooled
    # (S'' + 1,) int32 offsets of each pooled sequence in `pooled_rows`
    pooled_cu_seqlens: torch.Tensor

    def padded_tokens(self) -> int:
        """Tokens of the same sequences as a rectangle: each with its own prompt, all as long as the
        longest."""
        lengths = [
            prompt + response
            for prompt, *responses in self.documents.lengths
            for response in responses
        ]
        return max(lengths) * len(lengths)

    def to(self, device: torch.device) -> PackedSequences:
        """On `device`, but for what is scored: the head plans its chunks from that, which must not
        wait for a GPU."""
        return moved(self, device, stay=("scored_rows", "labels", "scored_cu_seqlens"))


@dataclass(frozen=True)
class Batch:
    """P weighted groups of k sequences in one packed row, the first ones of all groups first, then
    distinct dominant sequences.

    Sequences of groups are scored, dominant ones pooled. A dominant sequence that rows of the step
    share is in one batch of the step only.
    """

    packed: PackedSequences
    # what the loss takes beside the scores, (P,) or (k, P) float32 each
    constants: tuple[torch.Tensor, ...]
    weights: torch.Tensor  # (P,) float32, 0 for a filler
    pooled_reference: torch.Tensor  # (S'', D) float32
    # (S'',) float32: share of each sequence in the rows' L2, summed over rows
    pooled_weights: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return moved(self, device)


def pack(
    sequences: Sequence[TokenizedResponse],
    *,
    scored: Sequence[int],
    pooled: Sequence[int],
    pool: Pool = "response",
    share_prompts: bool,
) -> PackedSequences:
    """Packs `sequences` into one row.

    Args:
        scored: indices of the sequences whose responses go to the LM head, in the order of
            `scored_cu_seqlens`.
        pooled: indices of the sequences whose hidden states are averaged, in the order of
            `pooled_cu_seqlens`.
        pool: average the response's positions, or all of the sequence's.
        share_prompts: put a prompt that two sequences have into the row once; needs packed
            attention.
    """
    row = _lay_out(sequences, share_prompts)
    starts = [sequence.response_start for sequence in sequences]
    predicting = [row.places[i][starts[i] - 1 : -1] for i in scored]
    averaged = [row.places[i][starts[i] if pool == "response" else 0 :] for i in pooled]
    return PackedSequences(
        input_ids=torch.tensor([row.ids]),
        position_ids=torch.tensor([row.positions]),
        documents=Documents.of(row.documents),
        scored_rows=_concatenated(predicting),
        labels=_concatenated([sequences[i].input_ids[starts[i] :] for i in scored]),
        scored_cu_seqlens=offsets(map(len, predicting)),
        pooled_rows=_concatenated(averaged),
        pooled_cu_seqlens=offsets(map(len, averaged)),
    )


class _Row(NamedTuple):
    """Sequences behind each other, as integers."""

    ids: list[int]
    positions: list[int]
    documents: list[Document]
    places: dict[int, list[int]]
    """Of each sequence: where its tokens lie in the row."""


def _lay_out(sequences: Sequence[TokenizedResponse], share_prompts: bool) -> _Row:
    row = _Row([], [], [], {})
    for document in _documents(sequences, share_prompts):
        first = sequences[document[0]]
        start = first.response_start
        prompt = list(range(len(row.ids), len(row.ids) + start))
        row.ids.extend(first.input_ids[:start])
        row.positions.extend(range(start))
        responses = [sequences[i].input_ids[start:] for i in document]
        for i, response in zip(document, responses, strict=True):
            row.places[i] = prompt + list(range(len(row.ids), len(row.ids) + len(response)))
            row.ids.extend(response)
            row.positions.extend(range(start, start + len(response)))
        row.documents.append((start, *map(len, responses)))
    return row


def _documents(sequences: Sequence[TokenizedResponse], share_prompts: bool) -> list[list[int]]:
    """Indices of the sequences that lie behind one prompt.

    Two at most: a hidden state that three sequences read gets three gradients, whose sum depends on
    the order in which threads add them.
    """
    if not share_prompts:
        return [[i] for i in range(len(sequences))]
    documents: list[list[int]] = []
    waiting: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        prompt = sequence.input_ids[: sequence.response_start]
        if prompt in waiting:
            waiting.pop(prompt).append(i)
        else:
            documents.append([i])
            waiting[prompt] = documents[-1]
    return documents


def _concatenated(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=torch.int64)


def tokens_of(sequences: Sequence[TokenizedResponse], share_prompts: bool) -> int:
    """Tokens that `pack` makes of the sequences."""
    total = 0
    for first, *others in _documents(sequences, share_prompts):
        total += len(sequences[first].input_ids) + sum(
            len(sequences[i].input_ids) - sequences[i].response_start for i in others
        )
    return total


def pack_for_scoring(
    sequences: Sequence[TokenizedResponse], pool: Pool, share_prompts: bool
) -> PackedSequences:
    """Packs sequences that are all scored and all pooled: for the reference store and for
    evaluation."""
    every = range(len(sequences))
    return pack(sequences, scored=every, pooled=every, pool=pool, share_prompts=share_prompts)
