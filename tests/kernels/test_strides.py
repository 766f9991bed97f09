"""Every tensor of every function and of every registered operator in other memory: gaps,
transposed, off its alignment, expanded.

The numbers are the same, so the results are: bit for bit, since whoever minds a stride makes the
same steps.
"""

import functools
import inspect
from unittest import mock

import pytest
import torch
from cases import INTERPRETED, OtherStrides, labels_of, laid_out

import mpo_kernels
from mpo_kernels import losses
from mpo_kernels.ops.groups import GroupLoss, group_losses_op

P, T, V, D = 2, 3, 37, 8
OFFSETS = torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = labels_of((2 * P, T), V)
PAIRS = {"reference_gap": random(P), "pair_weights": random(P).abs()}
HEAD = {"hidden": random(2 * P, T, D), "weight": random(V, D), "labels": LABELS, "bias": random(V)}
PACKED = {"cu_seqlens": OFFSETS, "labels": LABELS.flatten()}
GATHERED = {
    "hidden": random(9, D),
    "labels": LABELS.flatten(),
    "rows": torch.arange(2 * P * T) * 5 % 9,
}
GROUPS = {
    "loss": losses.DPO(0.3),
    "constants": random(2, P),
    "weights": random(P).abs(),
    "row_weights": random(2 * P, T).abs(),
}
ALL = {"moments": True, "entropy_grad": True}
POOL = {"hidden": random(2 * P, T, D), "mask": LABELS >= 0}
REFERENCE = {"reference": random(2 * P, D), "sequence_weights": random(2 * P).abs()}
CALLS = {
    "token_logprobs": {"logits": random(2 * P, T, V), "labels": LABELS},
    "token_statistics": {"logits": random(2 * P, T, V), "labels": LABELS},
    "token_statistics, all that there is": {
        "logits": random(2 * P, T, V),
        "labels": LABELS,
        **ALL,
    },
    "mpo_loss": {"logits": random(2 * P, T, V), "labels": LABELS, **PAIRS},
    "mpo_loss packed": {"logits": random(2 * P * T, V), **PACKED, **PAIRS},
    "mpo_loss in place": {
        "logits": random(2 * P, T, V),
        "labels": LABELS,
        **PAIRS,
        "inplace_backward": True,
    },
    "linear_token_logprobs": HEAD,
    "linear_token_statistics": HEAD,
    "linear_token_statistics, all that there is": {**HEAD, **ALL},
    "linear_token_statistics, all that there is, pieces": {**HEAD, **ALL, "chunk_bytes": 1},
    "linear_mpo_loss": {**HEAD, **PAIRS},
    "linear_mpo_loss packed": {**HEAD, "hidden": random(2 * P * T, D), **PACKED, **PAIRS},
    "linear_mpo_loss, divided rows": {**HEAD, "hidden": random(2 * P * T, D), **PAIRS},
    "linear_mpo_loss none": {**HEAD, **PAIRS, "reduction": "none"},
    "linear_mpo_loss, no gradient": {**HEAD, **PAIRS, "frozen": ("hidden", "weight", "bias")},
    "linear_token_logprobs, pieces": {**HEAD, "chunk_bytes": 1},
    "linear_token_logprobs, frozen head": {**HEAD, "frozen": ("weight", "bias")},
    "linear_token_logprobs, rows": {**HEAD, **GATHERED},
    "linear_token_statistics, rows": {**HEAD, **GATHERED},
    "linear_mpo_loss, rows": {**HEAD, **GATHERED, **PACKED, **PAIRS},
    "sequence_loss": {"logits": random(2 * P, T, V), "labels": LABELS, **GROUPS},
    "sequence_loss packed": {
        "logits": random(2 * P * T, V),
        **PACKED,
        **GROUPS,
        "row_weights": random(2 * P * T).abs(),
    },
    "linear_sequence_loss": {**HEAD, **GROUPS},
    "linear_sequence_loss, pieces": {**HEAD, **GROUPS, "chunk_bytes": 1},
    "linear_sequence_loss, pieces, frozen head": {
        **HEAD,
        **GROUPS,
        "chunk_bytes": 1,
        "frozen": ("weight", "bias"),
    },
    "linear_sequence_loss, rows": {
        **HEAD,
        **GATHERED,
        **PACKED,
        **GROUPS,
        "row_weights": random(2 * P * T).abs(),
    },
    "mean_pool": POOL,
    "mean_pool packed": {
        "hidden": random(2 * P * T, D),
        "mask": POOL["mask"].flatten(),
        "cu_seqlens": OFFSETS,
    },
    "retention_loss": {**POOL, **REFERENCE},
    "retention_loss packed": {
        "hidden": random(2 * P * T, D),
        "mask": POOL["mask"].flatten(),
        "cu_seqlens": OFFSETS,
        **REFERENCE,
    },
}
TRAINED = ("logits", "hidden", "weight", "bias")
pytestmark = pytest.mark.usefixtures("only_rank")


def function_of(call):
    return getattr(mpo_kernels, call.split(",")[0].split()[0])


def called(function, arguments):
    """The constants of a loss have no keyword."""
    arguments = dict(arguments)
    if "loss" not in arguments:
        return function(**arguments)
    names = [n for n in ("logits", "hidden", "weight", "labels") if n in arguments]
    positional = [arguments.pop(n) for n in (*names, "loss", "constants")]
    return function(*positional, **arguments)


def results(call, arguments, *ways, **named):
    """All that a function returns, and the gradients."""
    with mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", 4 if "pieces" in call else 128):
        return _results(call, arguments, *ways, **named)


def _results(call, arguments, compiler=lambda f: f, upstream=lambda grad: grad):
    arguments = dict(arguments)
    frozen, inplace = arguments.pop("frozen", ()), arguments.get("inplace_backward")
    leaves = [
        t.detach().requires_grad_()
        for n, t in arguments.items()
        if n in TRAINED and n not in frozen
    ]
    arguments |= dict(
        zip([n for n in arguments if n in TRAINED and n not in frozen], leaves, strict=True)
    )
    if inplace:  # what is overwritten is no leaf, and has the strides that were asked for
        arguments["logits"] = leaves[0].clone()
    if "divided rows" in call:
        arguments["parallel"] = mpo_kernels.Parallel(
            vocab_group=torch.distributed.group.WORLD, vocab_slice=V, sequence_parallel=True
        )
    out = called(compiler(function_of(call)), arguments)
    values = [
        v
        for v in torch.utils._pytree.tree_leaves(tuple(out) if isinstance(out, tuple) else out)
        if isinstance(v, torch.Tensor)
    ]
    if leaves:
        trained = [value for value in values if value.requires_grad]
        torch.autograd.backward(
            trained,
            [upstream(torch.linspace(-1, 2, v.numel()).view(v.shape)) for v in trained],
        )
    return [v.detach() for v in values] + [leaf.grad for leaf in leaves]


@functools.cache
def expected(call):
    return results(call, CALLS[call])


def same(got, want):
    for one, other in zip(got, want, strict=True):
        # A GEMM of other strides may add in another order. Equal columns have no gradient of the
        # entropy but the rounding of log p + H.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=5e-6)


TENSORS = [
    (call, name)
    for call, arguments in CALLS.items()
    for name, a in arguments.items()
    if isinstance(a, torch.Tensor)
]


SAME_KERNELS = (
    "token_statistics",
    "token_statistics, all that there is",
    "linear_token_statistics",
    "linear_token_statistics, all that there is",
    "linear_token_statistics, rows",
    "linear_mpo_loss packed",
    "retention_loss",
    "retention_loss packed",
)
# the interpreter is slow
TRIED = [(call, name) for call, name in TENSORS if not INTERPRETED or call not in SAME_KERNELS]


@pytest.mark.parametrize("layout", ["gaps", "expanded"])
@pytest.mark.parametrize(("call", "name"), TRIED, ids=[f"{call}: {name}" for call, name in TRIED])
def test_each_tensor_of_each_function(call, name, layout):
    if (name, layout) == ("cu_seqlens", "expanded") or ("in place" in call and name == "logits"):
        pytest.skip("offsets rise, and what is overwritten has a last stride of 1")
    given = laid_out(CALLS[call][name], layout)
    contiguous = given.clone(memory_format=torch.contiguous_format)
    want = expected(call) if layout == "gaps" else results(call, CALLS[call] | {name: contiguous})
    same(results(call, CALLS[call] | {name: given}), want)


@pytest.mark.parametrize("layout", ["transposed", "offset"][: 1 if INTERPRETED else 2])
@pytest.mark.parametrize("call", [call for call in dict(TRIED) if "in place" not in call])
def test_all_tensors_at_once(call, layout):
    strided = {
        n: laid_out(a, layout) if isinstance(a, torch.Tensor) else a for n, a in CALLS[call].items()
    }
    same(results(call, strided), expected(call))


def test_no_argument_is_forgotten():
    """Each tensor of each public function is in the table above."""
    functions = [name for name in mpo_kernels.__all__ if name.islower()]
    assert len(functions) == 10
    for name in functions:
        parameters = inspect.signature(getattr(mpo_kernels, name)).parameters.values()
        tensors = {p.name for p in parameters if "Tensor" in str(p.annotation)}
        assert tensors <= {
            argument for call, argument in TENSORS if call.split(",")[0].split()[0] == name
        }, name


@pytest.mark.parametrize("layout", ["gaps", "transposed", "offset"][: 1 if INTERPRETED else 3])
def test_each_tensor_of_each_operator(layout):
    """Forward and backward, as registered."""
    seen = set()
    for call, arguments in CALLS.items():
        with OtherStrides(layout) as mode:
            got = results(call, arguments)
        same(got, expected(call))
        seen |= mode.seen
    with OtherStrides(layout) as mode:
        got = group_losses()
    same(got, group_losses())
    seen |= mode.seen
    assert seen == {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mpo_kernels::")
    }


def group_losses():
    """The operator by which graphs alone call a loss."""
    sums = random(2 * P).requires_grad_()
    groups = GroupLoss(losses.DPO(0.3), 2, random(2, P), [2], random(P).abs(), None)
    found = group_losses_op(sums, random(2 * P).abs(), groups, needs_grad=True)
    found.losses.backward(torch.linspace(-1, 2, P))
    return found.losses.detach(), found.coefficients, sums.grad


@pytest.mark.parametrize("call", dict(TRIED))
def test_an_expanded_or_strided_upstream_gradient(call):
    def constant(grad):
        return torch.tensor(0.7).expand_as(grad)

    same(
        results(call, CALLS[call], upstream=constant),
        results(call, CALLS[call], upstream=lambda g: constant(g).contiguous()),
    )
    same(results(call, CALLS[call], upstream=lambda g: laid_out(g, "gaps")), expected(call))


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not meet")
@pytest.mark.parametrize(
    "call",
    [
        *("token_statistics", "mpo_loss", "linear_token_logprobs", "linear_mpo_loss"),
        *("sequence_loss", "linear_sequence_loss", "retention_loss"),
    ],
)
def test_compiled(call):
    """All tensors strided at once, after the graph was traced with contiguous ones."""
    torch._dynamo.reset()
    compiler = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")  # noqa: E731
    strided = {
        n: laid_out(a, "gaps") if isinstance(a, torch.Tensor) else a for n, a in CALLS[call].items()
    }
    same(results(call, CALLS[call], compiler), expected(call))
    same(results(call, strided, compiler), expected(call))


def test_probabilities_by_hand():
    """Labels that are a column, and labels that one number stands for."""
    logits = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]]).log()
    for labels in (torch.tensor([[2, 0], [2, 0]])[:, 0], torch.tensor([2]).expand(2)):
        torch.testing.assert_close(
            mpo_kernels.token_logprobs(logits, labels).exp(), torch.tensor([0.7, 0.7])
        )
