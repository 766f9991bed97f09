"""Weights of 0: whatever a filler holds, it counts 0 and gives 0, in values and in gradients."""

from unittest import mock

import pytest
import torch
from cases import INTERPRETED

from mpo_kernels import losses, mpo_loss, retention_loss, sequence_loss
from mpo_kernels.functional import linear_mpo_loss
from mpo_kernels.sequence_losses import linear_sequence_loss

INFINITE = losses.Custom(lambda scores: (scores.logps + 7).log().sum(0))
"""NaN, with a gradient, for unlikely answers."""
WEIGHTS = torch.tensor([1.0, 0.0, 2.0])
SECOND = torch.tensor([1, 4])  # its sequences


def batch(generator=None):
    """Three pairs whose log-probabilities are small but those of the second one, which are huge or
    not finite."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 3, 4, generator=generator) * 0.1
    weight, bias = torch.randn(9, 4, generator=generator) * 0.1, torch.zeros(9)
    labels = torch.randint(7, (6, 3), generator=generator)
    bias[8] = float("-inf")
    labels[SECOND, 1] = 8  # log-probability -inf
    return [t.requires_grad_() for t in (hidden, weight, bias)], labels


def of_logits(kind, leaves, labels, constants, **options):
    hidden, weight, bias = leaves
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if kind == "mpo":
        return mpo_loss(logits, labels, *constants, **options)
    return sequence_loss(logits, labels, INFINITE, **options)


def of_hidden(kind, leaves, labels, constants, **options):
    hidden, weight, bias = leaves
    if kind == "mpo":
        return linear_mpo_loss(hidden, weight, labels, *constants, bias=bias, **options)
    return linear_sequence_loss(hidden, weight, labels, INFINITE, bias=bias, **options)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [128, 6, 2], ids=["one chunk", "many", "pieces"])
@pytest.mark.parametrize("function", [of_logits, of_hidden])
@pytest.mark.parametrize("kind", ["mpo", "sequences"])
def test_a_filler_whose_loss_is_no_number(kind, function, rows, reduction, compiled):
    """The others' losses and gradients are those of a call without it."""
    if compiled and (INTERPRETED or rows == 2):
        pytest.skip("torch.compile and the interpreter do not meet")
    name = "pair_weights" if kind == "mpo" else "weights"
    kept, gap = torch.tensor([0, 2, 3, 5]), torch.tensor([0.3, 0.1, -0.2])
    options = {"reduction": reduction}
    if function is of_hidden:
        options["chunk_bytes"] = 1
    results = []
    for rest in (True, False):
        leaves, labels = batch()
        given, groups = (leaves, slice(None))
        if rest:
            given, labels, groups = [leaves[0][kept], *leaves[1:]], labels[kept], [0, 2]

        def step(given, labels, groups):
            weights = {name: WEIGHTS[groups]}
            out = function(kind, given, labels, [gap[groups]], **weights, **options)
            return out.loss.sum()

        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        with mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", rows):
            loss = step(given, labels, groups)
            loss = loss * len(WEIGHTS[groups]) if reduction == "mean" else loss
            loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    (_, hidden, _, bias), (_, same_hidden, _, same_bias) = results
    assert not same_hidden[SECOND].any() and hidden[0].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert bias.isfinite().all() and same_bias.isfinite().all()


@pytest.mark.parametrize("rows", [128, 2], ids=["one chunk", "pieces"])
@pytest.mark.parametrize("function", [of_logits, of_hidden])
def test_a_row_of_weight_0_whose_label_is_impossible(function, rows):
    leaves, labels = batch()
    row_weights = torch.ones(labels.shape)
    row_weights[SECOND, 1] = 0.0
    chunk = {"chunk_bytes": 1} if function is of_hidden else {}
    with mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", rows):
        out = function("sequences", leaves, labels, [], row_weights=row_weights, **chunk)
        out.loss.backward()
    assert out.loss.isfinite() and out.scores.logps.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[0].grad[SECOND, 1].any() and leaves[0].grad[SECOND, 0].any()


def test_a_filler_of_the_retention_loss():
    hidden = torch.ones(2, 3, 4)
    hidden[1, 1] = float("inf")
    hidden.requires_grad_()
    given = {"reference": torch.zeros(2, 4), "sequence_weights": torch.tensor([1.0, 0.0])}
    loss = retention_loss(hidden, **given)
    loss.backward()
    assert float(loss.detach()) == 0.5 and not hidden.grad[1].any() and hidden.grad[0].all()


def test_who_is_no_filler_is_refused():
    leaves, labels = batch()
    row_weights = torch.ones(labels.shape)
    row_weights[SECOND, 1] = 0.0  # so that the scores are finite
    leaves[2].data[labels[0, 0]] = -20.0  # and the loss of the first pair none
    for function in (of_logits, of_hidden):
        with pytest.raises(ValueError, match="for group 0, whose scores and constants are finite"):
            function("sequences", leaves, labels, [], row_weights=row_weights, weights=WEIGHTS)
