"""Prompts with answers to other prompts, which KTO compares policy and reference on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mpo.data.examples import Answers, Example, Side, TokenizedResponse
from mpo.runtime.errors import UserError


def mismatched_answers(
    examples: Sequence[Example], side: Side, seed: int, max_length: int
) -> list[Answers]:
    """Of each example its prompt of that side with both answers of another example, cut to
    `max_length` tokens. Each pair of answers is used once, and none with its own prompt.

        mismatched_answers(examples, "target", seed=0, max_length=1024)[0].chosen.prompt

    It depends on examples and seed alone. The order is random, with equal prompts next to each
    other; each example takes from the one that lies behind it by the size of the largest group of
    equal prompts, which is the nearest that is in another group for all of them.

    Raises:
        UserError: more than half of the examples have the same prompt, so that there are not enough
            others for all of them.
    """
    draw = random.Random(f"mismatched answers of seed {seed}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in draw.sample(range(len(examples)), len(examples)):
        groups.setdefault(examples[i].of(side).chosen.prompt, []).append(i)
    largest = max(groups.values(), key=len)
    if 2 * len(largest) > len(examples):
        raise UserError(
            f"{len(largest)} of {len(examples)} training rows have the same {side} prompt, e.g."
            f" {examples[min(largest)].source}. KTO pairs every row with an answer to another"
            " prompt, which takes as many rows with other prompts. Add such rows, or choose"
            " another loss.name."
        )
    order = [i for group in groups.values() for i in group]
    mismatched = {
        i: Answers(
            *(
                _joined(own, other, max_length)
                for own, other in zip(examples[i].of(side), examples[j].of(side), strict=True)
            )
        )
        for i, j in zip(order, order[len(largest) :] + order[: len(largest)], strict=True)
    }
    return [mismatched[i] for i in range(len(examples))]


def _joined(own: TokenizedResponse, other: TokenizedResponse, max_length: int) -> TokenizedResponse:
    """The prompt of one with the answer of another. A prompt leaves room for a token: its own
    answer has one."""
    return TokenizedResponse((*own.prompt, *other.response)[:max_length], own.response_start)
