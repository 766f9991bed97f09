"""KTO's answers to other prompts: one derangement of the rows, from the seed; and the KL that is
measured on them."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import example_of

from mpo.data.examples import TokenizedResponse
from mpo.data.mismatched import mismatched_answers
from mpo.runtime.errors import UserError
from mpo.training.kl import MismatchedAnswers


def examples_of(prompts):
    """One example per name of a prompt, whose answers are its own alone."""
    dominant = (TokenizedResponse((0, 1), 1), TokenizedResponse((0, 2), 1))
    return [
        example_of(
            f"row {i}",
            "sw",
            TokenizedResponse((7, prompt, 100 + i, 1), 2),
            TokenizedResponse((7, prompt, 200 + i, 9, 1), 2),
            *dominant,
        )
        for i, prompt in enumerate(prompts)
    ]


def sources(examples, mismatched):
    """Whose answers each example has, which both of its answers agree on."""
    pairs = [(m.chosen.response[0] - 100, m.rejected.response[0] - 200) for m in mismatched]
    assert all(one == two for one, two in pairs)
    return [one for one, _ in pairs]


@settings(deadline=None)
@given(prompts=st.lists(st.integers(0, 5), min_size=2, max_size=30), seed=st.integers(0, 2**32 - 1))
def test_every_answer_is_used_once_and_never_with_its_own_prompt(prompts, seed):
    examples = examples_of(prompts)
    (prompt, count), *_ = Counter(prompts).most_common(1)
    if 2 * count > len(prompts):
        with pytest.raises(UserError) as refusal:
            mismatched_answers(examples, "target", seed, 512)
        message = str(refusal.value)
        assert message.startswith(
            f"{count} of {len(prompts)} training rows have the same target prompt"
        )
        assert f"e.g. row {prompts.index(prompt)}. " in message
        return
    mismatched = mismatched_answers(examples, "target", seed, 512)
    given_by = sources(examples, mismatched)
    assert sorted(given_by) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(given_by))
    for example, answers in zip(examples, mismatched, strict=True):
        for own, other in zip(example.target, answers, strict=True):
            assert other.prompt == own.prompt
    assert mismatched == mismatched_answers(examples, "target", seed, 512)


def test_rows_that_an_epoch_has_twice_take_other_rows_answers():
    """data.weights=[2]; of one prompt alone they are too many."""
    examples = examples_of(range(4)) * 2
    mismatched = mismatched_answers(examples, "target", 0, 512)
    given_by = sources(examples, mismatched)
    assert sorted(given_by) == sorted([*range(4)] * 2)
    assert all(i % 4 != j for i, j in enumerate(given_by))
    with pytest.raises(UserError, match="4 of 6 training rows have the same target prompt"):
        mismatched_answers(examples_of([0]) * 4 + examples_of([1, 2]), "target", 0, 512)


def test_seeds_differ_and_rows_are_dealt_evenly():
    """With distinct prompts every other row is as likely to be the one."""
    examples = examples_of(range(6))
    counts = Counter()
    for seed in range(600):
        counts.update(
            enumerate(sources(examples, mismatched_answers(examples, "target", seed, 512)))
        )
    assert len(counts) == 30  # all but a row itself
    assert all(80 <= count <= 160 for count in counts.values())  # 120, four deviations of 10


def test_cut_where_others_are_cut():
    long = TokenizedResponse((7, 5, 5, 5, 5, 100, 1), 5)
    short = TokenizedResponse((7, 6, 101, 11, 12, 13, 1), 2)
    none = TokenizedResponse((0, 1), 1)
    examples = [example_of("a", "sw", long, long, none, none)]
    examples.append(example_of("b", "sw", short, short, none, none))
    mismatched = mismatched_answers(examples, "target", 0, 7)
    assert mismatched[0].chosen == TokenizedResponse((7, 5, 5, 5, 5, 101, 11), 5)
    assert mismatched[1].rejected == TokenizedResponse((7, 6, 100, 1), 2)


def measured(policy, reference, rows):
    """The KL of rows whose answers have these means under policy and reference, of 2 and 3 tokens
    in turn."""
    sequences = [TokenizedResponse((7, i, *[9] * (2 + i % 2)), 2) for i in range(len(policy))]

    def means(of, asked):
        assert len(set(asked)) == len(asked)
        return torch.tensor([of[sequences.index(sequence)] for sequence in asked])

    def scores(asked, pools):
        assert not pools  # only log-probabilities travel between ranks
        return SimpleNamespace(mean_logp=means(policy, asked))

    scorer = SimpleNamespace(scores=scores)
    of_reference = SimpleNamespace(mean_logps=lambda asked: means(reference, asked))
    pairs = list(zip(sequences[::2], sequences[1::2], strict=True))
    return MismatchedAnswers(scorer, of_reference, {"target": pairs}).kl(rows)


def test_the_kl_is_the_mean_of_sums_over_all_answers_of_the_step():
    policy, reference = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.0, -3.0, -5.0]
    assert measured(policy, reference, [0, 1]) == (2 * 0.5 + 3 * 1.0) / 4
    assert measured(policy, reference, [0]) == 2 * 0.5 / 2
    # a row that a step has twice, at the turn of an epoch, counts twice
    assert measured(policy, reference, [0, 1, 0]) == pytest.approx((2 * 2 * 0.5 + 3 * 1.0) / 6)
    assert measured(reference, policy, [0, 1]) == 0.0


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_kl_that_is_no_number_ends_the_run(value):
    """Rather than count as 0, or make every loss of the step NaN."""
    with pytest.raises(UserError, match=r"not finite\. Lower train\.learning_rate"):
        measured([value, -2.0], [-1.0, -2.0], [0])
