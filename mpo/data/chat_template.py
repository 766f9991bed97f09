"""From a conversation to the tokens of its prompt and those of its answer.

What a template writes around an answer is learned by rendering another answer in its place: so the
answer's own place in the text is known, whatever stands before and behind it (an empty think block,
an end of turn). The whole conversation is encoded once, so no second BOS can appear.

An answer ends behind its end of turn, the first special token that the template writes behind it.
Nothing that the template adds before the answer belongs to it, and not what follows the end (a
newline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mpo.data.rows import Pair
from mpo.data.run_date import dated
from mpo.runtime.errors import UserError

NOT_PREFIX_STABLE = "template_not_prefix_stable"
"""The reason of a template's own fault: no row can mend it."""
_PROBE = "739184620551739184620"
"""Rendered in place of an answer, to see what the template writes around one."""


class Unusable(Exception):
    """A pair that cannot be trained on as tokens."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Frame:
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


class ChatTemplate:
    """A tokenizer's chat template, with its clock stopped at `date`.

        template = ChatTemplate(tokenizer, datetime.now())
        frame = template.frame_of(pair)
        prompt, answer = template.encode(pair, pair.chosen, frame, "chosen answer")

    Raises:
        UserError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template."
                " Use the instruction-tuned model, or save a template into the model folder as"
                " chat_template.jinja."
            )
        self._tokenizer = tokenizer
        self._template = dated(tokenizer.get_chat_template(), date)
        self._special = special_ids(tokenizer)

    def frame_of(self, pair: Pair) -> Frame:
        """What is written around an answer to the pair's prompt.

        Raises:
            Unusable: no answer is written, or the prompt that a model is asked with is no beginning
                of what stands before one.
        """
        conversation = pair.conversation()
        asked = self._rendered(conversation, add_generation_prompt=True)
        before, found, behind = self._rendered([*conversation, _answer(_PROBE)]).rpartition(_PROBE)
        if not found:
            raise Unusable(
                "answer_rewritten", "the chat template leaves the answer of this conversation out"
            )
        if not before.startswith(asked):
            raise Unusable(
                NOT_PREFIX_STABLE,
                "its generation prompt is no beginning of what it writes before an answer, so a"
                " model would be trained behind another prompt than it is asked with. The prompt"
                f" ends with {asked[-40:]!r}, the conversation has"
                f" {before[max(0, len(asked) - 40) :]!r} there. Use a template whose generation"
                " prompt is what it writes before an answer.",
            )
        return Frame(asked, before, behind)

    def encode(
        self, pair: Pair, answer: str, frame: Frame, name: str
    ) -> tuple[list[int], list[int]]:
        """Token ids of the pair's prompt and of one answer to it, up to its end of turn.

        Args:
            frame: the prompt's, of `frame_of`.
            name: the answer's, for messages.
        Raises:
            Unusable: the template writes something else than the answer, or its first token is
                joined with the template's text.
        """
        text = self._rendered([*pair.conversation(), _answer(answer)])
        before = frame.place_of(answer, text)
        if before is None:
            raise Unusable(
                "answer_rewritten",
                f"the chat template writes something else than the {name}: {text[-80:]!r}",
            )
        parts = self._split(text, before, frame)
        if parts is None:
            raise Unusable(
                "answer_joined_with_template",
                f"the {name} begins with {answer[:12]!r}, which the tokenizer joins"
                f" with the template's {before[-12:]!r}, so it cannot be scored alone; take off"
                " white space at its beginning, or use a template that ends otherwise",
            )
        prompt, response = parts
        return prompt, response[: self._end(response, frame.behind)]

    def _split(self, text: str, before: str, frame: Frame) -> tuple[list[int], list[int]] | None:
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
        start = len(ids) - len(rest)
        written = decode(ids[:start], self._tokenizer)
        if ids[start:] == rest and written == decode(prompt_ids, self._tokenizer):
            return prompt_ids, rest
        return None

    def _end(self, response: list[int], behind: str) -> int:
        """Where scoring ends: behind the first special token after the answer, or at the end of the
        ids where there is none.

        Counted from the end, since the answer may hold special tokens itself.
        """
        count = sum(token in self._special for token in self._ids(behind))
        positions = [i for i, token in enumerate(response) if token in self._special]
        return positions[-count] + 1 if count else len(response)

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
            raise Unusable(
                "refused_by_template", f"the chat template refuses it: {error}"
            ) from error

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self._tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])


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


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
