"""`rows`: hidden states that are gathered where they are used, bit for bit as those that the caller
gathers."""

import pytest
import torch
from cases import INTERPRETED, labels_of

import mpo_kernels
from mpo_kernels.ops import chunks

P, N, V, D = 2, 11, 37, 8
LENGTHS = [4, 3, 5, 4]
OFFSETS = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
M = int(OFFSETS[-1])
LABELS = labels_of((M,), V, mask="none").index_fill_(0, torch.tensor([2, 9]), -100)
GAP = torch.tensor([0.3, -0.2])
ROWS = {
    "each at most once": torch.randperm(M + 3, generator=torch.Generator().manual_seed(1))[:M],
    "two answers share the last row of their prompt": torch.tensor(
        [3, 0, 1, 2, 4, 5, 6, 3, 7, 8, 9, 10, 4, 2, 1, 0]
    ),
    "one row for all": torch.full((M,), 5),
}


def tensors(dtype, rows, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(max(N, int(rows.max()) + 1), D, generator=generator)
    weight, bias = torch.randn(V, D, generator=generator), torch.randn(V, generator=generator)
    return [
        tensor.to(dtype).requires_grad_(grad)
        for tensor, grad in zip((hidden, weight, bias), (True, not frozen, not frozen), strict=True)
    ]


def pairs(hidden, weight, bias, **options):
    out = mpo_kernels.linear_mpo_loss(
        hidden, weight, LABELS, GAP, bias=bias, cu_seqlens=OFFSETS, token_outputs=True, **options
    )
    return out.loss.sum(), *out[1:4], *out.tokens


def logprobs(hidden, weight, bias, **options):
    options.pop("reduction", None)
    out = mpo_kernels.linear_token_logprobs(hidden, weight, LABELS, bias=bias, **options)
    return (out * torch.linspace(-1, 2, M)).sum(), out.detach()


def statistics(hidden, weight, bias, **options):
    options.pop("reduction", None)
    out = mpo_kernels.linear_token_statistics(hidden, weight, LABELS, bias=bias, **options)
    return out.logprobs.square().sum(), out.logprobs.detach(), out.entropy, out.is_argmax


def run(call, dtype, rows, frozen, **options):
    """Results and gradients with `rows`, and of hidden states that were gathered before."""
    both = []
    for gathers in (False, True):
        leaves = tensors(dtype, rows, frozen)
        hidden, *head = leaves
        if gathers:
            value, *others = call(hidden[rows], *head, **options)
        else:
            value, *others = call(hidden, *head, rows=rows, **options)
        value.backward(torch.tensor(3.0, dtype=value.dtype))
        both.append([value.detach(), *others, *(t.grad for t in leaves if t.requires_grad)])
    return both


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [pairs, logprobs, statistics])
def test_bit_for_bit_as_gathered_by_the_caller(call, dtype, frozen, name):
    if INTERPRETED and call is statistics:
        pytest.skip("the interpreter is slow")
    got, want = run(call, dtype, ROWS[name], frozen, softcap=5.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("multiple", [1, 4, 128], ids="chunks of {} rows".format)
def test_in_pieces(multiple, reduction, monkeypatch):
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", multiple)
    got, want = run(
        pairs, torch.bfloat16, ROWS["one row for all"], False, chunk_bytes=1, reduction=reduction
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_caller_s_own_ignore_index():
    rows, labels = ROWS["one row for all"], LABELS.where(LABELS != -100, 7)
    hidden, weight, _ = tensors(torch.float32, rows, False)
    got = mpo_kernels.linear_token_logprobs(hidden, weight, labels, rows=rows, ignore_index=7)
    want = mpo_kernels.linear_token_logprobs(hidden[rows], weight, labels, ignore_index=7)
    assert torch.equal(got, want) and not got[2]


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not meet")
@pytest.mark.parametrize("call", [pairs, logprobs])
def test_compiled(call):
    torch._dynamo.reset()
    rows = ROWS["two answers share the last row of their prompt"]
    want, _ = run(call, torch.float32, rows, False)
    got, _ = run(
        torch.compile(call, fullgraph=True, backend="aot_eager"), torch.float32, rows, False
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS["one row for all"].int(), r"rows is torch.int32 \(16,\); needed is int64"),
        (ROWS["one row for all"][None], r"rows is torch.int64 \(1, 16\); needed is int64 of shape"),
        (ROWS["one row for all"][:-1], r"rows has shape \(15,\) and labels \(16,\)"),
        (ROWS["one row for all"] + 6, r"rows\[0\] is 11; rows must be in \[0, 11\).*16 are not"),
        (torch.arange(M) - 1, r"rows\[0\] is -1; rows must be in \[0, 11\).*5 are not"),
        (ROWS["one row for all"].tolist(), "rows must be a tensor, not list"),
    ],
    ids=["dtype", "shape", "length", "too large", "negative", "list"],
)
@pytest.mark.parametrize("call", [pairs, logprobs, statistics])
def test_refused(call, rows, message):
    hidden, weight, bias = tensors(torch.float32, torch.zeros(1), False)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, bias, rows=rows)


def test_hidden_states_in_sequences_are_refused():
    hidden, weight, _ = tensors(torch.float32, torch.zeros(1), False)
    with pytest.raises(ValueError, match=r"hidden has shape \(1, 11, 8\); with rows it is \[N,"):
        mpo_kernels.linear_token_logprobs(
            hidden[None], weight, LABELS, rows=ROWS["one row for all"]
        )
