"""Examples: rows as the token ids that a model is trained on. It opens no model; the tokenizer is
given."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from mpo.config import DataConfig
from mpo.data.chat_template import (
    NOT_PREFIX_STABLE,
    ChatTemplate,
    Frame,
    Unusable,
    decode,
    special_ids,
)
from mpo.data.rows import Finding, Pair, Row, evenly_spaced, settle_bad_rows
from mpo.data.sources import LOOKED_AT, load_rows
from mpo.runtime.errors import UserError

Side = Literal["target", "dominant"]


@dataclass(frozen=True)
class TokenizedResponse:
    """A prompt with one response. Tokens at [response_start, len(input_ids)) are scored;
    response_start >= 1. Equal content is equal."""

    input_ids: tuple[int, ...]
    response_start: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the response."""
        return self.input_ids[: self.response_start]

    @property
    def response(self) -> tuple[int, ...]:
        """The ids that are scored."""
        return self.input_ids[self.response_start :]


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

    def of(self, side: Side) -> Answers:
        """The answers of one side."""
        return self.target if side == "target" else self.dominant

    def sequences(self) -> tuple[TokenizedResponse, ...]:
        """All four: target chosen, target rejected, dominant chosen, dominant rejected."""
        return (*self.target, *self.dominant)


@dataclass(frozen=True)
class ExampleSet:
    """All rows of a configuration."""

    train: list[Example]
    held_out: list[Example]
    """All rows of data.eval."""
    measured: list[Example]
    """Rows whose gaps are reported: held-out ones where data.eval names files, else training
    rows."""
    dropped: list[Finding]
    """Why rows were left out."""

    def every(self) -> list[Example]:
        """Training and held-out rows."""
        return [*self.train, *self.held_out]


def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> ExampleSet:
    """Reads data.train and data.eval, as tokens of one model.

        examples = load_examples(config.data, tokenizer, print)
        examples.train[0].target.chosen.input_ids

    Raises:
        UserError: as `load_rows` and `tokenize_rows`.
    """
    train, dropped = _read(config.train, config, tokenizer, config.weights)
    held_out, dropped_too = _read(config.eval, config, tokenizer) if config.eval else ([], [])
    measured = _of_each_language(held_out or train, config.eval_rows_per_language)
    examples = ExampleSet(train, held_out, measured, dropped + dropped_too)
    _say_what_differs(examples.every(), tokenizer, log)
    return examples


def _read(
    files: Sequence[str],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[float] = (),
) -> tuple[list[Example], list[Finding]]:
    rows, unreadable = load_rows(files, config, weights)
    examples, untokenizable = tokenize_rows(rows, tokenizer, config)
    return examples, unreadable + untokenizable


def _of_each_language(examples: Sequence[Example], count: int | None) -> list[Example]:
    """At most `count` examples of each language, evenly spaced, in their order."""
    if count is None:
        return list(examples)
    chosen: set[int] = set()
    for language in {e.language for e in examples}:
        chosen.update(
            evenly_spaced([i for i, e in enumerate(examples) if e.language == language], count)
        )
    return [e for i, e in enumerate(examples) if i in chosen]


def _say_what_differs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> None:
    """Counts, in some rows, control tokens in texts and texts that the template leaves out: a model
    trains on those without a word."""
    looked_at = evenly_spaced(examples, LOOKED_AT)
    reasons = Counter(
        reason
        for example in looked_at
        for reason in {finding.reason for finding in remarks(example, tokenizer)}
    )
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        log(
            f"What is trained on is not all as it was written: {counts} in {len(looked_at)} rows"
            " that were looked at; see mpo validate"
        )


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[Example], list[Finding]]:
    """Applies the chat template and cuts to config.max_length.

        (example,), _ = tokenize_rows([row], tokenizer, config.data)
        decode_view(example.target.chosen, tokenizer)

    Returns:
        Examples, and the rows that cannot be trained on as tokens (none of them where
        config.on_bad_row is "error"): a response would lose all its tokens, or its first one is
        joined with the template's text; both answers are the same tokens; or the template refuses
        the conversation, leaves the answer out or rewrites it.
    Raises:
        UserError: no chat template; a template that begins every answer otherwise than its
            generation prompt; bad rows under "error"; nothing left.
    """
    encoder = _Encoder(tokenizer, config)
    examples: list[Example] = []
    bad: list[Finding] = []
    for row in rows:
        try:
            target = encoder.answers_of(row.target, "target")
            examples.append(Example(row, encoder.answers_of(row.dominant, "dominant"), target))
        except Unusable as problem:
            bad.append(Finding(row.source, problem.reason, problem.detail))
    if bad and not examples and {row.reason for row in bad} == {NOT_PREFIX_STABLE}:
        # its doing, not the rows'
        raise UserError(f"The chat template is not prefix-stable: {bad[0].detail}")
    settle_bad_rows(bad, len(examples), config.train, config.on_bad_row)
    return examples, bad


class _Encoder:
    """Encodes pairs, each distinct one once: the published data repeat every dominant pair six
    times."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        self._template = ChatTemplate(tokenizer, config.date or datetime.now())
        self._max_length = config.max_length
        self._done: dict[Pair, Answers] = {}

    def answers_of(self, pair: Pair, side: str) -> Answers:
        """The pair as tokens. Raises Unusable; `side` names the pair."""
        if pair not in self._done:
            frame = self._template.frame_of(pair)
            self._done[pair] = Answers(
                self._encode(pair, pair.chosen, frame, side, "chosen"),
                self._encode(pair, pair.rejected, frame, side, "rejected"),
            )
        answers = self._done[pair]
        if answers.chosen == answers.rejected:
            raise Unusable(
                "chosen_equals_rejected",
                f"the {side} pair has no gap: both answers are the same"
                f" {len(answers.chosen.response)} tokens after the chat template and"
                f" data.max_length {self._max_length}",
            )
        return answers

    def _encode(
        self, pair: Pair, answer: str, frame: Frame, side: str, kind: str
    ) -> TokenizedResponse:
        prompt, response = self._template.encode(pair, answer, frame, f"{side} {kind} answer")
        left = response[: max(0, self._max_length - len(prompt))]
        if not left:
            raise Unusable(
                "response_truncated_away",
                f"the {side} prompt has {len(prompt)} tokens, so none of the {len(response)} {kind}"
                f" tokens is left at data.max_length {self._max_length}; raise it or shorten the"
                " prompt",
            )
        return TokenizedResponse((*prompt, *left), len(prompt))


def decode_view(response: TokenizedResponse, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(prompt, scored text) with special tokens visible, for people who want to see what is trained
    on."""
    return decode(response.prompt, tokenizer), decode(response.response, tokenizer)


def remarks(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """What chat template and tokenizer made of the texts, where what is trained on is not what was
    written."""
    row, special = example.row, special_ids(tokenizer)
    for side, pair, answers in (
        ("dominant", row.dominant, example.dominant),
        ("target", row.target, example.target),
    ):
        for reason, detail in (
            *_control_tokens(side, pair, tokenizer, special),
            *_left_out(side, pair, answers, tokenizer),
            *_scored_otherwise(side, pair, answers, tokenizer),
        ):
            yield Finding(row.source, reason, detail)


def _control_tokens(
    side: str, pair: Pair, tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> Iterator[tuple[str, str]]:
    for text in pair.texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        held = [token for token in ids if token in special]
        if held:
            yield (
                "special_token",
                f"a {side} text holds {decode(held[:1], tokenizer)!r}, which the model reads as a"
                " control token",
            )


def _left_out(
    side: str, pair: Pair, answers: Answers, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    prompt = _bare(decode(answers.chosen.prompt, tokenizer))
    for message in pair.prompt:
        if _bare(message.content) not in prompt:
            yield (
                "left_out_by_template",
                f"the {side} {message.role} message is not in what the model sees, or not as it was"
                " written",
            )


def _scored_otherwise(
    side: str, pair: Pair, answers: Answers, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    for kind, written, tokens in (
        ("chosen", pair.chosen, answers.chosen),
        ("rejected", pair.rejected, answers.rejected),
    ):
        answer, scored = _bare(written), _bare(decode(tokens.response, tokenizer))
        # data.max_length may cut through a letter, or between a letter and its marks
        beginning = scored.split("\ufffd")[0][:-4]
        if not scored.startswith(answer) and not answer.startswith(beginning):
            yield (
                "scored_differs",
                f"scored of the {side} {kind} answer is {scored[:60]!r}: the tokenizer cannot write"
                " it",
            )


def _bare(text: str) -> str:
    """A text without what tokenizers may take away from it: white space, and other ways to write
    the same letter."""
    return "".join(unicodedata.normalize("NFKC", text).split())
