"""Float16's narrow range: no factor of a gradient, from the least to the largest that a model
meets, may overflow or vanish on the way."""

import pytest
import torch
from cases import labels_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle
from mpo_kernels.ops import chunks, gradients
from mpo_kernels.ops.chunks import Targets
from mpo_kernels.ops.linear_tokens import linear_token_logprobs_op
from mpo_kernels.ops.projection import Head, Needs, Projection
from mpo_kernels.options import LogitOptions, Wanted

P, T, D, V = 2, 6, 8, 211
GAP = torch.tensor([0.3, -0.2])
FACTORS = {
    "logit_scale": (1e-4, 0.0625, 260.0, 1e4),
    "softcap": (0.5, 30.0, 1e4),
    "beta": (1e-6, 1e6),
    "pair_weights": (1e-8, 1e8),
    "weight": (2.0**-12, 2.0**12),
}


def inputs(size):
    """hidden and weight whose products float16 holds exactly, so that rounded logits cannot differ;
    weight of about `size`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (2 * P, T, D), generator=generator) / 2 / size
    weight = torch.randint(-4, 5, (V, D), generator=generator) / 8 * size
    return hidden.half(), weight.half(), labels_of((2 * P, T), V)


def check(ours, loss, exact, wanted, bar):
    """The gradients of a loss whose upstream gradient, as a GradScaler's, brings the exact ones to
    about 100."""
    exact_grads = torch.autograd.grad(wanted, exact)
    for leaf, want in zip(ours, exact_grads, strict=True):
        scale = 100 / want.abs().max()
        (grad,) = torch.autograd.grad(loss, leaf, scale.to(loss.dtype), retain_graph=True)
        assert grad.dtype == torch.float16 and torch.isfinite(grad).all()
        assert relative_error(grad, want * scale) < bar


@pytest.mark.parametrize(
    ("factor", "value"), [(name, value) for name, values in FACTORS.items() for value in values]
)
@pytest.mark.parametrize(
    ("rows", "frozen"),
    [(16, False), (5, False), (5, True)],
    ids=["a chunk a pair", "in pieces", "in pieces, frozen"],
)
def test_pairs(factor, value, rows, frozen, monkeypatch):
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", rows)
    hidden, weight, labels = inputs(value if factor == "weight" else 1.0)
    options = (
        {}
        if factor == "weight"
        else {factor: torch.full((P,), value) if factor == "pair_weights" else value}
    )
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss = mpo_kernels.linear_mpo_loss(*ours, labels, GAP, chunk_bytes=1, **options).loss
    wanted = oracle.linear_mpo_loss(*exact, labels, GAP.double(), **options)[0]
    count = 1 if frozen else 2
    check(ours[:count], loss, exact[:count], wanted, 1e-3)


@pytest.mark.parametrize("value", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("factor", ["weights", "row_weights", "logit_scale"])
@pytest.mark.parametrize(
    ("rows", "frozen"),
    [(256, False), (16, False), (5, False), (5, True)],
    ids=["one chunk", "a chunk a group", "in pieces", "in pieces, frozen"],
)
def test_groups(factor, value, rows, frozen, monkeypatch):
    """A loss with two coefficients per pair, which are not known before its last piece."""
    if factor == "logit_scale":
        value = {1e-8: 1e-4, 1e8: 1e4}.get(value, value)
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", rows)
    hidden, weight, labels = inputs(1.0)
    of = {"weights": torch.full((P,), value), "row_weights": torch.full(labels.shape, value)}
    options = {factor: of.get(factor, value)}
    scale = value if factor == "logit_scale" else 1.0
    linear = losses.Custom(lambda s: (s.logps * s.logps.new_tensor([[1.0], [-0.3]])).sum(0))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss = mpo_kernels.linear_sequence_loss(*ours, labels, linear, chunk_bytes=1, **options).loss
    logps = oracle.linear_token_logprobs(*exact, labels, logit_scale=scale)
    chosen, rejected = logps.sum(1).view(2, P)
    wanted = (chosen - 0.3 * rejected).mean() * (value if factor != "logit_scale" else 1.0)
    count = 1 if frozen else 2
    check(ours[:count], loss, exact[:count], wanted, 1e-3)


@pytest.mark.parametrize(
    ("factor", "value"),
    [(name, value) for name in ("logit_scale", "softcap", "weight") for value in FACTORS[name]],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_tokens(factor, value, frozen):
    hidden, weight, labels = inputs(value if factor == "weight" else 1.0)
    options = {} if factor == "weight" else {factor: value}
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    loss = (mpo_kernels.linear_token_logprobs(*ours, labels, **options) * upstream).sum()
    wanted = (oracle.linear_token_logprobs(*exact, labels, **options) * upstream.double()).sum()
    count = 1 if frozen else 2
    check(ours[:count], loss, exact[:count], wanted, 1e-3)


@pytest.mark.parametrize("rows", [16, 128], ids=["in pieces", "one chunk"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e4])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_entropy(frozen, size, rows, monkeypatch):
    """Its gradient alone, and one much smaller than that of the log-probabilities."""
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", rows)
    hidden, weight, labels = inputs(1.0)
    for share in (0.0, 1e-3):
        ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape) * size
        found = mpo_kernels.linear_token_statistics(*ours, labels, chunk_bytes=1, entropy_grad=True)
        loss = (found.entropy * upstream).sum() + share * found.logprobs.sum()
        logits = torch.nn.functional.linear(*exact)
        wanted = (oracle.token_entropy(logits, labels) * upstream.double()).sum()
        wanted = wanted + share * oracle.token_logprobs(logits, labels).sum()
        count = 1 if frozen else 2
        check(ours[:count], loss, exact[:count], wanted, 1e-3)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_a_scale_that_only_the_device_knows(frozen):
    """The operators get it as a tensor; a 0-d one on the CPU would be read there."""
    hidden, weight, labels = inputs(1.0)
    numbers = torch.tensor([1e4, 1.0])
    options = LogitOptions(1.0, None, numbers, None)
    rows, flat = hidden.view(-1, D), labels.view(-1)
    ours = [rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    exact = [rows.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = oracle.linear_token_logprobs(*exact, flat, logit_scale=1e4).sum()
    head, targets = Head(ours[1], None, None, None), Targets(flat, None, -100)
    loss = linear_token_logprobs_op(
        ours[0], head, targets, options, not frozen, False, frozen, Wanted(False)
    ).logp.sum()
    count = 1 if frozen else 2
    check(ours[:count], loss, exact[:count], wanted, 1e-3)


@pytest.mark.parametrize("boost", [None, torch.tensor(64.0)], ids=["as they are", "times 64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_chunk_of_the_gradients_is_rounded_to_half(dtype, boost):
    """Sums of products of half-precision numbers over chunks, exact to float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden, grads = (torch.randn(24, size, generator=generator).to(dtype) for size in (D, V))
    weight = torch.randn(V, D, generator=generator).to(dtype)
    head = Head(weight, weight[:, 0], None, None)
    sums = gradients.HeadGradients(
        hidden,
        head,
        Projection(hidden, head),
        Needs(True, True, True),
        rows=len(hidden),
        scaled_later=True,
    )
    for rows in torch.arange(24).split(5):
        sums.add(rows, grads[rows], hidden[rows], boost)
    factor = 1.0 if boost is None else 64.0
    found = sums.result(None)
    assert relative_error(found.weight, grads.double().T @ hidden.double() / factor) < 1e-6
    assert relative_error(found.bias, grads.double().sum(0) / factor) < 1e-6
    assert relative_error(found.hidden, grads.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize("boost", [None, torch.tensor(64.0)], ids=["as they are", "times 64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_one_chunk_are_rounded_once(dtype, boost, monkeypatch):
    """Straight to half precision, with the error of rounding the exact sums."""
    monkeypatch.setattr(gradients, "PRODUCT_COLUMNS", 64)
    generator = torch.Generator().manual_seed(0)
    hidden, grads = (torch.randn(24, size, generator=generator).to(dtype) for size in (D, V))
    weight = torch.randn(V, D, generator=generator).to(dtype)
    head, indices = Head(weight, weight[:, 0], None, None), torch.arange(24).flip(0)
    sums = gradients.HeadGradients(
        hidden,
        head,
        Projection(hidden, head),
        Needs(True, True, True),
        rows=24,
        scaled_later=False,
        in_one_chunk=True,
    )
    sums.add(indices, grads, hidden, boost)
    found, factor = sums.result(None), 1.0 if boost is None else 64.0
    assert not found.pending.numel()
    for name, exact in {
        "hidden": (grads.double() @ weight.double()).flip(0),
        "weight": grads.double().T @ hidden.double(),
        "bias": grads.double().sum(0),
    }.items():
        got, best = getattr(found, name), (exact / factor).to(dtype)
        assert got.dtype == dtype
        # a float32 sum that lies between two numbers may go to the other one
        assert relative_error(got, exact / factor) < 1.01 * relative_error(best, exact / factor)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_product_of_gradients_is_rounded_to_float16(device, monkeypatch):
    """Sums over the vocabulary or over rows are of any size. Only cuBLAS hands out its float32
    sums; ROCm has none of that."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeTensorMode(), Products() as products:
        grad, hidden, head = (
            torch.empty(shape, dtype=torch.float16, device=device)
            for shape in ((5, V), (5, D), (V, D))
        )
        gradients._hidden_product(grad, head, torch.float32)
        for total in (torch.empty(V, D, device=device), torch.empty_like(head)):
            gradients._add_product(total, grad, hidden, grad.sum(), overwrite=False)
            gradients._add_product(total, grad, hidden, overwrite=False)
    assert products.dtypes and set(products.dtypes) == {torch.float32}
