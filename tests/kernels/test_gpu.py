"""The kernels on a real GPU: `python -m pytest -m gpu`. What does for any device runs on the CPU
too."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import labels_of, regime
from devices import A_GPU, EVERYWHERE, needs
from test_parallel import run as run_ranks

import mpo_kernels
from benchmarks.harness import allocations
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle

BUSY = 2_000_000_000
"""Cycles of a GPU, a second or so."""
SMALLEST_CHUNK = 128
"""Rows."""


@pytest.fixture(params=EVERYWHERE)
def device(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")
    return torch.device(request.param)


@pytest.fixture
def gpu(monkeypatch):
    """For tests that no other device does for."""
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")
    return torch.device("cuda", torch.cuda.current_device())


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "vocab", [127, *(pytest.param(n, marks=A_GPU) for n in (128256, 151936, 256001))]
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_from_logits(device, dtype, vocab, softcap):
    if device.type == "cpu" and vocab > 127:
        pytest.skip("other tests have it")
    labels, gap = labels_of((4, 9), vocab), torch.tensor([0.3, -0.2])
    logits = regime("normal", (4, 9, vocab), labels).to(dtype)
    theirs, ours = logits.double().requires_grad_(), logits.to(device).requires_grad_()
    output = mpo_kernels.mpo_loss(ours, labels.to(device), gap.to(device), softcap=softcap)
    expected = oracle.mpo_loss(theirs, labels, gap.double(), softcap=softcap)[0]
    output.loss.backward()
    expected.backward()
    torch.testing.assert_close(output.loss.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    best = relative_error(theirs.grad.float().to(dtype), theirs.grad)
    assert relative_error(ours.grad.cpu(), theirs.grad) < max(1e-5, 1.25 * best)


class Problem:
    """A head and packed hidden states on the CPU: sequences of the given numbers of scored rows,
    each behind three rows that are not."""

    def __init__(self, scored, dtype=torch.float32, dim=16, vocab=61):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        lengths = torch.tensor([n + 3 for n in scored])
        self.offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        rows = int(lengths.sum())
        self.labels = torch.randint(0, vocab, (rows,), generator=generator)
        for start in self.offsets[:-1].tolist():
            self.labels[start : start + 3] = -100
        self.hidden = (normal(rows, dim) * 2 / dim**0.5).to(dtype)
        self.weight, self.bias = normal(vocab, dim).to(dtype), normal(vocab).to(dtype)
        self.upstream = normal(rows)
        # far from the gaps of these states: a small difference would show their rounding alone
        self.gap = 3 + normal(len(scored) // 2).abs()
        self.reference = -normal(2, len(scored) // 2).abs() * 9
        self.smallest_chunk = SMALLEST_CHUNK * vocab * dtype.itemsize

    def leaves(self, device, dtype=None):
        """hidden, weight and bias there, to be trained."""
        return [
            each.to(device, dtype or each.dtype).detach().clone().requires_grad_()
            for each in (self.hidden, self.weight, self.bias)
        ]


def of_tokens(problem, head, device, **options):
    hidden, weight, bias = head
    logp = mpo_kernels.linear_token_logprobs(hidden, weight, problem.labels, bias=bias, **options)
    return (logp * problem.upstream.to(device)).sum()


def of_mpo(problem, head, device, **options):
    hidden, weight, bias = head
    return mpo_kernels.linear_mpo_loss(
        hidden,
        weight,
        problem.labels,
        problem.gap.to(device),
        bias=bias,
        cu_seqlens=problem.offsets,
        **options,
    ).loss


def of_sequences(loss):
    def value(problem, head, device, **options):
        hidden, weight, bias = head
        constants = [problem.reference.to(device)] * len(loss.constants)
        return mpo_kernels.linear_sequence_loss(
            hidden,
            weight,
            problem.labels,
            loss,
            *constants,
            bias=bias,
            cu_seqlens=problem.offsets,
            **options,
        ).loss

    return value


def exact(kind, problem, softcap):
    """The loss and its gradients in float64, from the definition."""
    head = problem.leaves("cpu", torch.float64)
    logp = oracle.linear_token_logprobs(*head[:2], problem.labels, bias=head[2], softcap=softcap)
    if kind == "tokens":
        loss = (logp * problem.upstream).sum()
    else:
        sums, counts = (
            torch.stack([part.sum() for part in each.split(problem.offsets.diff().tolist())])
            for each in (logp, (problem.labels != -100).double())
        )
        scores = losses.Scores(sums.view(2, -1), counts.view(2, -1))
        if kind == "mpo":
            chosen, rejected = scores.logps / scores.tokens
            loss = (chosen - rejected - problem.gap).square().mean()
        else:
            formula = SEQUENCE_LOSSES[kind]
            constants = [problem.reference.double()] * len(formula.constants)
            loss = formula(scores, *constants).mean()
    return loss.detach(), torch.autograd.grad(loss, head)


SEQUENCE_LOSSES = {"dpo": losses.DPO(0.1), "simpo": losses.SimPO(), "orpo": losses.ORPO()}
KINDS = {
    "tokens": of_tokens,
    "mpo": of_mpo,
    **{name: of_sequences(loss) for name, loss in SEQUENCE_LOSSES.items()},
}
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative, against float64 of the same hidden states and weights: products are rounded."""

SIZES = {
    "one row": (1,),
    "one row each": (1, 1),
    "a chunk": (64, 64),
    "a chunk and a row": (128, 1),
    "two chunks and a row": (200, 57),
    "pairs that wait for their other half": (90, 7, 150, 3, 80, 260),
}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scored", SIZES.values(), ids=SIZES)
def test_from_hidden_states(device, dtype, kind, scored):
    """One chunk, whose logits are kept, and a loop over several; with a bias and without, with a
    soft-cap and without."""
    if len(scored) % 2 and kind != "tokens":
        pytest.skip("no pair")
    big = {"dim": 64, "vocab": 32001} if device.type == "cuda" else {}
    problem = Problem(scored, dtype, **big)
    for bias, softcap in ((True, None), (False, 5.0)):
        if not bias:
            problem.bias.zero_()
        loss, gradients = exact(kind, problem, softcap)
        for chunk_bytes in (None, problem.smallest_chunk):
            head = problem.leaves(device)
            given = head if bias else [*head[:2], None]
            got = KINDS[kind](problem, given, device, chunk_bytes=chunk_bytes, softcap=softcap)
            got.backward()
            where = f"bias {bias}, chunk_bytes {chunk_bytes}"
            assert relative_error(got.detach().cpu(), loss) < ERRORS[dtype], where
            names = ("hidden", "weight", "bias")
            for name, leaf, want in zip(names[: 2 + bias], head, gradients, strict=False):
                error = relative_error(leaf.grad.cpu(), want)
                assert error < ERRORS[dtype], (where, name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bitwise_equal(device, kind):
    problem = Problem(SIZES["pairs that wait for their other half"], torch.bfloat16)
    results = []
    for _ in range(3):
        head = problem.leaves(device)
        got = KINDS[kind](problem, head, device, chunk_bytes=problem.smallest_chunk)
        results.append((got, *torch.autograd.grad(got, head)))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms_are_all_there(device, kind):
    """PyTorch refuses operators that have none."""
    problem = Problem((90, 7), torch.bfloat16)
    with deterministic_algorithms():
        for chunk_bytes in (None, problem.smallest_chunk):
            head = problem.leaves(device)
            KINDS[kind](problem, head, device, chunk_bytes=chunk_bytes).backward()


def test_compiled_and_under_autocast(device):
    problem = Problem((30, 20))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    labels, offsets = problem.labels.to(device), problem.offsets.to(device)

    def loss(hidden, weight):
        return mpo_kernels.linear_mpo_loss(
            hidden, weight, labels, problem.gap.to(device), cu_seqlens=offsets
        ).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        for is_cast in (False, True):
            head = problem.leaves(device)[:2]
            with torch.autocast(device.type, torch.bfloat16, enabled=is_cast):
                value = function(*head)
            results.append((value, *torch.autograd.grad(value, head)))
    for other, bar in zip(results[1:], (3e-2, 1e-4, 3e-2), strict=True):
        for got, want in zip(other, results[0], strict=True):
            got, want = got.detach(), want.detach()
            assert got.dtype == want.dtype and relative_error(got, want) < bar


def test_memory_is_what_is_promised(device):
    """At most a tenth more than a chunk of logits, and dW and dH: summed in fp32, and rounded."""
    on_gpu = device.type == "cuda"
    dtype, of_gradients = (torch.bfloat16, 4 + 2) if on_gpu else (torch.float32, 4)
    rows, dim, vocab = (8192, 4096, 128256) if on_gpu else (1024, 64, 4096)
    chunk_bytes = 512 << 20 if on_gpu else 4 << 20
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        (torch.randn(n, dim, generator=generator, device=device) / dim**0.5)
        .to(dtype)
        .requires_grad_()
        for n in (rows, vocab)
    )
    labels = torch.randint(0, vocab, (2, rows // 2), generator=torch.Generator().manual_seed(0))
    gap = torch.zeros(1, device=device)

    def work():
        mpo_kernels.linear_mpo_loss(
            hidden.view(2, -1, dim), weight, labels, gap, chunk_bytes=chunk_bytes
        ).loss.backward()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = allocations(work)
    assert peak < 1.1 * (chunk_bytes + of_gradients * dim * (vocab + rows))


# What only a GPU has


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rows", [pytest.param(17_000, marks=A_GPU)])
def test_more_than_two_billion_logits(rows):
    """Rows times vocabulary beyond 2^31: offsets must be 64 bits wide. 4.4 GB of bf16 and as much
    of gradient."""
    vocab = 131_072
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda").requires_grad_()
    labels = torch.full((rows,), -100, device="cuda")
    labels[-1] = 7
    logp = mpo_kernels.token_logprobs(logits, labels)
    assert float(logp[-1]) == pytest.approx(-torch.tensor(float(vocab)).log().item(), rel=1e-5)
    logp.sum().backward()
    assert float(logits.grad[-1, 7]) == pytest.approx(1, rel=1e-2) and not logits.grad[0].any()


@contextmanager
def no_waiting():
    """Within it the host may not wait for the GPU, which has a second of other work to do.

    The debug mode knows the waits of PyTorch; those of the driver, as for a copy from pageable
    memory, show in that the other work has ended.
    """
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(BUSY)
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not busy.query(), "the host waited until the GPU had ended what was before"


def mark(function):
    """A test of a GPU alone."""
    for each in A_GPU:
        function = each(function)
    return function


@mark
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(gpu, dtype, kind):
    """With labels on the CPU, in one chunk and in several."""
    problem = Problem((90, 7, 150, 3), dtype)
    problem.upstream, problem.gap, problem.reference = (
        each.to(gpu) for each in (problem.upstream, problem.gap, problem.reference)
    )
    for chunk_bytes in (None, problem.smallest_chunk):
        for watch in (contextmanager(lambda: (yield)), no_waiting):
            head = problem.leaves(gpu)
            with watch():
                KINDS[kind](problem, head, gpu, chunk_bytes=chunk_bytes).backward()


@mark
def test_that_waiting_is_seen(gpu):
    numbers = torch.ones(1 << 20, device=gpu)
    with pytest.raises((RuntimeError, AssertionError)), no_waiting():
        numbers.sum().item()
    torch.cuda.synchronize()


def gradients(problem, device, kind="mpo"):
    head = problem.leaves(device)
    loss = KINDS[kind](problem, head, device, chunk_bytes=problem.smallest_chunk)
    return (loss.detach(), *torch.autograd.grad(loss, head))


def assert_same(ones, others):
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [pytest.param(2, marks=needs(2))])
@pytest.mark.usefixtures("gpu")
def test_tensors_on_the_last_gpu_while_the_first_is_current(kind, count):
    problem, last = Problem((90, 60)), torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(0):
        there = gradients(problem, last, kind)
        assert all(each.device == last for each in there)
        assert_same(there, gradients(problem, torch.device("cuda", 0), kind))


@mark
def test_on_streams_of_its_own(gpu):
    """Work goes to the stream that is current, behind what makes its inputs, and two streams do not
    touch each other."""
    problems = [Problem((90, 60)), Problem((31, 200), torch.bfloat16)]
    alone = [gradients(problem, gpu) for problem in problems]
    streams, results = [torch.cuda.Stream() for _ in problems], []
    torch.cuda.synchronize()
    for stream, problem in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY // 10)
            results.append(gradients(problem, gpu))
    torch.cuda.synchronize()
    for one, other in zip(alone, results, strict=True):
        assert_same(one, other)


@mark
@pytest.mark.parametrize("inplace", [False, True])
def test_a_cuda_graph_of_the_loss_from_logits(gpu, inplace):
    labels = labels_of((4, 9), 32001).to(gpu)
    gap = torch.tensor([0.3, -0.2], device=gpu)

    def numbers(seed):
        return torch.randn(labels.shape[0], 9, 32001, generator=torch.Generator().manual_seed(seed))

    def step(leaf):
        logits = leaf * 1.0
        loss = mpo_kernels.mpo_loss(logits, labels, gap, inplace_backward=inplace).loss
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    leaf = numbers(0).to(gpu).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(leaf)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaf)
    for seed in (1, 2):
        with torch.no_grad():
            leaf.copy_(numbers(seed).to(gpu))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(leaf))


@mark
def test_with_expandable_segments(gpu):
    """PyTorch reads the setting at its start."""
    setting = "expandable_segments:True"
    environment = {"PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    result = subprocess.run(
        [*command, "-k", "from_hidden_states or promised", Path(__file__)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs(n)) for n in (2, 4)])
def test_divided_heads_over_nccl(ranks, tmp_path):
    """A GPU for each rank: vocabulary-, context- and sequence-parallel against one process."""
    run_ranks(ranks, tmp_path, backend="nccl", MPO_KERNELS_BACKEND="auto")
