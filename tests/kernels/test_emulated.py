"""The code that Triton compiles for GPUs, run through the package's own launches on an emulator,
against the float64 oracle.

Each launch is also searched for races, accesses out of bounds or off their alignment, and reads of
what nobody wrote: `gpu_on_cpu` raises on any.
"""

import pytest
import torch
from cases import INTERPRETED, REGIMES, check_softcap, infinities, labels_of, regime

from benchmarks.instruments.accuracy import relative_error

if INTERPRETED:
    pytest.skip("compiles kernels, which the interpreter does not", allow_module_level=True)
pytest.importorskip("triton")

import mpo_kernels
from benchmarks.instruments.launch import TARGETS, gpu_on_cpu
from mpo_kernels import oracle
from mpo_kernels.backends import triton as kernels
from mpo_kernels.backends.triton.tiles import TILES, Tile, use_tiles

GAP = torch.tensor([0.3, -0.2])
# of a gradient that is rounded once
ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SMALL = {"stats": Tile(64, 2), "grad": Tile(64, 1)}  # several blocks to a row, several programs too


@pytest.fixture(autouse=True)
def _launches_kernels(monkeypatch):
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")


def tiles_of(target):
    return {name: TILES[name].get(target, TILES[name]["default"]) for name in ("stats", "grad")}


def check(target, logits, labels, tiles, inplace=False, **options):
    """mpo_loss forward and backward; returns the launches."""
    ours, theirs = (
        logits.detach().clone().requires_grad_(),
        logits.detach().double().requires_grad_(),
    )
    if logits.stride() != ours.stride():
        ours = logits.detach().requires_grad_()
    expected, *_, gap = oracle.mpo_loss(theirs, labels, GAP.double(), **options)
    expected.backward(torch.tensor(1.7, dtype=torch.float64))
    given = ours * 1 if inplace else ours
    with gpu_on_cpu(target) as launches, use_tiles(**tiles):
        out = mpo_kernels.mpo_loss(given, labels, GAP, inplace_backward=inplace, **options)
        out.loss.backward(torch.tensor(1.7))
    torch.testing.assert_close(out.loss.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.reward_gap.double(), gap.detach(), rtol=1e-4, atol=1e-5)
    assert relative_error(ours.grad, theirs.grad) < ERROR[logits.dtype]
    return launches


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("vocab", [127, 256])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 20.0, "logit_scale": 1.1}], ids=["plain", "softcap"]
)
def test_loss_and_gradient(target, dtype, vocab, options):
    labels = labels_of((4, 3), vocab)
    launches = check(
        target, regime("normal", (4, 3, vocab), labels).to(dtype), labels, SMALL, **options
    )
    # rows were split over programs
    assert [x.kernel for x in launches].count("_combine_kernel") == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("vocab", [12288, 12301])
def test_the_tiles_that_ship(target, vocab):
    labels = labels_of((4, 1), vocab, mask="none")
    launches = check(
        target, regime("normal", (4, 1, vocab), labels).bfloat16(), labels, tiles_of(target)
    )
    stats = next(x for x in launches if x.kernel == "_logprob_stats_kernel")
    assert stats.num_warps == tiles_of(target)["stats"].num_warps
    if vocab % 16 == 0:
        assert "ld.global.v4.b32" in stats.ptx  # 128 bits a thread


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_sliced_logits_and_in_place(target, inplace):
    labels = labels_of((4, 4), 200)
    whole = regime("normal", (4, 5, 200), labels_of((4, 5), 200)).bfloat16()
    check(
        target,
        whole if inplace else whole[:, :-1],
        labels_of((4, 5), 200) if inplace else labels,
        SMALL,
        inplace=inplace,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.6}, {"logit_scale": 1.1}, {"softcap": 20.0, "logit_scale": 0.9, "beta": 1.4}],
    ids=str,
)
def test_numbers_on_the_device(target, options, monkeypatch):
    """A pointer in the place of a float."""
    monkeypatch.setattr("mpo_kernels.options.is_plain", lambda tensor: False)
    labels = labels_of((4, 3), 200)
    logits = regime("normal", (4, 3, 200), labels)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with gpu_on_cpu(target), use_tiles(**SMALL):
        loss = mpo_kernels.mpo_loss(
            ours, labels, GAP, **{name: torch.tensor(value) for name, value in options.items()}
        ).loss
        loss.backward()
    expected = oracle.mpo_loss(theirs, labels, GAP.double(), **options)[0]
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert relative_error(ours.grad, theirs.grad) < ERROR[torch.float32]


@pytest.mark.parametrize("name", REGIMES)
def test_regimes(name):
    labels = labels_of((4, 2), 150)
    logits = regime(name, (4, 2, 150), labels)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    with gpu_on_cpu("sm_90"), use_tiles(**SMALL):
        logp = mpo_kernels.token_logprobs(ours, labels)
        logp.backward(upstream)
    expected = oracle.token_logprobs(theirs, labels)
    expected.backward(upstream.double())
    torch.testing.assert_close(logp.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(ours.grad, theirs.grad) < ERROR[torch.float32]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("softcap", [5.0, 30.0, 1e4])
def test_softcap_below_at_and_beyond_it(target, softcap):
    """A small vocabulary; compiled code may fuse multiplications and additions."""
    for size in (1.0, softcap, 100 * softcap):
        check_softcap(softcap, 1.0, size, gpu_on_cpu(target))


@pytest.mark.parametrize(("target", "softcap"), [("sm_80", None), ("sm_90", 5.0), ("sm_100", None)])
def test_infinities_at_every_place(target, softcap):
    cases = infinities(100)
    logits, labels = (
        torch.stack([z for z, _ in cases.values()]),
        torch.tensor([y for _, y in cases.values()]),
    )
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with gpu_on_cpu(target), use_tiles(stats=Tile(32, 1), grad=Tile(64, 1)):
        got = mpo_kernels.token_statistics(
            ours, labels, softcap=softcap, moments=True, entropy_grad=True
        )
        (got.logprobs + got.entropy).sum().backward()
    logp = oracle.token_logprobs(theirs, labels, softcap=softcap)
    entropy = oracle.token_entropy(theirs, labels, softcap=softcap)
    (logp + entropy).sum().backward()
    moments = oracle.token_moments(logits.double(), labels, softcap=softcap)
    for found, want in zip(
        (got.logprobs, got.entropy, *got[3:], ours.grad),
        (logp, entropy, *moments, theirs.grad),
        strict=True,
    ):
        torch.testing.assert_close(
            found.detach().double(), want.detach(), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    assert torch.equal(
        got.is_argmax, oracle.token_is_argmax(logits.double(), labels, softcap=softcap)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_token_outputs(target):
    labels = labels_of((4, 3), 300)
    logits = regime("normal", (4, 3, 300), labels)
    for tiles in (SMALL, tiles_of(target)):
        ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
        with gpu_on_cpu(target), use_tiles(**tiles):
            got = mpo_kernels.token_statistics(ours, labels, moments=True, entropy_grad=True)
            (got.logprobs.sum() - 0.7 * got.entropy.sum()).backward()
        want = oracle.token_logprobs(theirs, labels) - 0.7 * oracle.token_entropy(theirs, labels)
        want.sum().backward()
        assert relative_error(ours.grad, theirs.grad) < ERROR[torch.float32]
        moments = oracle.token_moments(logits.double(), labels)
        for found, moment in zip(got[3:], moments, strict=True):
            torch.testing.assert_close(found.double(), moment, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            got.logprobs.detach().double(),
            oracle.token_logprobs(logits.double(), labels),
            rtol=1e-5,
            atol=1e-5,
        )
        torch.testing.assert_close(
            got.entropy.detach().double(),
            oracle.token_entropy(logits.double(), labels),
            rtol=1e-4,
            atol=1e-5,
        )
        assert torch.equal(got.is_argmax, oracle.token_is_argmax(logits, labels))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
def test_from_hidden_states(target, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(4, 5, 16, generator=generator),
        torch.randn(160, 16, generator=generator),
    )
    labels = labels_of((4, 5), 160)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with gpu_on_cpu(target), use_tiles(**SMALL):
        mpo_kernels.linear_mpo_loss(*leaves, labels, GAP, chunk_bytes=1).loss.backward(
            torch.tensor(1.7)
        )
    oracle.linear_mpo_loss(*exact, labels, GAP.double())[0].backward(
        torch.tensor(1.7, dtype=torch.float64)
    )
    for got, want in zip(leaves[: 1 if frozen else 2], exact, strict=False):
        assert relative_error(got.grad, want.grad) < 1e-5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", [64, 37])
def test_retention(target, size):
    generator = torch.Generator().manual_seed(0)
    hidden, pooled = (
        torch.randn(3, 9, size, generator=generator),
        torch.randn(3, size, generator=generator),
    )
    mask = torch.rand(3, 9, generator=generator) < 0.6
    mask[:, 0] = True
    ours, theirs = hidden.bfloat16().requires_grad_(), hidden.bfloat16().double().requires_grad_()
    with gpu_on_cpu(target):
        loss = mpo_kernels.retention_loss(ours, pooled, mask=mask)
        loss.backward()
    expected = oracle.retention_loss(theirs, pooled.double(), mask=mask)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative_error(ours.grad, theirs.grad) < ERROR[torch.bfloat16]


@pytest.mark.parametrize(
    "row_stride", [2**30 + 32, 2**31 + 16], ids=["row * stride beyond 2^31", "stride beyond 2^31"]
)
def test_addresses_beyond_two_to_the_31(row_stride):
    """Four rows far apart: the memory between them is reserved and never touched, so it costs
    nothing."""
    vocab = 130
    labels = torch.tensor([[5], [129], [0], [64]])
    far = torch.empty(3 * row_stride + vocab, dtype=torch.bfloat16).as_strided(
        (4, 1, vocab), (row_stride, vocab, 1)
    )
    far.copy_(regime("normal", (4, 1, vocab), labels))
    with gpu_on_cpu("sm_90"), use_tiles(**SMALL):
        logp = mpo_kernels.token_logprobs(far, labels)
    torch.testing.assert_close(
        logp.double(), oracle.token_logprobs(far.double(), labels), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("positions_are_far", [False, True], ids=["far batches", "far positions"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_beyond_two_to_the_31(positions_are_far, inplace):
    """Logits are read and their gradient is written where 32 bits do not reach."""
    vocab, far = 70, 2**30 + 32
    shape, stride = (
        ((1, 4, vocab), (16, far, 1)) if positions_are_far else ((4, 1, vocab), (far, 16, 1))
    )

    def reserved():
        return torch.empty(3 * far + vocab, dtype=torch.bfloat16).as_strided(shape, stride)

    labels = torch.tensor([5, 69, 0, 64])
    logits = reserved()
    logits.copy_(regime("normal", shape, labels.view(shape[:2])))
    theirs = logits.double().requires_grad_()
    oracle.token_logprobs(theirs, labels.view(shape[:2])).sum().backward()
    out = logits if inplace else reserved()
    options = {"logit_scale": 1.0, "softcap": None}
    with gpu_on_cpu("sm_90"), use_tiles(**SMALL):
        stats = kernels.logprob_stats(logits, labels, **options)
        kernels.logprob_grad(logits, labels, stats, torch.ones(4), out, **options)
    assert relative_error(out, theirs.grad) < ERROR[torch.bfloat16]


def test_pool_beyond_two_to_the_31():
    size, far = 40, 2**30 + 32
    hidden = torch.empty(3 * far + size, dtype=torch.bfloat16).as_strided((4, size), (far, 1))
    hidden.copy_(torch.randn(4, size, generator=torch.Generator().manual_seed(0)))
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    with gpu_on_cpu("sm_90"):
        pooled = mpo_kernels.mean_pool(hidden, cu_seqlens=offsets)
    torch.testing.assert_close(
        pooled.double(),
        oracle.mean_pool(hidden.double(), cu_seqlens=offsets),
        rtol=1e-5,
        atol=1e-5,
    )


def test_more_rows_than_a_second_grid_axis_holds():
    """A GPU takes at most 65,535 programs along its second and third axis; the first one takes
    2^31."""
    rows, vocab = 70_000, 20
    labels = torch.arange(rows)[None] % vocab
    logits = torch.randn(1, rows, vocab, generator=torch.Generator().manual_seed(0))
    chosen = (0, 65_535, 65_536, rows - 1)
    with gpu_on_cpu("sm_90", programs=chosen) as launches:
        logp = mpo_kernels.token_logprobs(logits, labels)
    assert launches[0].grid == (rows,)
    expected = oracle.token_logprobs(logits.double(), labels)
    torch.testing.assert_close(logp[0, chosen].double(), expected[0, chosen], rtol=1e-5, atol=1e-5)
