"""Packing and the assignment of rows to steps and ranks: exact bookkeeping, checked position by position."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpo.batching import Schedule, in_micro_batches, of_every_rank, order_of_rows, pack, pack_for_scoring
from mpo.tokenizing import TokenizedResponse

SEQUENCES = st.lists(st.integers(1, 6).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, 5))), min_size=1, max_size=6)


def sequences_of(shapes):
    """Sequences whose tokens are all different, so that any mix-up shows."""
    token, result = 10, []
    for start, scored in shapes:
        result.append(TokenizedResponse(tuple(range(token, token + start + scored)), start))
        token += 100
    return result


@given(SEQUENCES)
def test_each_label_is_the_token_after_its_row(shapes):
    sequences = sequences_of(shapes)
    packed = pack_for_scoring(sequences, "response")
    ids = packed.input_ids[0]
    assert torch.equal(ids[packed.scored_rows + 1], packed.labels)
    for i, sequence in enumerate(sequences):
        first, last = packed.scored_cu_seqlens[i : i + 2].tolist()
        assert tuple(packed.labels[first:last].tolist()) == sequence.input_ids[sequence.response_start :]
        first, last = packed.pooled_cu_seqlens[i : i + 2].tolist()
        assert tuple(ids[packed.pooled_rows[first:last]].tolist()) == sequence.input_ids[sequence.response_start :]
    assert sum(packed.lengths) == ids.numel()
    assert (packed.position_ids[0] == 0).sum() == len(sequences)


def test_pool_all_takes_every_position_and_only_named_sequences():
    sequences = sequences_of([(2, 3), (1, 1), (4, 2)])
    packed = pack(sequences, scored=[1], pooled=[2, 0], pool="all")
    assert packed.labels.tolist() == list(sequences[1].input_ids[1:])
    pooled = packed.input_ids[0][packed.pooled_rows].tolist()
    assert pooled == list(sequences[2].input_ids + sequences[0].input_ids)
    assert packed.pooled_cu_seqlens.tolist() == [0, 6, 11]


@given(
    rows=st.integers(1, 40),
    per_step=st.integers(1, 9),
    micro=st.integers(1, 4),
    world=st.integers(1, 5),
    epochs=st.sampled_from([0.5, 1, 2, 2.3]),
    budget=st.sampled_from([None, 1, 10, 25]),
)
def test_every_pair_once_and_every_rank_as_many_micro_batches(rows, per_step, micro, world, epochs, budget):
    schedule = Schedule(rows, per_step, epochs, None)

    def tokens(positions):
        return sum(3 + p % 5 for p in positions)

    def cut(share):
        return in_micro_batches(share, micro, budget, tokens)

    seen = []
    for step in range(schedule.steps):
        shares = [of_every_rank(schedule, step, rank, world, cut) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        in_step = [p for share in shares for batch in share for p in batch if p is not None]
        assert in_step == list(schedule.positions(step))
        batches = [batch for share in shares for batch in share]
        assert all(batch and (len(batch) <= micro if budget is None else len(batch) == 1 or tokens(batch) <= budget) for batch in batches)
        seen += in_step
    assert seen == list(range(max(1, round(rows * epochs))))


def test_max_steps_overrides_epochs():
    schedule = Schedule(10, 4, 2, 7)
    assert (schedule.steps, schedule.pairs) == (7, 28)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_is_a_function_of_seed_and_epoch(grouped):
    examples = [SimpleNamespace(dominant_chosen=i // 3, dominant_rejected=-(i // 3)) for i in range(30)]
    order = order_of_rows(examples, 1, 7, grouped)
    assert sorted(order) == list(range(30)) and order == order_of_rows(examples, 1, 7, grouped)
    assert order != order_of_rows(examples, 2, 7, grouped) and order != order_of_rows(examples, 1, 8, grouped)
    if grouped:
        assert all(len({i // 3 for i in order[k : k + 3]}) == 1 for k in range(0, 30, 3))
