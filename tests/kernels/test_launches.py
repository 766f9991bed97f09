"""What a launcher makes of its arguments: integers that it specialises kernels on (1, multiples of
16), and the device it launches on.

A GPU never sees the kernel's source but one of several programs made from it: where an integer
argument is 1, it becomes a constant of Python, and where 16 divides it, vector accesses follow. So
every entry point runs at sizes that make every integer of every kernel 1, a multiple of 16, and
neither.
"""

import ast
import contextlib
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import INTERPRETED, labels_of, regime

from benchmarks.instruments.accuracy import relative_error

if INTERPRETED:
    pytest.skip("compiles kernels, which the interpreter does not", allow_module_level=True)
pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode

import mpo_kernels
from benchmarks.instruments.launch import TARGETS as EMULATED
from benchmarks.instruments.launch import gpu_on_cpu, recorded
from benchmarks.instruments.machine_code import TARGETS
from mpo_kernels import oracle
from mpo_kernels.backends import triton as kernels
from mpo_kernels.backends.results import RowStats
from mpo_kernels.backends.triton import tiles
from mpo_kernels.backends.triton.tiles import Tile, use_tiles
from mpo_kernels.labels import IGNORED
from mpo_kernels.ops import chunks


@pytest.fixture(autouse=True)
def _launches_kernels(monkeypatch):
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")
    # chunks small enough that pairs come in pieces
    monkeypatch.setattr(chunks, "ROW_MULTIPLE", 4)


@dataclass(frozen=True)
class Sizes:
    """A call's sizes; `block` columns are a tile."""

    pairs: int
    tokens: int
    vocab: int
    hidden: int
    block: int
    ignore_index: int = -100

    def labels(self, sequences):
        """Some ignored, where a sequence keeps a scored one."""
        labels = labels_of(
            (sequences, self.tokens), self.vocab, mask="some" if self.tokens > 1 else "none"
        )
        # a label that may be the ignored one is another one
        spare = (0 if self.ignore_index else 1) % self.vocab
        return labels.where(labels != self.ignore_index, spare).where(
            labels != -100, self.ignore_index
        )


SIZES = [
    Sizes(1, 1, 1, 1, 16, ignore_index=1),  # all that can be 1
    Sizes(1, 16, 256, 16, 16, ignore_index=16),  # all that 16 can divide: 16 programs a row too
    Sizes(3, 5, 83, 37, 16),
    Sizes(1, 1, 17, 8192, 16),  # the last tile has one column; 16 blocks of hidden units
    Sizes(16, 1, 5, 640, 8),
]


def from_logits(size, run):
    """token_statistics of one sequence, its rows whole, and mpo_loss with rows split over
    programs."""
    for sequences in (1, 2 * size.pairs):
        labels = size.labels(sequences)
        logits = regime("normal", (*labels.shape, size.vocab), labels.clamp(0, size.vocab - 1))
        ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
        if sequences == 1:
            upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
            with run(), use_tiles(stats=Tile(512, 1), grad=Tile(512, 1)):
                got = mpo_kernels.token_statistics(
                    ours,
                    labels,
                    ignore_index=size.ignore_index,
                    moments=True,
                    entropy_grad=True,
                )
                (grad,) = torch.autograd.grad(got.logprobs, ours, upstream, retain_graph=True)
                (entropy_grad,) = torch.autograd.grad(got.entropy, ours, upstream)
            want = oracle.token_logprobs(theirs, labels, ignore_index=size.ignore_index)
            yield "logprobs", got.logprobs, want
            entropy = oracle.token_entropy(theirs, labels, ignore_index=size.ignore_index)
            yield "entropy", got.entropy, entropy
            moments = oracle.token_moments(theirs, labels, ignore_index=size.ignore_index)
            yield from zip(("log of sum p^2", "mean logit"), got[3:], moments, strict=True)
            yield "gradient", grad, torch.autograd.grad(want, theirs, upstream.double())[0]
            want = torch.autograd.grad(entropy, theirs, upstream.double())[0]
            yield "gradient of the entropy", entropy_grad, want
    gap = torch.linspace(-1, 1, size.pairs)
    with run(), use_tiles(stats=Tile(size.block, 1), grad=Tile(size.block, 1)):
        out = mpo_kernels.mpo_loss(
            ours, labels, gap, ignore_index=size.ignore_index, pair_weights=gap + 2
        )
        (grad,) = torch.autograd.grad(out.loss, ours)
    want, *_ = oracle.mpo_loss(
        theirs, labels, gap.double(), ignore_index=size.ignore_index, pair_weights=gap.double() + 2
    )
    yield "loss", out.loss, want
    yield "gradient of the loss", grad, torch.autograd.grad(want, theirs)[0]


def from_hidden(size, run):
    """linear_token_logprobs and linear_mpo_loss in pieces of 4 rows, of which 5 and 9 leave one
    over."""
    generator = torch.Generator().manual_seed(0)
    labels = size.labels(2 * size.pairs)
    hidden = torch.randn(*labels.shape, size.hidden, generator=generator)
    weight = torch.randn(size.vocab, size.hidden, generator=generator) * size.hidden**-0.5
    gap = torch.linspace(-1, 1, size.pairs)
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    options = {"ignore_index": size.ignore_index}
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    with run(), use_tiles(stats=Tile(64, 1), grad=Tile(64, 1)):
        loss = mpo_kernels.linear_mpo_loss(*ours, labels, gap, chunk_bytes=1, **options).loss
        grads = torch.autograd.grad(loss, ours)
        logp = mpo_kernels.linear_token_logprobs(*ours, labels, chunk_bytes=1, **options)
        grads += torch.autograd.grad(logp, ours, upstream)
    wanted = oracle.linear_mpo_loss(*theirs, labels, gap.double(), **options)[0]
    wanted_logp = oracle.linear_token_logprobs(*theirs, labels, **options)
    wanted_grads = torch.autograd.grad(wanted, theirs) + torch.autograd.grad(
        wanted_logp, theirs, upstream.double()
    )
    yield "linear loss", loss, wanted
    yield "linear logprobs", logp, wanted_logp
    for got, want in zip(grads, wanted_grads, strict=True):
        yield "linear gradient", got, want


def pooled(size, run):
    """mean_pool of rows with and without a stride."""
    generator = torch.Generator().manual_seed(0)
    for step in (1, 3):
        rows = torch.randn(size.pairs * size.tokens, step * size.hidden, generator=generator)[
            :, : size.hidden
        ]
        offsets = torch.arange(0, rows.shape[0] + 1, size.tokens, dtype=torch.int32)
        ours, theirs = rows.detach().requires_grad_(), rows.double().requires_grad_()
        with run():
            pool = mpo_kernels.mean_pool(ours, cu_seqlens=offsets)
            (grad,) = torch.autograd.grad(pool.sum(), ours)
        want = oracle.mean_pool(theirs, cu_seqlens=offsets)
        yield "pool", pool, want
        yield "gradient of the pool", grad, torch.autograd.grad(want.sum(), theirs)[0]


def divided(size, run):
    """What ranks exchange: partials of slices of the vocabulary, sums of parts of the sequences."""
    labels = size.labels(size.pairs)
    logits = regime("normal", (*labels.shape, size.vocab), labels.clamp(0, size.vocab - 1))
    rows = labels.reshape(-1).masked_fill(labels.reshape(-1) == size.ignore_index, IGNORED)
    options = {"logit_scale": 1.0, "softcap": None}
    want = oracle.token_logprobs(logits.double(), labels, ignore_index=size.ignore_index).view(-1)
    for parts in (1, 16, 3) if size.tokens < 16 else (3,):
        slices = [s for s in logits.tensor_split(parts, -1) if s.shape[-1]]
        starts = [0, *torch.tensor([s.shape[-1] for s in slices]).cumsum(0)[:-1].tolist()]
        locals_ = [rows.where(rows == IGNORED, rows - start) for start in starts]
        shares = [
            local.where((rows == IGNORED) | ((local >= 0) & (local < part.shape[-1])), -7)
            for local, part in zip(locals_, slices, strict=True)
        ]
        with run():
            partials = [
                kernels.logprob_partials(part, local, **options)
                for part, local in zip(slices, shares, strict=True)
            ]
            logp, *_ = kernels.combine(torch.stack(partials), rows, size.vocab)
            more = [
                kernels.logprob_partials(part, local, **options, moments=True)
                for part, local in zip(slices, shares, strict=True)
            ]
            moments = kernels.combine(torch.stack(more), rows, size.vocab, moments=True).moments
        yield "combined", logp, want
        both = oracle.token_moments(logits.double(), labels, ignore_index=size.ignore_index)
        yield "combined moments", moments, torch.stack(both, -1).view(-1, 2)
    offsets = torch.arange(0, rows.numel() + 1, size.tokens, dtype=torch.int32)
    with run():
        sums = kernels.sequence_sums(want.float(), rows, offsets)
    scored = (labels != size.ignore_index).sum(1).double()
    yield "sums", sums, torch.stack([want.view(labels.shape).sum(1), scored], 1)
    sums, gap = torch.tensor([[-6.0, 3], [-1, 2]]), torch.tensor([0.25])
    zero = torch.zeros(1, dtype=torch.int64)
    for here in (0, 1):  # rows of the only pair that this rank of a context has
        offsets = torch.tensor([0, here, here], dtype=torch.int32)
        with run():
            found = kernels.pair_loss(
                sums[:here, 0], zero[:here], offsets, gap, None, beta=2.0, sums=sums
            )
            row_grad = kernels.row_grads(
                found.gap_grads, sums[:, 1].contiguous(), zero[:here], offsets
            )
        yield "loss of a pair", found.losses, (2.0 * torch.tensor([-2 + 0.5]).double() - 0.25) ** 2
        yield (
            "gradients of its rows",
            row_grad,
            torch.full((here,), 4 * (2 * -1.5 - 0.25) / 3).double(),
        )


ENTRIES = [from_logits, from_hidden, pooled, divided]


def name(size):
    return "-".join(map(str, vars(size).values()))


@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_every_entry_point_at_every_kind_of_integer(entry, size):
    for what, got, want in entry(size, lambda: gpu_on_cpu("sm_90")):
        assert got.shape == want.shape
        torch.testing.assert_close(
            got.detach().double(),
            want.detach(),
            rtol=2e-5,
            atol=2e-5,
            msg=lambda text, what=what: f"{what}: {text}",
        )
        if "gradient" in what:
            assert relative_error(got, want.detach()) < 1e-5 or float(want.norm()) < 1e-5, what


def all_launches(target):
    """Every launch of the calls above; nothing runs, so numbers are arbitrary."""
    launches = []

    @contextlib.contextmanager
    def run():
        with recorded(target) as these:
            yield
        launches.extend(these)

    for entry in ENTRIES:
        for size in SIZES:
            list(entry(size, run))
    return launches


def kind(value):
    return "1" if value == 1 else "multiple of 16" if value % 16 == 0 else "neither"


def integers(launch):
    """Arguments that are integers at run time: {(kernel, name, kind)}."""
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    return {
        (launch.kernel.__name__, name, kind(value))
        for name, value in launch.bound.items()
        if type(value) is int and name not in constants
    }


def kernels_of_the_package():
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")
    ]
    return {
        value.__name__: value
        for m in modules
        for key, value in vars(m).items()
        if key.endswith("_kernel")
    }


def test_the_sizes_make_every_integer_of_every_kernel_of_every_kind():
    met = set().union(*map(integers, all_launches("sm_90")))
    for name, kernel in kernels_of_the_package().items():
        numbers = {n for k, n, _ in met if k == name}
        pointers = {p.name for p in kernel.params if p.name.endswith("_ptr") or p.is_constexpr}
        floats = {"logit_scale", "softcap", "inverse_softcap", "beta"}
        assert numbers == {p.name for p in kernel.params} - pointers - floats
        # always the same number
        numbers -= {"ignore_index"}
        missing = {(n, k) for n in numbers for k in ("1", "multiple of 16", "neither")} - {
            (n, k) for kn, n, k in met if kn == name
        }
        assert not missing, (name, missing)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_every_kind_of_integer(target):
    """Greedily few launches that have every kind of every integer, as each target's compiler gets
    them."""
    launches = all_launches(target)
    open_kinds = set().union(*map(integers, launches))
    while open_kinds:
        best = max(launches, key=lambda launch: len(integers(launch) & open_kinds))
        best.compiled()
        open_kinds -= integers(best)


@pytest.mark.parametrize("target", EMULATED)
def test_one_row_that_several_programs_share(target):
    """Each of 8200 tokens is as likely as the others."""
    with gpu_on_cpu(target) as launches:
        logp = mpo_kernels.token_logprobs(torch.zeros(1, 8200), torch.tensor([0]))
    assert [launch.kernel for launch in launches] == ["_logprob_stats_kernel", "_combine_kernel"]
    assert float(logp) == pytest.approx(-9.0119, abs=1e-4)


@pytest.fixture
def current_device(monkeypatch):
    """Two GPUs for a PyTorch without CUDA: a list whose only item is the current one. Tensors are
    fake."""
    current = [0]

    def exchange(index):
        before = current[0]
        current[0] = index if index >= 0 else before
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tiles, "_architecture", tiles._architecture.__wrapped__)
    monkeypatch.setattr(tiles, "_multiprocessors", tiles._multiprocessors.__wrapped__)
    return current


def backend_calls(device):
    """Each function of the backend, with tensors on `device`."""

    def floats(*shape):
        return torch.empty(*shape, device=device)

    labels = torch.empty(4, dtype=torch.int64, device=device)
    offsets = torch.empty(3, dtype=torch.int32, device=device)
    mask = torch.empty(4, dtype=torch.uint8, device=device)
    head = {"logit_scale": 1.0, "softcap": None}
    logits = floats(2, 2, 9000)
    yield "logprob_stats", (logits, labels), head
    wanted = {"token_outputs": True, "moments": True}
    yield "logprob_stats", (floats(2, 2, 30), labels), {**head, **wanted}
    yield "logprob_partials", (logits, labels), head
    yield "combine", (floats(2, 4, 4), labels, 9), {}
    stats = RowStats(floats(4), floats(4, 2), floats(4), None)
    yield "logprob_grad", (logits, labels, stats, floats(4), logits), head
    entropy_grad = {**head, "entropy_grad": floats(4)}
    yield "logprob_grad", (logits, labels, stats, floats(4), logits), entropy_grad
    yield "sequence_sums", (floats(4), labels, offsets), {}
    yield (
        "pair_loss",
        (floats(4), labels, offsets, floats(1), floats(1)),
        {"beta": 1.0},
    )
    yield "row_grads", (floats(1), floats(2), labels, offsets), {}
    yield "pool", (floats(4, 8), mask, offsets), {}
    yield "unpool", (floats(2, 8), None, offsets, floats(2), floats(4, 8)), {}


def test_every_launch_is_on_its_tensors_device(current_device, monkeypatch):
    """A launcher takes the current device, whatever its tensors' is."""
    seen = []

    def run(kernel, *arguments, **options):
        seen.append(
            (
                kernel.__name__,
                current_device[0],
                {a.device.index for a in arguments if isinstance(a, torch.Tensor)},
            )
        )

    monkeypatch.setattr(type(kernels.logprob._combine_kernel), "run", run)
    with FakeTensorMode():
        for device in (1, 0):
            for function, arguments, options in backend_calls(torch.device("cuda", device)):
                before = len(seen)
                getattr(kernels, function)(*arguments, **options)
                assert len(seen) > before, function
                assert all(
                    current == device and devices == {device}
                    for _, current, devices in seen[before:]
                ), seen[before:]
                assert current_device == [0]
        assert {name for name, *_ in seen} == set(kernels_of_the_package())
        assert {function for function, *_ in backend_calls("cpu")} == set(kernels.__all__)
        logp, labels, offsets = (
            torch.empty(4, device="cuda:1"),
            torch.empty(4, dtype=torch.int64, device="cuda:0"),
            torch.empty(3),
        )
        with pytest.raises(
            ValueError,
            match=(
                "_sequence_sums_kernel got tensors on cpu, cuda:0, cuda:1; a kernel runs on one"
                " device"
            ),
        ):
            kernels.sequence_sums(logp, labels, offsets)


def test_nothing_launches_but_launch():
    """No kernel of the package is started by its own brackets, and none is made without
    `kernel`."""
    for path in Path(kernels.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert path.name == "launch.py", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert [ast.unparse(decorator) for decorator in node.decorator_list] == [
                    "kernel"
                ], node.name
