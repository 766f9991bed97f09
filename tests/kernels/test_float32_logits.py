"""`logits_dtype=torch.float32`: half-precision products that hand out the float32 logits that they
sum up, against the float64 oracle."""

import dataclasses

import pytest
import torch
from cases import INTERPRETED, labels_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle
from mpo_kernels.ops import chunks
from mpo_kernels.ops.projection import Head, _wide_product

P, T, D, V = 2, 5, 24, 111
GAP = torch.tensor([0.3, -0.2])
LABELS = labels_of((2 * P, T), V)
# of results, and of gradients whose logits' gradients are rounded once
ERROR = {torch.bfloat16: (2e-6, 4e-3), torch.float16: (2e-6, 6e-4)}


def tensors(dtype):
    """Hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((2 * P, T, D), (V, D), (V,))
    ]


def logprobs(module, hidden, weight, bias, **options):
    return module.linear_token_logprobs(hidden, weight, LABELS, bias=bias, **options)


def entropies(module, hidden, weight, bias, **options):
    if module is oracle:
        return oracle.token_entropy(torch.nn.functional.linear(hidden, weight, bias), LABELS)
    return module.linear_token_statistics(
        hidden, weight, LABELS, bias=bias, entropy_grad=True, **options
    ).entropy


def mpo_loss(module, hidden, weight, bias, **options):
    gap = GAP.to(torch.promote_types(hidden.dtype, torch.float32))
    return module.linear_mpo_loss(hidden, weight, LABELS, gap, bias=bias, **options)[0]


def sequence_loss(module, hidden, weight, bias, **options):
    if module is oracle:
        return mpo_loss(oracle, hidden, weight, bias)
    given = hidden, weight, LABELS, losses.MPO(), GAP
    return module.linear_sequence_loss(*given, bias=bias, **options).loss


FUNCTIONS = (logprobs, entropies, mpo_loss, sequence_loss)


@pytest.mark.parametrize("rows", [4, 128], ids=["in pieces", "one chunk"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_never_rounded(function, dtype, frozen, rows, monkeypatch):
    """Results as of float32; gradients are rounded once on their way to the other two products."""
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", rows)
    monkeypatch.setattr("mpo_kernels.ops.projection.PRODUCT_COLUMNS", 32)
    ours = [t.requires_grad_(not place or not frozen) for place, t in enumerate(tensors(dtype))]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in ours]
    got = function(mpo_kernels, *ours, chunk_bytes=1, logits_dtype=torch.float32)
    want = function(oracle, *exact)
    of_results, of_gradients = ERROR[dtype]
    assert got.dtype == torch.float32
    assert relative_error(got.detach(), want.detach()) < of_results
    (got.sum() * 64).backward()
    (want.sum() * 64).backward()
    for one, other in zip(ours, exact, strict=True):
        if other.requires_grad:
            assert one.grad.dtype == dtype and relative_error(one.grad, other.grad) < of_gradients


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_gradients_keep_to_the_range_of_float16(frozen):
    """A large weight behind a small scale: the logits' gradients are small, those of the hidden
    states are not. They are scaled before they are rounded."""
    hidden, weight, bias = tensors(torch.float16)
    ours = [hidden.requires_grad_(), (weight * 4096).requires_grad_(not frozen), bias]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in ours]
    logprobs(mpo_kernels, *ours, logits_dtype=torch.float32, logit_scale=2**-12).sum().backward()
    logprobs(oracle, *exact, logit_scale=2**-12).sum().backward()
    assert relative_error(hidden.grad, exact[0].grad) < ERROR[torch.float16][1]


def test_a_second_backward_finds_what_the_first_one_found():
    """What is kept for backward is as it was."""
    ours = [t.requires_grad_() for t in tensors(torch.bfloat16)]
    got = logprobs(mpo_kernels, *ours, logits_dtype=torch.float32).sum()
    first = torch.autograd.grad(got, ours, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(got, ours), first))


def test_the_budget_counts_four_bytes():
    _, weight, _ = tensors(torch.bfloat16)
    head, hidden = Head(weight, None, None, V * 1024, torch.float32), weight[:1]
    assert head.rows_per_chunk(hidden, None) == 256
    assert dataclasses.replace(head, logits_dtype=None).rows_per_chunk(hidden, None) == 512


class Products(TorchDispatchMode):
    """The dtypes of the results of matrix products inside."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.skipif(INTERPRETED, reason="asks what torch does, not kernels")
@pytest.mark.parametrize("hip", [None, "6.4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_product_is_rounded(device, hip, monkeypatch):
    """cuBLAS hands out its sums; ROCm and a CPU multiply what was widened."""
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode(), Products() as products:
        hidden, weight, bias = (
            torch.empty(shape, dtype=torch.bfloat16, device=device)
            for shape in ((5, 8), (30, 8), (30,))
        )
        # a slice of a fake tensor of a GPU asks for the GPU, so not by way of a Projection
        _wide_product(hidden, weight, bias, torch.empty(5, 30, device=device))
    assert products.dtypes and set(products.dtypes) == {torch.float32}
