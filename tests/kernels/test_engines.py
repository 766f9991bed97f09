"""The two ways of `linear_sequence_loss`: logits of one chunk that are kept for backward, and the
loop over chunks that is told the gradients. Their products are counted, their gradients compared
with float64 autograd, and nobody but the counter sees which one it is."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from cases import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequence_losses import (
    CLOSE,
    VOCAB,
    WIDE,
    from_hidden,
    from_logits,
    leaves,
    of_ragged,
    own,
    plain,
)
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.instruments.accuracy import relative_error
from benchmarks.instruments.operators import Flops
from mpo_kernels import losses, sequence_losses
from mpo_kernels.losses import Scores
from mpo_kernels.ops import gradients
from mpo_kernels.ops.chunks import pieces_of
from mpo_kernels.ops.projection import Projection

TEN = [
    losses.MPO(1.5),
    losses.DPO(0.2),
    losses.IPO(0.2),
    losses.CPO(0.2),
    losses.ORPO(0.2),
    losses.SimPO(),
    losses.LengthDPO(0.2),
    losses.SFT(),
    losses.KTO(0.2),
    losses.Sum((0.8, losses.DPO(0.2)), (0.2, losses.BCO(0.2)), (1.0, losses.SFT())),
]
OWN = losses.Custom(own, constants=("reference_logps",))
LAMBDA = lambda scores, reference_logps: (scores.logps[0] - reference_logps[0]).square()  # noqa: E731


def of_three(scores):
    """A loss of groups of three."""
    first, second, third = scores.means()
    return (first - second).square() - 0.3 * third + 0.1 * first * third


THREE = losses.Custom(of_three, sequences=3)


@dataclasses.dataclass(eq=False)
class Mine(losses.SequenceLoss):
    """A user's own dataclass."""

    beta: float = 0.3

    @property
    def constants(self):
        return ("reference_logps",)

    def __call__(self, scores, reference_logps):
        chosen, rejected = scores.logps - reference_logps
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected))


def name(loss):
    return getattr(loss, "__name__", type(loss).__name__)


@contextlib.contextmanager
def chunks_of(rows):
    """Chunks of so many rows."""
    with mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", rows):
        yield


@contextlib.contextmanager
def products():
    """Counts rows that are multiplied with the head, inside operators and graphs."""
    seen = []

    def noting(function, rows_of):
        def noted(*args, **keywords):
            seen.append(rows_of(*args))
            return function(*args, **keywords)

        return noted

    with (
        mock.patch.object(
            Projection, "logits", noting(Projection.logits, lambda _, hidden: len(hidden))
        ),
        mock.patch.object(
            gradients, "_hidden_product", noting(gradients._hidden_product, lambda g, *_: len(g))
        ),
        mock.patch.object(
            gradients, "_add_product", noting(gradients._add_product, lambda _, g, *__: len(g))
        ),
    ):
        yield seen


def batch(loss, dtype, groups=4, seed=3):
    inputs, labels, offsets, constants = of_ragged(
        loss, torch.Generator().manual_seed(seed), groups, dtype
    )
    return inputs, labels, offsets, [constant.float() for constant in constants]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("loss", [*TEN, LAMBDA], ids=name)
def test_three_products_and_two_with_a_frozen_head(loss, frozen, dtype):
    """In one chunk and in many, eager and compiled."""
    inputs, labels, offsets, constants = batch(loss, dtype)

    def step(inputs):
        return from_hidden(inputs, labels, loss, *constants, cu_seqlens=offsets, chunk_bytes=1).loss

    steps = [step]
    if not INTERPRETED:
        torch._dynamo.reset()
        steps.append(torch.compile(step, fullgraph=True, backend="eager"))
    k, scored = getattr(loss, "sequences", 2), int((labels != -100).sum())
    for rows in (256, 6 * k):  # groups have at most 6 rows a sequence
        for function in steps:
            given = leaves(inputs, dtype)
            if frozen:
                given |= {n: given[n].detach() for n in ("weight", "bias")}
            with chunks_of(rows), products() as seen:
                function(given).backward()
            assert sum(seen) == (2 if frozen else 3) * scored
            assert (len(seen) > 3) == (rows < scored)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rows", [256, 7], ids=["one chunk", "many, in pieces"])
@pytest.mark.parametrize("loss", [*TEN, OWN, THREE, Mine(), LAMBDA], ids=name)
def test_gradients_are_those_of_the_definition(loss, rows, compiled):
    if compiled and INTERPRETED:
        pytest.skip("torch.compile and the interpreter do not meet")
    generator = torch.Generator().manual_seed(5)
    inputs, labels, offsets, constants = of_ragged(loss, generator, groups=4)
    options = {
        "weights": torch.tensor([1.0, 0.0, 2.5, 0.3], dtype=torch.float64),
        "row_weights": torch.rand(labels.shape, generator=generator, dtype=torch.float64),
        "logit_scale": 0.7,
        "softcap": 5.0,
    }

    def step(inputs):
        return from_hidden(
            inputs, labels, loss, *constants, cu_seqlens=offsets, chunk_bytes=1, **options
        ).loss

    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    want = plain(theirs, labels, offsets, loss, constants, **options).mean()
    want.backward()
    with chunks_of(rows):
        got = function(ours)
        got.backward()
    torch.testing.assert_close(got.double(), want, **CLOSE)
    for each in inputs:
        torch.testing.assert_close(ours[each].grad.double(), theirs[each].grad, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.integers(1, 3),
    groups=st.integers(1, 4),
    rows=st.integers(1, 20),
    frozen=st.sets(st.sampled_from(["hidden", "weight", "bias"]), max_size=2),
    dtype=st.sampled_from([WIDE, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_any_groups_in_any_chunks(sequences, groups, rows, frozen, dtype, seed):
    """Groups smaller than a chunk and larger, with what is not trained: the gradients are those of
    one chunk, and the products as few as they can be."""
    weights = torch.linspace(0.3, -1.2, sequences, dtype=torch.float64)[:, None]
    loss = losses.Custom(
        lambda scores: (
            (weights.to(scores.logps) * scores.means()).sum(0).tanh() + scores.means()[0]
        ),
        sequences,
    )
    inputs, labels, offsets, _ = of_ragged(loss, torch.Generator().manual_seed(seed), groups, dtype)
    row_weights = torch.rand(
        labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    found = []
    for size in (1000, rows):
        given = leaves(inputs, dtype)
        given |= {each: given[each].detach() for each in frozen}
        with chunks_of(size), Flops() as flops:
            out = from_hidden(
                given,
                labels,
                loss,
                cu_seqlens=offsets,
                row_weights=row_weights,
                chunk_bytes=1,
                reduction="sum",
            )
            out.loss.backward()
        found.append((out, given, flops.total))
    (one, want, _), (many, got, counted) = found
    torch.testing.assert_close(many.scores, one.scores, rtol=1e-4, atol=1e-4)
    bar = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    for each in inputs.keys() - frozen:
        assert relative_error(got[each].grad, want[each].grad) < bar
    scored = int((labels != -100).sum())
    wanted = 1 + ("hidden" not in frozen) + ("weight" not in frozen)
    each = 2 * inputs["weight"].numel()
    assert wanted * scored * each <= counted <= (wanted + 1) * scored * each
    if {"weight", "bias"} <= frozen:
        assert counted == wanted * scored * each


@pytest.mark.parametrize(
    ("units", "early", "again"),
    [
        ([5, 3], 1, 0),  # fits
        ([20, 8], 1, 0),  # the longer one early, the other one's logits are there
        ([8, 20], 1, 0),
        ([20, 9], 1, 1),  # a piece of the other one was overwritten
        ([20, 8], 0, 20),  # dW is in use
        ([20, 20], 2, 0),  # a frozen head
        ([20], 1, 0),  # of single sequences
        ([4, 20, 3], 1, 3),
        ([20, 4, 3], 1, 0),
        ([20, 0], 1, 0),  # a rank of a context that has no row of the other one
    ],
)
def test_which_rows_of_a_large_group_are_computed_again(units, early, again):
    found = pieces_of(units, 8, early)
    pieces = [*found.early, *([found.kept] if found.kept else []), *found.again]
    rows = sorted(row for piece in pieces for row in range(piece.start, piece.stop))
    assert rows == list(range(sum(units)))
    assert all(piece.stop - piece.start <= 8 for piece in pieces)
    assert sum(piece.stop - piece.start for piece in found.again) == again


def test_the_way_changes_at_one_chunk():
    """At so many rows as a chunk holds the logits are kept; a row more is for the loop."""
    inputs, labels, offsets, constants = batch(losses.DPO(), torch.float32)
    scored = int((labels != -100).sum())
    for rows, calls in ((scored, 0), (scored - 1, 1)):
        with (
            chunks_of(rows),
            mock.patch.object(
                sequence_losses,
                "linear_sequence_loss_op",
                wraps=sequence_losses.linear_sequence_loss_op,
            ) as loop,
        ):
            from_hidden(inputs, labels, losses.DPO(), *constants, cu_seqlens=offsets, chunk_bytes=1)
        assert loop.call_count == calls


def test_labels_of_a_device_are_read_once(monkeypatch):
    """Whichever the way, backward included."""
    inputs, labels, offsets, constants = batch(losses.DPO(), torch.float32)
    read = []
    to_host = torch.Tensor.cpu

    def noting(tensor, *args, **keywords):
        read.append(tensor.data_ptr() == labels.data_ptr())
        # as from a device, it is a copy
        return tensor.clone() if read[-1] else to_host(tensor, *args, **keywords)

    for rows in (256, 8):
        read.clear()
        with chunks_of(rows), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", noting)
            from_hidden(
                leaves(inputs, torch.float32),
                labels,
                losses.DPO(),
                *constants,
                cu_seqlens=offsets,
                chunk_bytes=1,
            ).loss.backward()
        assert sum(read) == 1


compiled_only = pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter")


@compiled_only
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [from_logits, from_hidden])
@pytest.mark.parametrize("kind", [losses.DPO, Mine, "wrapped"])
def test_a_number_of_the_loss_that_changes_is_no_constant_of_a_graph(kind, function, reduction):
    """One graph, and never an earlier beta."""
    held = losses.DPO()
    loss = (
        losses.Custom(lambda *given: held(*given), constants=("reference_logps",))
        if kind == "wrapped"
        else kind()
    )
    inputs, labels, offsets, constants = batch(losses.DPO(), torch.float32)

    def step(inputs):
        out = function(inputs, labels, loss, *constants, cu_seqlens=offsets, reduction=reduction)
        return out.loss.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for beta in (0.1, 0.5, 0.9, 1.3):
        (held if kind == "wrapped" else loss).beta = beta
        got, want = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
        value, expected = compiled(got), step(want)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        for each in inputs:
            torch.testing.assert_close(got[each].grad, want[each].grad)
    assert counter.frame_count == 1


@compiled_only
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_a_bare_function_in_a_graph_is_never_another_one(function):
    """A compiler takes functions of the same code for one. Those that hold nothing are called by
    their number; others are traced, with what they hold."""

    def holding(factor):
        return lambda scores, reference_logps: factor * (scores.logps[0] - reference_logps[0])

    inputs, labels, offsets, constants = batch(own, torch.float32)

    def step(inputs, loss):
        return function(inputs, labels, loss, *constants, cu_seqlens=offsets).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for loss in (own, holding(1.0), holding(2.0), LAMBDA, own, Mine(0.3), Mine(0.7)):
        got, want = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
        value, expected = compiled(got, loss), step(want, loss)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        torch.testing.assert_close(got["hidden"].grad, want["hidden"].grad)


@compiled_only
def test_a_function_made_inside_of_a_graph():
    inputs, labels, offsets, constants = batch(own, torch.float32)

    def step(inputs):
        scale = inputs["hidden"].detach().mean()
        losses_of = (
            lambda scores, reference_logps: scores.logps[0] - reference_logps[0],
            lambda scores, reference_logps: scale * (scores.logps[0] - reference_logps[0]),
        )
        return sum(
            from_hidden(inputs, labels, each, *constants, cu_seqlens=offsets).loss
            for each in losses_of
        )

    torch._dynamo.reset()
    got, want = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
    torch.compile(step, fullgraph=True, backend="aot_eager")(got).backward()
    step(want).backward()
    torch.testing.assert_close(got["weight"].grad, want["weight"].grad)


def test_both_ways_in_inference_mode():
    inputs, labels, offsets, constants = batch(losses.DPO(), torch.float32)
    with torch.inference_mode(), chunks_of(8):
        many = from_hidden(
            inputs, labels, losses.DPO(), *constants, cu_seqlens=offsets, chunk_bytes=1
        )
    one = from_hidden(inputs, labels, losses.DPO(), *constants, cu_seqlens=offsets)
    torch.testing.assert_close(many.loss.clone(), one.loss)


def test_scores_of_both_ways_are_the_callers():
    """Detached and of their own memory: an edit does not reach the gradients."""
    inputs, labels, offsets, constants = batch(losses.DPO(), torch.float32)
    grads = []
    for rows, edit in ((256, False), (256, True), (8, False), (8, True)):
        given = leaves(inputs, torch.float32)
        with chunks_of(rows):
            out = from_hidden(
                given, labels, losses.DPO(), *constants, cu_seqlens=offsets, chunk_bytes=1
            )
        assert isinstance(out.scores, Scores) and not out.scores.logps.requires_grad
        if edit:
            out.scores.logps.zero_()
            out.scores.tokens.zero_()
        out.loss.backward()
        grads.append(given["weight"].grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
    torch.testing.assert_close(grads[3], grads[2], rtol=0, atol=0)
    assert VOCAB == grads[0].shape[0]
