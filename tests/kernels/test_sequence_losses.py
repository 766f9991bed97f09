"""`sequence_loss` and `linear_sequence_loss` beside plain float64 PyTorch: losses of the family, a
user's own, layouts, options, refusals."""

from itertools import pairwise

import pytest
import torch
from cases import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle
from mpo_kernels.losses import Scores
from mpo_kernels.sequence_losses import linear_sequence_loss, sequence_loss

FAMILY = [
    losses.MPO(1.5),
    losses.DPO(0.2),
    losses.RobustDPO(0.2),
    losses.IPO(0.2),
    losses.APOZero(0.2),
    losses.CPO(0.2),
    losses.ORPO(0.2),
    losses.SimPO(),
    losses.SFT(),
    losses.KTO(0.2),
    losses.Sum((0.8, losses.DPO(0.2)), (1.0, losses.SFT())),
]
VOCAB, WIDTH = 37, 6
WIDE = torch.float32 if INTERPRETED else torch.float64  # the kernels do not compute in float64
CLOSE = {"rtol": 1e-4, "atol": 1e-5} if INTERPRETED else {}


def own(scores, reference_logps):
    """A user's loss of pairs."""
    chosen, rejected = scores.logps - reference_logps
    return -logsigmoid(0.3 * chosen) - 0.5 * rejected.tanh() + scores.tokens[0] * 1e-3


def of_ragged(loss, generator, groups, dtype=torch.float64):
    """Hidden states of packed sequences with positions that are not scored, and constants."""
    k = getattr(loss, "sequences", 2)
    lengths = torch.randint(2, 7, (k * groups,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    count = int(offsets[-1])
    labels = torch.randint(VOCAB, (count,), generator=generator)
    ignored = torch.rand(count, generator=generator) < 0.3
    ignored[offsets[:-1].long()] = False  # each has a scored one
    labels[ignored] = -100

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    constants = {
        "reference_logps": -10 + 3 * normal(k, groups).double(),
        "reference_gap": normal(groups).double(),
        "mean_tokens": torch.full((groups,), 2.5, dtype=torch.float64),
        "is_desirable": (normal(groups) > 0).double(),
        "kl": torch.full((groups,), 0.25, dtype=torch.float64),
    }
    names = loss.constants if isinstance(loss, losses.SequenceLoss) else ("reference_logps",)
    inputs = {"hidden": normal(count, WIDTH), "weight": normal(VOCAB, WIDTH), "bias": normal(VOCAB)}
    return inputs, labels, offsets, [constants[name] for name in names]


def plain(inputs, labels, offsets, loss, constants, *, weights=None, row_weights=None, **options):
    """The definition, by autograd."""
    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = oracle.token_logprobs(logits.to(wide), labels, **options)
    logps = logps if row_weights is None else logps * row_weights
    bounds = offsets.tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    k = getattr(loss, "sequences", 2)
    sums = torch.stack([logps[part].sum() for part in parts]).view(k, -1)
    counts = torch.stack([(labels[part] != -100).sum() for part in parts]).view(k, -1)
    values = loss(Scores(sums, counts.to(sums.dtype)), *constants)
    return values if weights is None else values * weights


def leaves(inputs, dtype=WIDE):
    return {name: value.to(dtype).detach().requires_grad_() for name, value in inputs.items()}


def from_logits(inputs, labels, loss, *constants, **options):
    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    return sequence_loss(logits, labels, loss, *constants, **options)


def from_hidden(inputs, labels, loss, *constants, **options):
    return linear_sequence_loss(
        inputs["hidden"], inputs["weight"], labels, loss, *constants, bias=inputs["bias"], **options
    )


@pytest.mark.parametrize("function", [from_logits, from_hidden])
@pytest.mark.parametrize(
    "loss", [*FAMILY, own], ids=lambda loss: getattr(loss, "__name__", None) or type(loss).__name__
)
def test_loss_and_gradients_are_those_of_the_definition(loss, function):
    generator = torch.Generator().manual_seed(2)
    inputs, labels, offsets, constants = of_ragged(loss, generator, groups=3)
    weights = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    row_weights = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    given = {"weights": weights, "row_weights": row_weights, "logit_scale": 0.7, "softcap": 5.0}
    ours, theirs = leaves(inputs), leaves(inputs, torch.float64)
    out = function(ours, labels, loss, *constants, cu_seqlens=offsets, **given)
    want = plain(theirs, labels, offsets, loss, constants, **given)
    torch.testing.assert_close(out.loss.double(), want.mean(), **CLOSE)
    out.loss.backward()
    want.mean().backward()
    for name in inputs:
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, **CLOSE)
    each = function(ours, labels, loss, *constants, cu_seqlens=offsets, reduction="none", **given)
    torch.testing.assert_close(each.loss.detach().double(), want.detach(), **CLOSE)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 5),
    ignore_index=st.sampled_from([-100, 3, 2**40]),
    dtype=st.sampled_from([WIDE, torch.float32, torch.bfloat16]),
)
def test_any_ragged_batch(seed, groups, ignore_index, dtype):
    generator = torch.Generator().manual_seed(seed)
    inputs, labels, offsets, constants = of_ragged(own, generator, groups, dtype)
    if ignore_index == 3:
        labels = torch.where(labels == 3, 4, labels)
    theirs = leaves(inputs, torch.float64)
    want = plain(theirs, labels, offsets, own, constants).sum()
    want.backward()
    renamed = labels.masked_fill(labels == -100, ignore_index)
    ours = leaves(inputs, dtype)
    out = from_hidden(
        ours,
        renamed,
        own,
        *constants,
        cu_seqlens=offsets,
        ignore_index=ignore_index,
        reduction="sum",
        chunk_bytes=1,
    )
    out.loss.backward()
    allowed = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype)
    plainly = leaves(inputs, dtype)  # logits rounded to bfloat16, the rest in float32
    if allowed is None:
        rounded = plain(plainly, labels, offsets, own, [c.float() for c in constants]).sum()
        rounded.backward()
    for name in ("hidden", "weight"):
        exact = theirs[name].grad
        bar = allowed or 1.25 * relative_error(plainly[name].grad, exact) + 2**-8
        assert relative_error(ours[name].grad, exact) < bar
    assert relative_error(out.loss, want) < (
        allowed or 1.25 * relative_error(rounded, want) + 2**-8
    )


def test_mpo_is_the_fused_loss():
    from mpo_kernels import linear_mpo_loss

    generator = torch.Generator().manual_seed(4)
    inputs, labels, offsets, (gap,) = of_ragged(losses.MPO(), generator, 4, torch.float32)
    ours, fused = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
    gap = gap.float()
    out = from_hidden(ours, labels, losses.MPO(1.5), gap, cu_seqlens=offsets)
    want = linear_mpo_loss(
        fused["hidden"], fused["weight"], labels, gap, bias=fused["bias"], beta=1.5,
        cu_seqlens=offsets,
    )  # fmt: skip
    out.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(ours["hidden"].grad, fused["hidden"].grad)
    torch.testing.assert_close((out.scores.means()[0] - out.scores.means()[1]), want.reward_gap)


@pytest.mark.parametrize("function", ["logits", "linear"])
def test_a_single_sequence_is_a_batch(function):
    """Its sum and its count are then of one element each."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5)
    labels, offsets = torch.tensor([-100, 1, 2, 3]), torch.tensor([0, 4], dtype=torch.int32)
    given = (hidden, weight) if function == "linear" else (hidden @ weight.T,)
    call = linear_sequence_loss if function == "linear" else sequence_loss
    out = call(*given, labels, losses.SFT(per="sequence"), cu_seqlens=offsets)
    logps = (hidden @ weight.T).log_softmax(-1)[1:].gather(1, labels[1:, None])
    torch.testing.assert_close(out.loss, -logps.mean())
    torch.testing.assert_close(out.scores.tokens, torch.tensor([[3.0]]))


def test_dense_rows_and_token_outputs():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, 5, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    labels = torch.randint(VOCAB, (4, 5), generator=generator)
    out = linear_sequence_loss(hidden, weight, labels, losses.SimPO(), token_outputs=True)
    same = sequence_loss(hidden @ weight.T, labels, losses.SimPO(), token_outputs=True)
    torch.testing.assert_close(out, same)
    assert out.tokens.entropy.shape == (4, 5) and not out.scores.logps.requires_grad
    rows = torch.arange(20).view(4, 5)[:, 1:].reshape(-1)
    offsets = torch.arange(5, dtype=torch.int32) * 4
    gathered = linear_sequence_loss(
        hidden.view(20, WIDTH), weight, labels[:, 1:].reshape(-1), losses.SimPO(), rows=rows,
        cu_seqlens=offsets,
    )  # fmt: skip
    direct = linear_sequence_loss(hidden[:, 1:], weight, labels[:, 1:], losses.SimPO())
    torch.testing.assert_close(gathered, direct)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not meet")
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_compiled_whole_with_a_loss_of_the_user(function):
    generator = torch.Generator().manual_seed(6)
    inputs, labels, offsets, constants = of_ragged(own, generator, 3, torch.float32)
    constants = [constant.float() for constant in constants]
    ours, compiled_inputs = leaves(inputs, torch.float32), leaves(inputs, torch.float32)
    function(ours, labels, own, *constants, cu_seqlens=offsets).loss.backward()

    def step(inputs):
        return function(inputs, labels, own, *constants, cu_seqlens=offsets).loss

    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(compiled_inputs).backward()
    for name in inputs:
        torch.testing.assert_close(compiled_inputs[name].grad, ours[name].grad)


def test_a_batch_loss_may_be_had_without_validation():
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(7)).requires_grad_()
    out = sequence_loss(
        logits,
        torch.ones(4, 3).long(),
        lambda s: s.logps[0] - s.logps[0].mean(),
        reduction="sum",
        validate=False,
    )
    assert abs(float(out.loss)) < 1e-5


@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_a_sequence_without_a_scored_token_is_refused(function):
    inputs, labels, offsets, _ = of_ragged(losses.SimPO(), torch.Generator().manual_seed(8), 2)
    labels[offsets[2] : offsets[3]] = -100
    with pytest.raises(ValueError, match="Sequence 2 has no scored position"):
        function(leaves(inputs), labels, losses.SimPO(), cu_seqlens=offsets)


@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_a_loss_that_computes_in_float64_is_handed_out_in_float32(function):
    """A graph has room for no more."""
    inputs, labels, offsets, _ = of_ragged(losses.SimPO(), torch.Generator().manual_seed(9), 2)
    loss = losses.Custom(lambda scores: scores.logps.double().square().sum(0))
    given = leaves(inputs, torch.float32)
    for reduction in ("mean", "none"):
        out = function(given, labels, loss, cu_seqlens=offsets, reduction=reduction)
        assert out.loss.dtype == torch.float32


def test_a_loss_with_a_parameter_is_refused_behind_a_head():
    """The loop over chunks would give it no gradient."""
    inputs, labels, offsets, _ = of_ragged(losses.SimPO(), torch.Generator().manual_seed(9), 2)
    factor = torch.ones((), dtype=WIDE, requires_grad=True)
    loss = losses.Custom(lambda scores: factor * scores.means().sum(0))
    with pytest.raises(ValueError, match="holds a tensor that requires a gradient"):
        from_hidden(leaves(inputs), labels, loss, cu_seqlens=offsets)
