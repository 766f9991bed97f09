"""From rows of text to token ids with the position where the response begins.

What a template writes around an answer is learned by rendering another answer in its place: so the
answer's own place in the text is known, whatever stands before and behind it (an empty think block,
an end of turn). The whole conversation is encoded once, so no second BOS can appear. Scored are the
answer's tokens and its end of turn, up to the first special token behind it; nothing that the
template adds before the answer, and not what it writes after the end (a newline).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mpo.config import DataConfig
from mpo.data.rows import Finding, Pair, Row, settle_bad_rows
from mpo.data.run_date import dated
from mpo.runtime.errors import UserError

NOT_PREFIX_STABLE = "template_not_prefix_stable"


@dataclass(frozen=True)
class TokenizedResponse:
    """A prompt with one response. Tokens at [response_start, len(input_ids)) are scored;
    response_start >= 1. Equal content is equal."""

    input_ids: tuple[int, ...]
    response_start: int


class Answers(NamedTuple):
    """A prompt with its safe and its unsafe answer, as tokens. Iterates as chosen, rejected."""

    chosen: TokenizedResponse
    rejected: TokenizedResponse


@dataclass(frozen=True)
class Example:
    """One training example: a row, and both of its pairs as tokens."""

    row: Row
    dominant: Answers
    target: Answers

    @property
    def source(self) -> str:
        """Where the row came from, for messages."""
        return self.row.source

    @property
    def language(self) -> str:
        """Of the target pair."""
        return self.row.language

    def sequences(self) -> tuple[TokenizedResponse, ...]:
        """All four: target chosen, target rejected, dominant chosen, dominant rejected."""
        return (*self.target, *self.dominant)


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[Example], list[Finding]]:
    """Applies the chat template and cuts to config.max_length.

    Returns:
        Examples, and the rows that cannot be trained on as tokens (none of them where
        config.on_bad_row is "error"): a response would lose all its tokens, or its first one is
        joined with the template's text; both answers are the same tokens; or the template refuses
        the conversation, leaves the answer out or rewrites it.
    Raises:
        UserError: no chat template; a template that begins every answer otherwise than its
            generation prompt; bad rows under "error"; nothing left.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template. Use"
            " the instruction-tuned model, or save a template into the model folder as"
            " chat_template.jinja."
        )
    encoder = _Encoder(tokenizer, config)
    examples: list[Example] = []
    bad: list[Finding] = []
    for row in rows:
        try:
            target = encoder.encode_pair(row.target, "target")
            examples.append(Example(row, encoder.encode_pair(row.dominant, "dominant"), target))
        except _Unusable as problem:
            bad.append(Finding(row.source, problem.reason, problem.detail))
    if bad and not examples and {row.reason for row in bad} == {NOT_PREFIX_STABLE}:
        # its doing, not the rows'
        raise UserError(f"The chat template is not prefix-stable: {bad[0].detail}")
    settle_bad_rows(bad, len(examples), config.train, config.on_bad_row)
    return examples, bad


def decode_view(response: TokenizedResponse, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(prompt, scored text) with special tokens visible, for people who want to see what is trained
    on."""
    ids, start = list(response.input_ids), response.response_start
    return decode(ids[:start], tokenizer), decode(ids[start:], tokenizer)


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens as they are: special ones visible, no space taken away."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that control a model, such as the end of a turn."""
    return frozenset(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def remarks(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """(reason, detail) of what chat template and tokenizer made of the texts, where what is trained
    on is not what was written."""
    special = special_ids(tokenizer)
    row = example.row
    for side, pair, answers in (
        ("dominant", row.dominant, example.dominant),
        ("target", row.target, example.target),
    ):
        for text in pair.texts():
            held = [
                token
                for token in tokenizer(text, add_special_tokens=False)["input_ids"]
                if token in special
            ]
            if held:
                yield (
                    "special_token",
                    (
                        f"a {side} text holds {decode(held[:1], tokenizer)!r}, which the model"
                        " reads as a control token"
                    ),
                )
        prompt = _bare(decode_view(answers.chosen, tokenizer)[0])
        for message in pair.prompt:
            if _bare(message.content) not in prompt:
                yield (
                    "left_out_by_template",
                    (
                        f"the {side} {message.role} message is not in what the model sees, or not"
                        " as it was written"
                    ),
                )
        for kind, written, response in (
            ("chosen", pair.chosen, answers.chosen),
            ("rejected", pair.rejected, answers.rejected),
        ):
            answer, scored = _bare(written), _bare(decode_view(response, tokenizer)[1])
            # data.max_length may cut through a letter, or between a letter and its marks
            beginning = scored.split("\ufffd")[0][:-4]
            if not scored.startswith(answer) and not answer.startswith(beginning):
                yield (
                    "scored_differs",
                    (
                        f"scored of the {side} {kind} answer is {scored[:60]!r}: the tokenizer"
                        " cannot write it"
                    ),
                )


def _bare(text: str) -> str:
    """A text without what tokenizers may take away from it: white space, and other ways to write
    the same letter."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


_PROBE = "739184620551739184620"
"""Rendered in place of an answer, to see what the template writes around one."""


@dataclass(frozen=True)
class _Frame:
    """What a template writes around an answer of one conversation."""

    asked: str
    """The conversation with the generation prompt: what the model sees when it is used."""
    before: str
    """All that stands before an answer: `asked`, and what some templates add to it."""
    behind: str

    def place_of(self, answer: str, text: str) -> str | None:
        """What stands before the answer in a rendered conversation; None where something else than
        the answer stands there.

        White space around an answer may have been stripped. An answer may bring its own of what the
        template else adds (a think block).
        """
        for before in (self.before, self.asked):
            found = text[len(before) : len(text) - len(self.behind)]
            if (
                text.startswith(before)
                and text.endswith(self.behind)
                and found.strip() == answer.strip()
            ):
                return before
        return None


class _Encoder:
    """Encodes pairs, each distinct one once: the published data repeat every dominant pair six
    times."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._tokenizer, self._max_length = tokenizer, config.max_length
        self._template = dated(tokenizer.get_chat_template(), config.date or datetime.now())
        self._special = special_ids(tokenizer)
        self._done: dict[Pair, Answers] = {}

    def encode_pair(self, pair: Pair, side: str) -> Answers:
        if pair not in self._done:
            frame = self._frame_of(pair)
            self._done[pair] = Answers(
                self._encode(pair, "chosen", side, frame),
                self._encode(pair, "rejected", side, frame),
            )
        answers = self._done[pair]
        if answers.chosen == answers.rejected:
            count = len(answers.chosen.input_ids) - answers.chosen.response_start
            raise _Unusable(
                "chosen_equals_rejected",
                f"the {side} pair has no gap: both answers are the same {count} tokens after the"
                f" chat template and data.max_length {self._max_length}",
            )
        return answers

    def _frame_of(self, pair: Pair) -> _Frame:
        conversation = pair.conversation()
        asked = self._rendered(conversation, add_generation_prompt=True)
        before, found, behind = self._rendered([*conversation, _answer(_PROBE)]).rpartition(_PROBE)
        if not found:
            raise _Unusable(
                "answer_rewritten", "the chat template leaves the answer of this conversation out"
            )
        if not before.startswith(asked):
            raise _Unusable(
                NOT_PREFIX_STABLE,
                "its generation prompt is no beginning of what it writes before an answer, so a"
                " model would be trained behind another prompt than it is asked with. The prompt"
                f" ends with {asked[-40:]!r}, the conversation has"
                f" {before[max(0, len(asked) - 40) :]!r} there. Use a template whose generation"
                " prompt is what it writes before an answer.",
            )
        return _Frame(asked, before, behind)

    def _encode(self, pair: Pair, kind: str, side: str, frame: _Frame) -> TokenizedResponse:
        answer = str(getattr(pair, kind))
        text = self._rendered([*pair.conversation(), _answer(answer)])
        before = frame.place_of(answer, text)
        if before is None:
            raise _Unusable(
                "answer_rewritten",
                f"the chat template writes something else than the {side} {kind} answer:"
                f" {text[-80:]!r}",
            )
        split = self._split(text, before, frame)
        if split is None:
            raise _Unusable(
                "answer_joined_with_template",
                f"the {side} {kind} answer begins with {answer[:12]!r}, which the tokenizer joins"
                f" with the template's {before[-12:]!r}, so it cannot be scored alone; take off"
                " white space at its beginning, or use a template that ends otherwise",
            )
        prompt, response = split
        response = response[: self._end(response, frame.behind)]
        left = response[: max(0, self._max_length - len(prompt))]
        if not left:
            raise _Unusable(
                "response_truncated_away",
                f"the {side} prompt has {len(prompt)} tokens, so none of the {len(response)} {kind}"
                f" tokens is left at data.max_length {self._max_length}; raise it or shorten the"
                " prompt",
            )
        return TokenizedResponse((*prompt, *left), len(prompt))

    def _split(self, text: str, before: str, frame: _Frame) -> tuple[list[int], list[int]] | None:
        """Tokens of the prompt, and of the answer with what stands behind it; None where one token
        belongs to both.

        White space that a template adds to its generation prompt may be in the answer's first
        token, as the model writes it. Where the prompt has other tokens alone than before an
        answer, it gets those that it has alone: those it is asked with.
        """
        ids = self._ids(text)
        for prompt in (before, frame.asked):
            alone = self._ids(prompt)
            if (
                before.startswith(prompt)
                and not before[len(prompt) :].strip()
                and ids[: len(alone)] == alone
            ):
                return alone, ids[len(alone) :]
        prompt_ids, rest = self._ids(before), self._ids(text[len(before) :])
        place = len(ids) - len(rest)
        told_apart = ids[place:] == rest and decode(ids[:place], self._tokenizer) == decode(
            prompt_ids, self._tokenizer
        )
        return (prompt_ids, rest) if told_apart else None

    def _end(self, response: list[int], behind: str) -> int:
        """Where scoring ends: behind the first special token after the answer, or at the end of the
        ids where there is none.

        Counted from the end, since the answer may hold special tokens itself.
        """
        count = sum(token in self._special for token in self._ids(behind))
        places = [place for place, token in enumerate(response) if token in self._special]
        return places[-count] + 1 if count else len(response)

    def _rendered(
        self, conversation: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return str(text)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise _Unusable(
                "refused_by_template", f"the chat template refuses it: {error}"
            ) from error

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self._tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
