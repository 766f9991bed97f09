"""The functions under torch.compile, torch.library.opcheck, autocast and functional_call;
test_autograd.py has torch.func."""

import inspect
import shutil

import pytest
import torch
from cases import INTERPRETED, labels_of

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle
from mpo_kernels.ops.divided_rows import gathered_rows_grad_op, gathered_rows_op
from mpo_kernels.ops.gradients import scaled
from mpo_kernels.ops.groups import group_losses_op
from mpo_kernels.ops.linear_pairs import linear_pair_loss_op
from mpo_kernels.ops.linear_sequences import linear_sequence_loss_op
from mpo_kernels.ops.linear_tokens import (
    linear_token_logprobs_grad_op,
    linear_token_logprobs_op,
)
from mpo_kernels.ops.pairs import pair_loss_grad_op, pair_loss_op
from mpo_kernels.ops.pool import mean_pool_grad_op, mean_pool_op
from mpo_kernels.ops.sequences import sequence_sums_grad_op, sequence_sums_op
from mpo_kernels.ops.tokens import token_logprobs_grad_op, token_logprobs_op

if INTERPRETED:
    pytest.skip("torch.compile and the interpreter do not meet", allow_module_level=True)

P, T, V, D = 2, 5, 37, 8
LABELS = labels_of((2 * P, T), V)
GAP = torch.tensor([0.3, -0.2])
OFFSETS = torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)
HEAD = {"logit_scale": 0.5, "softcap": 4.0, "numbers": None, "parallel": 0}
BETA = {"beta": 1.5, "beta_number": None}
LINEAR = {
    **HEAD,
    "ignore_index": -100,
    "chunk_bytes": None,
    "gemm_dtype": None,
    "logits_dtype": None,
}
PAIRS = {**LINEAR, "token_outputs": True}
WANTED = {"token_outputs": True, "moments": False, "entropy_grad": False}
ALL = dict.fromkeys(WANTED, True)
STATS = {"keep_stats": True, "may_keep_logits": False, "keep_hidden_grad": False}


DPO, SIMPO = losses.DPO(0.3), losses.SimPO()
LOSS = {"loss": DPO.handle, "size": 2, "constant_rows": [2], "validate": None}


def random(*shape, grad=False):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return tensor.requires_grad_(grad)


def from_hidden(grad):
    return random(2 * P * T, D, grad=grad), random(V, D, grad=grad), random(V, grad=grad)


FLAT, REFERENCE = LABELS.reshape(-1), random(2, P)
FEW = torch.tensor([-100, 3, -100, V - 1, -100]).repeat(2 * P)  # not more scored rows than D
OPERATORS = {
    "token_logprobs": (
        token_logprobs_op,
        (random(2 * P, T, V, grad=True), FLAT),
        {**WANTED, **HEAD},
    ),
    "token_logprobs, numbers on the device": (
        token_logprobs_op,
        (random(2 * P, T, V, grad=True), FLAT),
        {**WANTED, **HEAD, "numbers": torch.tensor([0.5, 4.0])},
    ),
    "token_logprobs, all that there is": (
        token_logprobs_op,
        (random(2 * P, T, V, grad=True), FLAT),
        {**ALL, **HEAD},
    ),
    "token_logprobs_grad": (
        token_logprobs_grad_op,
        (
            random(2 * P * T),
            None,
            random(2 * P, T, V),
            FLAT,
            -random(2 * P * T).abs(),
            random(2 * P * T, 2).abs() + 1,
            None,
        ),
        HEAD,
    ),
    "token_logprobs_grad, of the entropy": (
        token_logprobs_grad_op,
        (
            random(2 * P * T),
            random(2 * P * T),
            random(2 * P, T, V),
            FLAT,
            -random(2 * P * T).abs(),
            random(2 * P * T, 2).abs() + 1,
            random(2 * P * T).abs(),
        ),
        HEAD,
    ),
    "pair_loss": (
        pair_loss_op,
        (random(2 * P * T, grad=True), FLAT, OFFSETS, GAP, GAP.abs()),
        {"beta": 1.5, "beta_number": torch.tensor(0.5), "parallel": 0},
    ),
    "pair_loss_grad": (
        pair_loss_grad_op,
        (GAP, torch.ones(2 * P), FLAT, OFFSETS),
        {},
    ),
    "sequence_sums": (
        sequence_sums_op,
        (random(2 * P * T, grad=True), FLAT, OFFSETS),
        {"parallel": 0},
    ),
    "sequence_sums_grad": (sequence_sums_grad_op, (random(2 * P), FLAT, OFFSETS), {}),
    "mean_pool": (mean_pool_op, (random(2 * P * T, D, grad=True), FLAT > 0, OFFSETS), {}),
    "mean_pool_grad": (
        mean_pool_grad_op,
        (random(2 * P, D), FLAT > 0, OFFSETS, torch.ones(2 * P)),
        {"rows": 2 * P * T, "dtype": torch.bfloat16},
    ),
    "scaled": (scaled, (random(6, 3), random(6), torch.tensor(2.0)), {"dtype": torch.bfloat16}),
    "linear_pair_loss": (
        linear_pair_loss_op,
        (*from_hidden(True), FLAT, None, OFFSETS, GAP, None),
        {
            **BETA,
            "hidden_grad": True,
            "weight_grad": True,
            "bias_grad": True,
            "may_keep_chunk": False,
            **PAIRS,
        },
    ),
    "linear_pair_loss, one chunk kept": (
        linear_pair_loss_op,
        (*from_hidden(True), FEW, None, OFFSETS, GAP, None),
        {
            **BETA,
            "hidden_grad": True,
            "weight_grad": True,
            "bias_grad": True,
            "may_keep_chunk": True,
            **PAIRS,
        },
    ),
    "linear_pair_loss, no gradient": (
        linear_pair_loss_op,
        (*from_hidden(False), FLAT, None, OFFSETS, GAP, GAP.abs()),
        {
            "beta": 1.5,
            "beta_number": None,
            "hidden_grad": False,
            "weight_grad": False,
            "bias_grad": False,
            "may_keep_chunk": True,
            **PAIRS,
        },
    ),
    "linear_pair_loss, gathered rows": (
        linear_pair_loss_op,
        (*from_hidden(True), FLAT, FLAT.abs() % 9, OFFSETS, GAP, None),
        {
            **BETA,
            "hidden_grad": True,
            "weight_grad": True,
            "bias_grad": True,
            "may_keep_chunk": False,
            **PAIRS,
        },
    ),
    "group_losses": (
        group_losses_op,
        (random(2 * P, grad=True), torch.ones(2 * P), random(2, P), GAP.abs()),
        {**LOSS, "needs_grad": True},
    ),
    "group_losses, no gradient": (
        group_losses_op,
        (random(2 * P), torch.ones(2 * P), random(2, P), None),
        {**LOSS, "needs_grad": False},
    ),
    "linear_sequence_loss": (
        linear_sequence_loss_op,
        (*from_hidden(True), FLAT, None, OFFSETS, random(2 * P * T), random(2, P), GAP.abs()),
        {**LOSS, "hidden_grad": True, "weight_grad": True, "bias_grad": True, **PAIRS},
    ),
    "linear_sequence_loss, frozen head, gathered rows": (
        linear_sequence_loss_op,
        (
            random(2 * P * T, D, grad=True),
            *from_hidden(False)[1:],
            *(FLAT, FLAT.abs() % 9, OFFSETS, None, random(2, P), None),
        ),
        {**LOSS, "hidden_grad": True, "weight_grad": False, "bias_grad": False, **PAIRS},
    ),
    "linear_sequence_loss, no gradient": (
        linear_sequence_loss_op,
        (*from_hidden(False), FLAT, None, OFFSETS, None, random(2, P), None),
        {**LOSS, "hidden_grad": False, "weight_grad": False, "bias_grad": False, **PAIRS},
    ),
    "linear_token_logprobs, gathered rows": (
        linear_token_logprobs_op,
        (*from_hidden(True), FLAT, FLAT.abs() % 9),
        {**STATS, **WANTED, **LINEAR},
    ),
    "linear_token_logprobs": (
        linear_token_logprobs_op,
        (*from_hidden(True), FLAT, None),
        {**STATS, **WANTED, **LINEAR},
    ),
    "linear_token_logprobs, float32 logits of a product in bfloat16": (
        linear_token_logprobs_op,
        (*from_hidden(True), FLAT, None),
        {
            **STATS,
            **WANTED,
            **LINEAR,
            "may_keep_logits": True,
            "gemm_dtype": torch.bfloat16,
            "logits_dtype": torch.float32,
        },
    ),
    "linear_token_logprobs, logits kept": (
        linear_token_logprobs_op,
        (*from_hidden(True), FLAT, None),
        {**STATS, **WANTED, **LINEAR, "may_keep_logits": True},
    ),
    "linear_token_logprobs, all that there is": (
        linear_token_logprobs_op,
        (*from_hidden(True), FLAT, None),
        {**STATS, **ALL, **LINEAR},
    ),
    "linear_token_logprobs, frozen head": (
        linear_token_logprobs_op,
        (random(2 * P * T, D, grad=True), *from_hidden(False)[1:], FLAT, None),
        {**STATS, "keep_stats": False, "keep_hidden_grad": True, **WANTED, **LINEAR},
    ),
    "linear_token_logprobs_grad": (
        linear_token_logprobs_grad_op,
        (
            random(2 * P * T),
            random(2 * P * T),
            -random(2 * P * T).abs(),
            random(2 * P * T, 2).abs() + 1,
            random(2 * P * T).abs(),
            random(int((FLAT != -100).sum()), V),
            *from_hidden(False),
            FLAT,
            None,
        ),
        {
            "hidden_grad": True,
            "weight_grad": True,
            "bias_grad": True,
            "are_directions": False,
            **LINEAR,
        },
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, arguments, keywords = OPERATORS[name]
    checks = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if keywords.get("may_keep_chunk") or keywords.get("may_keep_logits"):  # never under a compiler
        checks.remove("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.definition, arguments, keywords, test_utils=checks)


@pytest.fixture
def parallel():
    """Of the only rank, whose rows are divided over itself."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield mpo_kernels.Parallel(
        vocab_group=torch.distributed.group.WORLD, vocab_slice=V, sequence_parallel=True
    )
    torch.distributed.destroy_process_group()


def test_opcheck_of_divided_rows(parallel):
    for operator, rows in (
        (gathered_rows_op, random(6, D, grad=True)),
        (gathered_rows_grad_op, random(6, D)),
    ):
        torch.library.opcheck(operator.definition, (rows,), {"parallel": parallel.handle})


def test_divided_rows_compiled_without_a_graph_break(parallel):
    def function(x, h, w, b, **given):
        h = h.flatten(0, 1) if given else h
        return mpo_kernels.linear_mpo_loss(h, w, LABELS, GAP, bias=b, **given).loss

    def divided(*leaves):
        return function(*leaves, parallel=parallel)

    torch._dynamo.reset()
    compiled = torch.compile(divided, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled), value_and_grads(divided), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(value_and_grads(divided), value_and_grads(function))


def all_of(found):
    return sum(values.sum() for values in found if values.is_floating_point())


FUNCTIONS = {
    "token_logprobs": lambda x, h, w, b: mpo_kernels.token_logprobs(x, LABELS).sum(),
    "token_statistics": lambda x, h, w, b: mpo_kernels.token_statistics(x, LABELS).logprobs.sum(),
    "token_statistics, all that there is": lambda x, h, w, b: all_of(
        mpo_kernels.token_statistics(x, LABELS, moments=True, entropy_grad=True)
    ),
    "linear_token_statistics, all that there is": lambda x, h, w, b: all_of(
        mpo_kernels.linear_token_statistics(h, w, LABELS, bias=b, moments=True, entropy_grad=True)
    ),
    "mpo_loss": (
        lambda x, h, w, b: (
            mpo_kernels.mpo_loss(x[:, :-1], LABELS[:, 1:], GAP, beta=1.2, token_outputs=True).loss
        )
    ),
    "mpo_loss packed": (
        lambda x, h, w, b: mpo_kernels.mpo_loss(
            x.view(-1, V), FLAT, GAP, cu_seqlens=OFFSETS, reduction="none"
        ).loss.sum()
    ),
    "mpo_loss in place": (
        lambda x, h, w, b: mpo_kernels.mpo_loss(x * 1, LABELS, GAP, inplace_backward=True).loss
    ),
    "linear_mpo_loss": (
        lambda x, h, w, b: mpo_kernels.linear_mpo_loss(h, w, LABELS, GAP, bias=b, softcap=3.0).loss
    ),
    "linear_mpo_loss none": (
        lambda x, h, w, b: mpo_kernels.linear_mpo_loss(
            h, w, LABELS, GAP, bias=b, reduction="none"
        ).loss.sum()
    ),
    "linear_token_logprobs": (
        lambda x, h, w, b: mpo_kernels.linear_token_logprobs(h, w, LABELS, bias=b).sum()
    ),
    "linear_mpo_loss, float32 logits": lambda x, h, w, b: (
        mpo_kernels.linear_mpo_loss(
            h.bfloat16(), w.bfloat16(), LABELS, GAP, logits_dtype=torch.float32
        ).loss
    ),
    "sequence_loss": (lambda x, h, w, b: mpo_kernels.sequence_loss(x, LABELS, DPO, REFERENCE).loss),
    "linear_sequence_loss": (
        lambda x, h, w, b: (
            mpo_kernels.linear_sequence_loss(
                h, w, LABELS, DPO, REFERENCE, bias=b, softcap=3.0, token_outputs=True
            ).loss
        )
    ),
    "retention_loss": lambda x, h, w, b: mpo_kernels.retention_loss(h, torch.zeros(2 * P, D)),
}


def value_and_grads(function):
    leaves = [
        random(2 * P, T, V, grad=True),
        random(2 * P, T, D, grad=True),
        random(V, D, grad=True),
        random(V, grad=True),
    ]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_without_a_graph_break(name):
    """backend aot_eager: dynamo, fake kernels and the registered backward, without a C++
    compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled), value_and_grads(FUNCTIONS[name]), rtol=1e-6, atol=1e-6
    )


HEAD_NUMBERS = ("logit_scale", "softcap")
NUMBERS = {
    "token_logprobs": (
        lambda x, h, w, b, **n: mpo_kernels.token_logprobs(x, LABELS, **n).sum(),
        HEAD_NUMBERS,
    ),
    "token_statistics": (
        lambda x, h, w, b, **n: mpo_kernels.token_statistics(x, LABELS, **n)[0].sum(),
        HEAD_NUMBERS,
    ),
    "mpo_loss": (
        lambda x, h, w, b, **n: mpo_kernels.mpo_loss(x, LABELS, GAP, **n).loss,
        ("beta", *HEAD_NUMBERS),
    ),
    "linear_token_logprobs": (
        lambda x, h, w, b, **n: mpo_kernels.linear_token_logprobs(h, w, LABELS, bias=b, **n).sum(),
        HEAD_NUMBERS,
    ),
    "linear_token_statistics": (
        lambda x, h, w, b, **n: mpo_kernels.linear_token_statistics(h, w, LABELS, **n)[0].sum(),
        HEAD_NUMBERS,
    ),
    "linear_mpo_loss": (
        lambda x, h, w, b, **n: mpo_kernels.linear_mpo_loss(h, w, LABELS, GAP, bias=b, **n).loss,
        ("beta", *HEAD_NUMBERS),
    ),
    "linear_mpo_loss none": (
        lambda x, h, w, b, **n: mpo_kernels.linear_mpo_loss(
            h, w, LABELS, GAP, reduction="none", **n
        ).loss.sum(),
        ("beta", *HEAD_NUMBERS),
    ),
    "sequence_loss": (
        lambda x, h, w, b, **n: mpo_kernels.sequence_loss(x, LABELS, SIMPO, **n).loss,
        HEAD_NUMBERS,
    ),
    "linear_sequence_loss": (
        lambda x, h, w, b, **n: mpo_kernels.linear_sequence_loss(h, w, LABELS, SIMPO, **n).loss,
        HEAD_NUMBERS,
    ),
}
GIVEN = {
    "float": float,
    "integer": int,
    "tensor": lambda b: torch.tensor(float(b)),
    "tensor in double precision": lambda b: torch.tensor(float(b), dtype=torch.float64),
}
COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler on the CPU",
)


def graphs_of_a_changing_number(name, number, given, backend, values=4):
    """How many were made; the results are those of eager with floats."""
    function, _ = NUMBERS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def by_and_times(b, *tensors):
        return function(*tensors, **{number: 0.5 * b}) * (
            b.float() if isinstance(b, torch.Tensor) else b
        )

    compiled = torch.compile(by_and_times, fullgraph=True, backend=backend)
    for b in range(1, values + 1):
        got = value_and_grads(lambda *tensors, b=b: compiled(GIVEN[given](b), *tensors))
        want = value_and_grads(lambda *tensors, b=b: by_and_times(b, *tensors))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name, (_, numbers) in NUMBERS.items() for number in numbers],
)
def test_a_number_that_changes_is_no_constant_of_a_graph(name, number):
    """A beta that a schedule changes: never an earlier one's result, and one graph for all but the
    first."""
    assert graphs_of_a_changing_number(name, number, "float", "aot_eager") <= 2


def test_twelve_values_of_beta():
    """More than a function may be compiled."""
    assert graphs_of_a_changing_number("mpo_loss", "beta", "float", "aot_eager", values=12) <= 2


@pytest.mark.parametrize(
    ("backend", "given"),
    [*(("eager", given) for given in GIVEN), pytest.param("inductor", "float", marks=COMPILER)],
)
def test_however_a_changing_number_is_given(backend, given):
    assert graphs_of_a_changing_number("mpo_loss", "beta", given, backend) <= 2


def test_every_number_is_asked_whether_it_may_change():
    for name, (_, asked) in NUMBERS.items():
        assert {"beta", "logit_scale", "softcap"} & set(
            inspect.signature(getattr(mpo_kernels, name.split()[0])).parameters
        ) == set(asked)
    assert {name.split()[0] for name in NUMBERS} == {
        name
        for name in mpo_kernels.__all__
        if "logprobs" in name or "mpo_loss" in name or "sequence_loss" in name
    } | {
        "token_statistics",
        "linear_token_statistics",
    }


@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_for_a_number_is_that_number(name):
    function, numbers = NUMBERS[name]
    as_floats = value_and_grads(lambda *tensors: function(*tensors, **dict.fromkeys(numbers, 0.75)))
    as_tensors = value_and_grads(
        lambda *tensors: function(*tensors, **dict.fromkeys(numbers, torch.tensor(0.75)))
    )
    torch.testing.assert_close(as_tensors, as_floats, rtol=0, atol=0)


@COMPILER
def test_compiled_by_inductor_with_another_shape_after():
    torch._dynamo.reset()

    def function(h, w, labels, gap):
        out = mpo_kernels.linear_mpo_loss(h, w, labels, gap)
        return out.loss + out.reward_gap.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for pairs, tokens in ((2, 5), (3, 7)):
        h, w = random(2 * pairs, tokens, D, grad=True), random(V, D, grad=True)
        labels, gap = labels_of((2 * pairs, tokens), V), random(pairs)
        expected, got = function(h, w, labels, gap), compiled(h, w, labels, gap)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, (h, w)), torch.autograd.grad(expected, (h, w))
        )


@pytest.mark.parametrize("function", ["linear_mpo_loss", "linear_token_logprobs"])
def test_autocast(function):
    """GEMMs in bf16, everything else in fp32, and the fp32 weight's gradient in fp32: never rounded
    to bf16 on its way."""
    hidden, weight = random(2 * P, T, D, grad=True), random(V, D, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = hidden.bfloat16()  # what the autocast body hands over, beside the fp32 weight
        if function == "linear_mpo_loss":
            loss = mpo_kernels.linear_mpo_loss(mixed, weight, LABELS, GAP).loss
        else:
            loss = mpo_kernels.linear_token_logprobs(mixed, weight, LABELS).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    h, w = (
        hidden.detach().bfloat16().double().requires_grad_(),
        weight.detach().bfloat16().double().requires_grad_(),
    )
    if function == "linear_mpo_loss":
        expected = oracle.linear_mpo_loss(h, w, LABELS, GAP.double())[0]
    else:
        expected = oracle.linear_token_logprobs(h, w, LABELS).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=2e-2)
    assert relative_error(weight.grad, w.grad) < 1e-2 and relative_error(hidden.grad, h.grad) < 1e-2


def test_autocast_does_not_touch_losses_from_logits():
    logits = random(2 * P, T, V)
    plain = mpo_kernels.mpo_loss(logits, LABELS, GAP)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mpo_kernels.mpo_loss(logits, LABELS, GAP)
    assert torch.equal(plain.loss, inside.loss) and torch.equal(plain.reward_gap, inside.reward_gap)


def test_functional_call():
    head = torch.nn.Linear(D, V, bias=False)
    weight = random(V, D, grad=True)
    logits = torch.func.functional_call(head, {"weight": weight}, random(2 * P, T, D))
    mpo_kernels.mpo_loss(logits, LABELS, GAP).loss.backward()
    assert weight.grad is not None and weight.grad.any()
