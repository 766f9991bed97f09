"""Packing and the assignment of rows to steps and ranks: exact bookkeeping, checked position by
position."""

import math
from decimal import ROUND_HALF_EVEN, Decimal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import example_of

from mpo.config import Config, TrainConfig
from mpo.data.examples import TokenizedResponse
from mpo.loss_config import MPOLoss
from mpo.models.forward import SequenceScores
from mpo.models.packing import Batch, pack, pack_for_scoring, tokens_of
from mpo.training.engine import learning_rate
from mpo.training.micro_batches import (
    Batches,
    MicroBatch,
    in_micro_batches,
    make_batch,
    of_every_rank,
)
from mpo.training.objective import Objective
from mpo.training.reference import ReferenceStore
from mpo.training.schedule import Schedule, order_of_rows, schedule_of

OF_MPO = Objective(MPOLoss())
SEQUENCES = st.lists(
    st.integers(1, 6).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, 5))),
    min_size=1,
    max_size=6,
)


def sequences_of(shapes):
    """Sequences whose tokens are all different, so that any mix-up shows."""
    token, result = 10, []
    for start, scored in shapes:
        result.append(TokenizedResponse(tuple(range(token, token + start + scored)), start))
        token += 100
    return result


def with_shared_prompts(sequences, same):
    """Every sequence but the first gets the prompt of the one before it where `same` says so."""
    result = sequences[:1]
    for sequence, as_before in zip(sequences[1:], same, strict=False):
        prompt = result[-1].input_ids[: result[-1].response_start]
        response = sequence.input_ids[sequence.response_start :]
        result.append(TokenizedResponse(prompt + response, len(prompt)) if as_before else sequence)
    return result


@given(SEQUENCES, st.lists(st.booleans(), min_size=6, max_size=6), st.booleans())
def test_each_label_is_the_token_after_its_row(shapes, same, share):
    sequences = with_shared_prompts(sequences_of(shapes), same)
    packed = pack_for_scoring(sequences, "response", share)
    ids, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    for i, sequence in enumerate(sequences):
        first, last = packed.scored_cu_seqlens[i : i + 2].tolist()
        rows, start = packed.scored_rows[first:last].tolist(), sequence.response_start
        assert tuple(packed.labels[first:last].tolist()) == sequence.input_ids[start:]
        # each row holds the token before its label
        assert tuple(ids[row] for row in rows) == sequence.input_ids[start - 1 : -1]
        assert [positions[row] for row in rows] == list(
            range(start - 1, len(sequence.input_ids) - 1)
        )
        first, last = packed.pooled_cu_seqlens[i : i + 2].tolist()
        assert (
            tuple(ids[row] for row in packed.pooled_rows[first:last].tolist())
            == sequence.input_ids[start:]
        )
    assert sum(map(sum, packed.documents.lengths)) == len(ids) == tokens_of(sequences, share)
    assert positions.count(0) == len(packed.documents.lengths)
    assert all(len(document) <= (3 if share else 2) for document in packed.documents.lengths)
    if share and len(sequences) == 2 and same[0]:
        assert len(packed.documents.lengths) == 1


def test_pool_all_takes_every_position_and_only_named_sequences():
    sequences = sequences_of([(2, 3), (1, 1), (4, 2)])
    packed = pack(sequences, scored=[1], pooled=[2, 0], pool="all", share_prompts=True)
    assert packed.labels.tolist() == list(sequences[1].input_ids[1:])
    pooled = packed.input_ids[0][packed.pooled_rows].tolist()
    assert pooled == list(sequences[2].input_ids + sequences[0].input_ids)
    assert packed.pooled_cu_seqlens.tolist() == [0, 6, 11]


def test_pool_all_averages_a_shared_prompt_into_both():
    sequences = with_shared_prompts(sequences_of([(2, 3), (2, 1)]), [True])
    packed = pack(sequences, scored=[], pooled=[1, 0], pool="all", share_prompts=True)
    assert packed.documents.lengths == ((2, 3, 1),)
    assert packed.input_ids[0][packed.pooled_rows].tolist() == list(
        sequences[1].input_ids + sequences[0].input_ids
    )


def examples_of(rows):
    """Rows of different lengths; each three share a dominant pair, and all share their rejected
    dominant answer in tens."""

    def response(token, start, scored):
        return TokenizedResponse(
            tuple(range(token, token + start)) + tuple(range(token + 50, token + 50 + scored)),
            start,
        )

    return [
        example_of(
            str(i),
            "sw",
            response(1000 * i, 2, 1 + i % 4),
            response(1000 * i, 2, 1 + i % 3),
            response(1000 * (i // 3) + 100, 3, 2 + i // 3 % 5),
            response(1000 * (i // 10) + 200, 3, 2),
        )
        for i in range(rows)
    ]


@given(
    rows=st.integers(1, 40),
    per_step=st.integers(1, 9),
    micro=st.integers(1, 4),
    world=st.integers(1, 5),
    epochs=st.sampled_from([0.5, 1, 1.1, 2, 2.3]),
    budget=st.sampled_from([None, 1, 10, 25]),
    share=st.booleans(),
)
def test_every_pair_once_and_every_rank_as_many_micro_batches(
    rows, per_step, micro, world, epochs, budget, share
):
    schedule, examples = Schedule(rows, per_step, epochs, None), examples_of(rows)

    def cut(positions):
        return in_micro_batches(
            [examples[p % rows] for p in positions],
            OF_MPO,
            pairs=micro,
            tokens=budget,
            share_prompts=share,
        )

    seen = []
    for step in range(schedule.steps):
        shares = [of_every_rank(schedule, step, rank, world, cut) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        in_step = [examples[p % rows] for p in schedule.positions(step)]
        assert in_step
        computed = [e for share in shares for part in share for e in part.examples]
        assert sorted(computed, key=lambda e: e.source) == sorted(in_step, key=lambda e: e.source)
        if budget is None:
            assert computed == in_step
        for rank, parts in enumerate(shares):
            # Each dominant sequence of the rank's rows once, with half the number of rows that have
            # it.
            mine = [examples[p % rows] for p in schedule.share(step, rank, world)]
            want: dict = {}
            for row in mine:
                for sequence in row.dominant:
                    want[sequence] = want.get(sequence, 0) + 0.5
            found = [item for part in parts for item in part.dominant]
            assert dict(found) == want and len(found) == len(want)
            for part in parts:
                if budget is None:
                    assert len(part.examples) <= micro
                else:
                    assert (
                        part.tokens(share) <= budget
                        or len(part.examples) + bool(part.dominant) == 1
                    )
        seen += in_step
    assert len(seen) == pairs_of(rows, epochs)


def pairs_of(rows, epochs):
    """The nearest whole number of rows to so many passes, by decimal arithmetic, at least one."""
    return max(1, int((rows * Decimal(str(epochs))).quantize(Decimal(1), ROUND_HALF_EVEN)))


@given(
    rows=st.integers(1, 500),
    per_step=st.integers(1, 40),
    epochs=st.decimals("0.01", "4", places=2).map(float) | st.floats(0.01, 4),
    max_steps=st.none() | st.integers(1, 30),
    world=st.integers(1, 9),
)
@example(rows=2, per_step=2, epochs=1.1, max_steps=None, world=1)
@example(rows=100, per_step=11, epochs=1.1, max_steps=None, world=1)
@example(rows=50, per_step=1, epochs=0.29, max_steps=None, world=2)
@settings(max_examples=400)
def test_steps_cut_the_rows_of_a_run_without_a_rest(rows, per_step, epochs, max_steps, world):
    """No step is empty, all but the last are full, every rank's shares add up, and what is counted
    is what is computed."""
    schedule = Schedule(rows, per_step, epochs, max_steps)
    assert schedule.pairs == (pairs_of(rows, epochs) if max_steps is None else max_steps * per_step)
    steps = [schedule.positions(step) for step in range(schedule.steps)]
    assert [place for step in steps for place in step] == list(range(schedule.pairs))
    assert all(len(step) == per_step for step in steps[:-1]) and 1 <= len(steps[-1]) <= per_step
    for i, step in enumerate(steps):
        assert [place for rank in range(world) for place in schedule.share(i, rank, world)] == list(
            step
        )
    again = Schedule(rows, per_step, epochs, max_steps, repeats_first_step=True)
    assert again.steps == schedule.steps
    assert {again.positions(i) for i in range(again.steps)} == {steps[0]}


@given(
    rows=st.integers(1, 20),
    per_step=st.integers(1, 7),
    epochs=st.integers(1, 3),
    world=st.integers(1, 4),
    grouped=st.booleans(),
)
def test_every_epoch_computes_every_row_once(rows, per_step, epochs, world, grouped):
    """Through the very object that a run and the dry run ask."""
    train = {"pairs_per_step": per_step, "epochs": epochs, "group_by_dominant": grouped}
    config = Config.model_validate(
        {"output_dir": "-", "model": {"path": "-"}, "data": {"train": ["-"]}, "train": train}
    )
    examples, schedule = examples_of(rows), schedule_of(config, rows)
    batches = Batches(examples, schedule, config)
    parts = [
        part
        for step in range(schedule.steps)
        for rank in range(world)
        for part in batches.micro_batches(step, rank, world)
    ]
    computed = [int(e.source) for part in parts for e in part.examples]
    assert len(computed) == rows * epochs
    for epoch in range(epochs):
        assert sorted(computed[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_budget_is_filled_by_the_longest_first():
    examples = examples_of(9)
    parts = in_micro_batches(examples, OF_MPO, pairs=1, tokens=40, share_prompts=True)
    sizes = [part.tokens(True) for part in parts]
    assert all(size <= 40 for size in sizes)
    assert all(one + other > 40 for i, one in enumerate(sizes) for other in sizes[i + 1 :])


def test_an_empty_micro_batch_runs_on_the_filler():
    config = Config.model_validate(
        {"output_dir": "-", "model": {"path": "-"}, "data": {"train": ["-"]}}
    )
    store = ReferenceStore({}, SequenceScores(torch.zeros(0), torch.zeros(0, 4)))
    batch = make_batch(MicroBatch(), OF_MPO, store, config, {})
    assert batch.packed.documents.lengths == ((1, 1, 1),)
    assert batch.packed.input_ids.tolist() == [[0, 0, 0]]
    assert batch.packed.scored_rows.tolist() == [0, 0] and batch.packed.pooled_rows.numel() == 0
    assert batch.weights.tolist() == [0] and batch.pooled_weights.numel() == 0


# ratio of the warm-up: the share of the peak in steps 0, 1, 2, 3, 5 and 9 of ten, by hand
TEN_STEPS = {
    ("constant", 0): (1, 1, 1, 1, 1, 1),
    ("constant", 0.1): (1, 1, 1, 1, 1, 1),
    ("constant", 0.3): (1 / 3, 2 / 3, 1, 1, 1, 1),
    ("constant", 0.25): (1 / 3, 2 / 3, 1, 1, 1, 1),
    ("constant", 1): (0.1, 0.2, 0.3, 0.4, 0.6, 1),
    ("linear", 0): (1, 0.9, 0.8, 0.7, 0.5, 0.1),
    ("linear", 0.1): (1, 1, 8 / 9, 7 / 9, 5 / 9, 1 / 9),
    ("linear", 0.3): (1 / 3, 2 / 3, 1, 1, 5 / 7, 1 / 7),
    ("cosine", 0): (1, 0.9755282581, 0.9045084972, 0.7938926261, 0.5, 0.0244717419),
    ("cosine", 0.1): (1, 1, 0.9698463104, 0.8830222216, 0.5868240888, 0.0301536896),
    ("cosine", 0.3): (1 / 3, 2 / 3, 1, 1, 0.8117449009, 0.0495155660),
}


@pytest.mark.parametrize(("schedule", "warmup"), TEN_STEPS)
def test_learning_rates_are_those_of_a_table_made_by_hand(schedule, warmup):
    train = TrainConfig(learning_rate=3e-4, schedule=schedule, warmup_ratio=warmup)
    found = [learning_rate(train, step, 10) / 3e-4 for step in (0, 1, 2, 3, 5, 9)]
    assert found == pytest.approx(TEN_STEPS[schedule, warmup], rel=1e-8)


@given(ratio=st.decimals("0", "1", places=2), steps=st.integers(1, 300))
# floats make it 3.0000000000000004, which is no fourth step
@example(ratio=Decimal("0.1"), steps=30)
@example(ratio=Decimal("0.07"), steps=100)
def test_the_peak_comes_after_the_share_of_the_steps_that_was_written(ratio, steps):
    warmup = math.ceil(ratio * steps)
    train = TrainConfig(learning_rate=1, schedule="linear", warmup_ratio=float(ratio))
    rates = [learning_rate(train, step, steps) for step in range(steps)]
    assert rates.index(1) == max(warmup, 1) - 1 and all(0 < rate <= 1 for rate in rates)


def test_max_steps_overrides_epochs():
    schedule = Schedule(10, 4, 2, 7)
    assert (schedule.steps, schedule.pairs) == (7, 28)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_is_a_function_of_seed_and_epoch(grouped):
    examples = [SimpleNamespace(dominant=(i // 3, -(i // 3))) for i in range(30)]
    order = order_of_rows(examples, 1, 7, grouped)
    assert sorted(order) == list(range(30)) and order == order_of_rows(examples, 1, 7, grouped)
    assert order != order_of_rows(examples, 2, 7, grouped)
    assert order != order_of_rows(examples, 1, 8, grouped)
    if grouped:
        assert all(len({i // 3 for i in order[k : k + 3]}) == 1 for k in range(0, 30, 3))


def test_copies_to_a_gpu_are_from_page_locked_memory(monkeypatch):
    """Of everything but what the head reads on the host."""
    sequences = [TokenizedResponse((5, 6, 7), 2), TokenizedResponse((5, 6, 8, 9), 2)]
    batch = Batch(
        packed=pack(sequences, scored=[0, 1], pooled=[0, 1], pool="all", share_prompts=True),
        constants=(torch.zeros(1),),
        weights=torch.ones(1),
        pooled_reference=torch.zeros(2, 4),
        pooled_weights=torch.ones(2),
    )
    locked, copies = [], []

    def pin_memory(tensor):
        locked.append(tensor.clone())
        return locked[-1]

    def to(tensor, device, non_blocking=False):
        assert device.type == "cuda" and non_blocking
        assert any(tensor is one for one in locked)
        copies.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    there = batch.to(torch.device("cuda"))
    stay = {"scored_rows", "labels", "scored_cu_seqlens"}
    found = {}
    for record in (there, there.packed, there.packed.documents):
        found |= {k: v for k, v in vars(record).items() if isinstance(v, torch.Tensor)}
    found["constant"] = there.constants[0]
    assert len(found) == 14 and {"key_rows", "query_offsets", "input_ids"} < found.keys()
    for name, tensor in found.items():
        assert any(tensor is one for one in copies) == (name not in stay), name
