"""From rows of text to token ids with the position where the response begins.

The chat template's own ids are used as they are; no text is encoded twice, so no second BOS can appear. The prompt's ids must be a prefix
of the
whole conversation's ids. Scored are the response and the end-of-turn token, not what some templates write after it (a newline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mpo.config import DataConfig
from mpo.data import BadRow, Pair, Row, settle_bad_rows
from mpo.errors import UserError


@dataclass(frozen=True)
class TokenizedResponse:
    """A prompt with one response. Tokens at [response_start, len(input_ids)) are scored; response_start >= 1. Equal content is equal."""

    input_ids: tuple[int, ...]
    response_start: int


@dataclass(frozen=True)
class Example:
    """One training example: a target pair and its dominant pair."""

    source: str
    language: str
    target_chosen: TokenizedResponse
    target_rejected: TokenizedResponse
    dominant_chosen: TokenizedResponse
    dominant_rejected: TokenizedResponse

    def sequences(self) -> tuple[TokenizedResponse, ...]:
        """All four."""
        return self.target_chosen, self.target_rejected, self.dominant_chosen, self.dominant_rejected


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> tuple[list[Example], list[BadRow]]:
    """Applies the chat template and cuts to config.max_length.

    Returns:
        Examples, and the rows of which a response would lose all its tokens or that the template refuses (none of them where
        config.on_bad_row is "error").
    Raises:
        UserError: no chat template; a template whose prompt is no prefix of the conversation; bad rows under "error"; nothing left.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template. Use the instruction-tuned model, "
            "or save a template "
            "into the model folder as chat_template.jinja."
        )
    encoder = _Encoder(tokenizer, config.max_length)
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            examples.append(
                Example(
                    row.source, row.language, *encoder.encode_pair(row.target, "target"), *encoder.encode_pair(row.dominant, "dominant")
                )
            )
        except _Unusable as problem:
            bad.append(BadRow(row.source, problem.reason, problem.detail))
    settle_bad_rows(bad, len(examples), config.train, config.on_bad_row)
    return examples, bad


def decode_view(response: TokenizedResponse, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(prompt, scored text) with special tokens visible, for people who want to see what is trained on."""
    ids, start = list(response.input_ids), response.response_start
    return str(tokenizer.decode(ids[:start])), str(tokenizer.decode(ids[start:]))


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Encoder:
    """Encodes pairs, each distinct one once: the published data repeat every dominant pair six times."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._done: dict[Pair, tuple[TokenizedResponse, TokenizedResponse]] = {}

    def encode_pair(self, pair: Pair, side: str) -> tuple[TokenizedResponse, TokenizedResponse]:
        if pair not in self._done:
            self._done[pair] = (self._encode(pair, "chosen", side), self._encode(pair, "rejected", side))
        return self._done[pair]

    def _encode(self, pair: Pair, kind: str, side: str) -> TokenizedResponse:
        conversation = pair.conversation()
        prompt = self._ids(conversation, add_generation_prompt=True)
        whole = self._ids([*conversation, {"role": "assistant", "content": getattr(pair, kind)}], add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            at = len(prompt)
            raise UserError(
                "The chat template is not prefix-stable: the ids of a prompt are not the beginning of the ids of prompt and response, so "
                f"where the response begins is unknown. The prompt ends with {self._tokenizer.decode(prompt[-8:])!r}, the conversation has "
                f"{self._tokenizer.decode(whole[max(0, at - 8) : at])!r} there. Use a template whose generation prompt is what it writes "
                "before an answer."
            )
        end = self._end_of_turn(whole, len(prompt))
        cut = min(end, self._max_length)
        if cut <= len(prompt):
            raise _Unusable(
                "response_truncated_away",
                f"the {side} prompt has {len(prompt)} tokens, so none of the {end - len(prompt)} {kind} tokens is left at data.max_length "
                f"{self._max_length}; raise it or shorten the prompt",
            )
        return TokenizedResponse(tuple(whole[:cut]), len(prompt))

    def _ids(self, conversation: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                conversation, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise _Unusable("refused_by_template", f"the chat template refuses it: {error}") from error
        return list(encoded["input_ids"])

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Where scoring ends: behind the last special token if only white space follows it, else at the end of the ids."""
        for place in range(len(ids) - 1, start - 1, -1):
            if ids[place] in self._special:
                return place + 1 if not str(self._tokenizer.decode(ids[place + 1 :])).strip() else len(ids)
        return len(ids)
