"""Every refused call and what its caller is told."""

import itertools
from unittest import mock

import pytest
import torch
from cases import INTERPRETED
from test_strides import CALLS, TENSORS, called, function_of, results

from mpo_kernels import (
    Parallel,
    linear_mpo_loss,
    linear_sequence_loss,
    linear_token_logprobs,
    losses,
    mean_pool,
    mpo_loss,
    retention_loss,
    sequence_loss,
    token_logprobs,
)
from mpo_kernels.losses import handles

LOGITS = torch.zeros(4, 3, 7)
LABELS = torch.ones(4, 3, dtype=torch.int64)
GAP = torch.zeros(2)
HIDDEN, WEIGHT = torch.zeros(4, 3, 5), torch.zeros(7, 5)
PACKED = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
SIDES = ("reference_gap", "pair_weights", "reference", "sequence_weights")
EMPTY = LABELS.clone().index_fill_(0, torch.tensor([2]), -100)


def bad_label(value):
    labels = LABELS.clone()
    labels[1, 2] = value
    return labels


REFUSED = [
    (
        lambda: token_logprobs(LOGITS.long(), LABELS),
        "logits has dtype torch.int64; needed is one of",
    ),
    (lambda: token_logprobs([1.0], LABELS), "logits must be a tensor, not list"),
    (
        lambda: token_logprobs(LOGITS, LABELS.float()),
        "labels have dtype torch.float32; needed is int64",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS[:, :2]),
        r"logits has shape \(4, 3, 7\) and labels \(4, 2\)",
    ),
    (lambda: token_logprobs(LOGITS[..., :0], LABELS), "its last dimension is empty"),
    (lambda: token_logprobs(LOGITS, LABELS.to("meta")), "labels are on meta and logits on cpu"),
    (
        lambda: token_logprobs(LOGITS, bad_label(7)),
        r"labels\[1, 2\] is 7; labels must be in \[0, 7\) or the ignore_index -100",
    ),
    (lambda: token_logprobs(LOGITS, bad_label(-1)), r"labels\[1, 2\] is -1"),
    (lambda: token_logprobs(LOGITS, LABELS, softcap=0.0), "softcap is 0.0; it must be positive"),
    (
        lambda: token_logprobs(LOGITS, LABELS, softcap=torch.tensor([3.0])),
        r"softcap is torch.float32 \(1,\); needed is a number, or",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, softcap=torch.tensor(0.0)),
        "softcap is 0.0; it must be positive",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, logit_scale=torch.tensor(True)),
        "logit_scale is torch.bool",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, logit_scale=torch.tensor(float("nan"))),
        "logit_scale is nan; it must be finite",
    ),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, beta=torch.tensor(1.0, device="meta")),
        "beta is on meta; needed is a number, or a tensor",
    ),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, beta=torch.ones((), requires_grad=True)),
        "beta requires a gradient, which is not computed",
    ),
    (
        lambda: linear_mpo_loss(
            HIDDEN, WEIGHT, LABELS, GAP, logit_scale=torch.ones((), requires_grad=True)
        ),
        "logit_scale requires a gradient",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, logit_scale=float("inf")),
        "logit_scale must be a finite Python number, not inf",
    ),
    (
        lambda: token_logprobs(LOGITS.clone().requires_grad_(), LABELS, inplace_backward=True),
        "are a leaf",
    ),
    (
        lambda: token_logprobs(LOGITS.mT, torch.ones(4, 7).long(), inplace_backward=True),
        "last stride is 1",
    ),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, beta=None),
        "beta must be a finite Python number, not None",
    ),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, reduction="batchmean"),
        "reduction is 'batchmean'; it can be 'mean', 'sum' or 'none'",
    ),
    (lambda: mpo_loss(LOGITS[:3], LABELS[:3], GAP), "3 sequences cannot be pairs"),
    (lambda: mpo_loss(LOGITS[:0], LABELS[:0], GAP), "holds no sequence"),
    (lambda: mpo_loss(LOGITS[0], LABELS[0], GAP), "For packed rows"),
    (
        lambda: mpo_loss(LOGITS, LABELS, torch.zeros(3)),
        r"reference_gap is torch.float32 \(3,\); needed is a float tensor of shape \(2,\)",
    ),
    (lambda: mpo_loss(LOGITS, LABELS, 0.5), "reference_gap must be a tensor, not float"),
    (lambda: mpo_loss(LOGITS, LABELS, None), "reference_gap must be a tensor, not NoneType"),
    (
        lambda: mpo_loss(LOGITS, LABELS, torch.tensor([0.0, float("nan")])),
        r"reference_gap\[1\] is nan",
    ),
    (lambda: mpo_loss(LOGITS, LABELS, GAP, pair_weights=torch.ones(4)), "pair_weights is"),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, pair_weights=torch.tensor([1.0, float("inf")])),
        r"pair_weights\[1\] is inf",
    ),
    (
        lambda: mpo_loss(LOGITS, EMPTY, GAP),
        r"Sequence 2 \(rejected of pair 0\) has no scored position",
    ),
    (
        lambda: mpo_loss(LOGITS, LABELS, GAP, cu_seqlens=PACKED),
        "with cu_seqlens the packed layout is",
    ),
    (
        lambda: mpo_loss(LOGITS.view(12, 7), LABELS.view(12), GAP, cu_seqlens=PACKED.long()),
        "needed is int32",
    ),
    (
        lambda: mpo_loss(LOGITS.view(12, 7), LABELS.view(12), GAP, cu_seqlens=PACKED + 1),
        "must rise from 0 to the number of rows, 12",
    ),
    (
        lambda: mpo_loss(
            LOGITS.view(12, 7), LABELS.view(12), GAP, cu_seqlens=PACKED[[0, 2, 1, 3, 4]]
        ),
        "without falling",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT[:, :4], LABELS, GAP),
        r"weight has shape \(7, 4\); needed is \(V, 5\)",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, torch.zeros(0), LABELS, GAP),
        r"partitioned \(ZeRO-3, FSDP\). Call the loss inside the head",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT.bfloat16(), LABELS, GAP),
        "weight is torch.bfloat16 on cpu and hidden torch.float32",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, GAP, bias=torch.zeros(6)),
        r"bias has shape \(6,\); needed is \(7,\)",
    ),
    (lambda: linear_mpo_loss(HIDDEN, WEIGHT, EMPTY, GAP), "has no scored position"),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, torch.tensor([float("nan"), 0.0])),
        r"reference_gap\[0\] is nan",
    ),
    (
        lambda: linear_mpo_loss(
            HIDDEN, WEIGHT, LABELS, GAP, pair_weights=torch.tensor([1.0, -float("inf")])
        ),
        r"pair_weights\[1\] is -inf",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, GAP, parallel=object()),
        "parallel is object; needed is a mpo_kernels.Parallel",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, parallel="world"),
        "parallel is str; needed is a mpo_kernels.Parallel",
    ),
    (lambda: linear_mpo_loss(HIDDEN, WEIGHT, bad_label(9), GAP), r"labels\[5\] is 9"),
    (lambda: linear_token_logprobs(HIDDEN, WEIGHT, bad_label(9)), r"labels\[5\] is 9"),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, GAP, chunk_bytes=0),
        "chunk_bytes is 0; it must be a positive int, or None",
    ),
    (
        lambda: linear_token_logprobs(HIDDEN, WEIGHT, LABELS, logits_dtype=torch.float64),
        "logits_dtype is torch.float64; it can be torch.float32, or None",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, GAP, logits_dtype=torch.bfloat16),
        "logits_dtype is torch.bfloat16; it can be torch.float32, or None",
    ),
    (
        lambda: linear_token_logprobs(
            HIDDEN.double(), WEIGHT.double(), LABELS, logits_dtype=torch.float32
        ),
        "logits_dtype is torch.float32 and hidden torch.float64, which it would round",
    ),
    (
        lambda: linear_token_logprobs(HIDDEN, WEIGHT, LABELS, chunk_bytes=1e9),
        "chunk_bytes is 1000000000.0",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, ignore_index=None),
        "ignore_index must be an int of 64 bits, not None",
    ),
    (
        lambda: token_logprobs(LOGITS, LABELS, ignore_index=2**63),
        "ignore_index must be an int of 64 bits, not 9223372036854775808",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS.to("meta"), GAP),
        "labels are on meta and hidden on cpu",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT.to("meta"), LABELS, GAP),
        "weight is torch.float32 on meta and hidden torch.float32 on cpu",
    ),
    (
        lambda: linear_mpo_loss(HIDDEN, WEIGHT, LABELS, GAP.to("meta")),
        "reference_gap is on meta; move it to cpu",
    ),
    (lambda: Parallel(), "Parallel needs a vocab_group, a context_group or both"),
    (lambda: Parallel(vocab_slice=4), "vocab_group and vocab_slice .* go together"),
    (lambda: mean_pool(HIDDEN, mask=torch.ones(4, 3)), "mask is torch.float32"),
    (
        lambda: mean_pool(HIDDEN, mask=torch.zeros(4, 3, dtype=torch.bool)),
        "Sequence 0 has no pooled position",
    ),
    (lambda: mean_pool(HIDDEN[0]), "For packed rows"),
    (lambda: retention_loss(HIDDEN, torch.zeros(4, 6)), r"reference is torch.float32 \(4, 6\)"),
    (
        lambda: retention_loss(HIDDEN, torch.zeros(4, 5), sequence_weights=torch.ones(3)),
        "one value per sequence",
    ),
    (lambda: retention_loss(HIDDEN, torch.zeros(4, 5), reduction="max"), "reduction is 'max'"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_refused(place):
    call, message = REFUSED[place]
    with pytest.raises(ValueError, match=message):
        call()


def from_logits(logits, labels, loss, *constants, **options):
    return sequence_loss(logits, labels, loss, *constants, **options)


def in_one_chunk(logits, labels, loss, *constants, **options):
    """Of a head that hands its rows out."""
    eye = torch.eye(logits.shape[-1])
    return linear_sequence_loss(logits, eye, labels, loss, *constants, **options)


def in_the_loop(*given, **options):
    with mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", 3):
        return in_one_chunk(*given, chunk_bytes=1, **options)


def compiled(*given, **options):
    torch._dynamo.reset()
    function = torch.compile(in_one_chunk, fullgraph=True, backend="eager")
    return function(*given, **options)


SCORED = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(7))
REFERENCE = torch.zeros(2, 2)
LOSSES = (
    (0.1, (), {}, "needed is one of mpo_kernels.losses, or a function"),
    (losses.DPO(), (), {}, "DPO takes reference_logps behind the loss, and 0 were given"),
    (losses.SimPO(), (REFERENCE,), {}, "SimPO takes no constants behind the loss"),
    (losses.DPO(), (torch.zeros(3),), {}, "needed are numbers of shape (2,) or (2, 2)"),
    (losses.DPO(), (torch.zeros(2),), {}, "and the sums (2, 2)"),
    (losses.DPO(), (REFERENCE.to("meta"),), {}, "move it to cpu"),
    (
        losses.DPO(),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]),),
        {},
        "reference_logps[1, 0] is nan",
    ),
    (
        losses.SimPO(),
        (),
        {"weights": torch.tensor([1.0, float("inf")])},
        "weights[1] is inf",
    ),
    (
        losses.SimPO(),
        (),
        {"row_weights": torch.full((4, 3), float("nan"))},
        "row_weights[0, 0] is nan",
    ),
    (losses.SimPO(), (), {"weights": torch.ones(3)}, "one value per group"),
    (losses.SimPO(), (), {"row_weights": torch.ones(3)}, "of the shape of labels, (4, 3)"),
    (lambda s: s.logps, (), {}, "needed is one loss per group, (2,)"),
    (lambda s: s.logps.sum(), (), {}, "Leave the mean to reduction"),
    (lambda s: s.logps[0].detach(), (), {}, "without a gradient"),
    (lambda s: s.logps[0].long(), (), {}, "without a gradient"),
    (lambda s: 1.0, (), {}, "needed is one loss per group"),
    (lambda s: s.logps[0] - s.logps[0].mean(), (), {}, "makes groups depend on each other"),
    (lambda s: s.logps[0] - s.logps[0].mean().detach(), (), {}, "give it as a constant"),
    (
        lambda s: s.logps[0].sort(descending=True).values,
        (),
        {},
        "makes groups depend on each other",
    ),
    (lambda s: s.logps[0] * torch.rand(2)[: s.logps.shape[1]], (), {}, "or a random number"),
    (lambda s: s.logps[0] / 0 * 0, (), {}, "whose scores and constants are finite"),
    (lambda s: s.logps[0] * s.logps.max().item(), (), {}, "reads a tensor on the host (item)"),
    (lambda s: s.logps[0] * (2 if s.logps[0, 0] > 0 else 1), (), {}, "on the host (__bool__)"),
    (lambda s: s.logps[0] * float(s.tokens[0, 0]), (), {}, "on the host (__float__)"),
    (lambda s: s.logps[0] * s.tokens.tolist()[0][0], (), {}, "Choose with torch.where"),
    (losses.DPO, (), {}, "needed is one of mpo_kernels.losses, or a function"),
    (
        losses.KTO(),
        (torch.ones(4),),
        {},
        "KTO takes reference_logps, is_desirable, kl behind the loss, and 1",
    ),
    (losses.DPO(), (REFERENCE.cfloat(),), {}, "reference_logps is torch.complex64 (2, 2)"),
    (
        losses.Custom(lambda s: s.logps[0], sequences=3),
        (),
        {},
        "4 sequences cannot be groups of 3, which Custom takes",
    ),
    (losses.SimPO(), (), {"reduction": "max"}, "reduction"),
)


@pytest.mark.parametrize("function", [from_logits, in_one_chunk, in_the_loop])
@pytest.mark.parametrize("place", range(len(LOSSES)))
def test_a_loss_that_is_none(place, function):
    """Whichever way it is computed."""
    loss, constants, options, words = LOSSES[place]
    with pytest.raises(ValueError) as refusal:
        function(SCORED.clone().requires_grad_(), LABELS, loss, *constants, **options)
    assert words in str(refusal.value)


@pytest.mark.skipif(INTERPRETED, reason="torch.compile and the interpreter do not meet")
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda s: s.logps, "needed is one loss per group, (2,)"),
        (lambda s: s.logps[0].detach(), "without a gradient"),
        (lambda s: s.logps[0] - s.logps[0].mean().detach(), "give it as a constant"),
        (lambda s: s.logps[0] * s.logps.max().item(), "reads a tensor on the host (item)"),
        (lambda s: s.logps[0] / 0 * 0, "whose scores and constants are finite"),
    ],
)
def test_a_loss_that_is_none_to_a_graph(loss, words):
    """Looked at when the graph runs, which does not know what is in it."""
    with pytest.raises(ValueError) as refusal:
        compiled(SCORED.clone().requires_grad_(), LABELS, losses.Custom(loss))
    assert words in str(refusal.value)


def test_groups_that_are_coupled_over_chunks_of_one_group():
    """Each is alone in its chunk: all of them together tell."""
    with pytest.raises(ValueError, match=r"group 0 alone has .* among the others"):
        in_the_loop(
            SCORED.clone().requires_grad_(), LABELS, lambda s: s.logps[0] - s.logps[0].mean()
        )


def test_a_loss_that_is_gone():
    handle = losses.DPO().handle
    with pytest.raises(RuntimeError, match=r"The loss of this call is gone.*Make the loss once"):
        handles.from_handle(handle)


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


VIEWS_OF_LEAVES = [
    lambda x: x,
    lambda x: x[:, :-1],
    lambda x: x.view(2, 2, 3, 7),
    lambda x: x.flatten(0, 1),
    lambda x: x.transpose(0, 1),
    lambda x: x.unsqueeze(0),
    lambda x: x.chunk(2)[0],
    lambda x: x.unbind(0)[1],
    lambda x: x.narrow(1, 1, 2)[1:],
    lambda x: x.expand(4, 3, 7),
    lambda x: x.view_as(x),
    lambda x: x[:1].expand(5, 3, 7),
    lambda x: _Same.apply(x),
    lambda x: x.to(x.dtype),
    lambda x: x.contiguous(),
]


@pytest.mark.parametrize("place", range(len(VIEWS_OF_LEAVES)))
def test_a_leaf_is_not_overwritten_through_any_view(place):
    leaf = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    before, labels = (
        leaf.clone(),
        torch.ones_like(VIEWS_OF_LEAVES[place](leaf)[..., 0], dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=r"overwrite logits that are a (view of a )?leaf"):
        token_logprobs(
            VIEWS_OF_LEAVES[place](leaf.requires_grad_()), labels, inplace_backward=True
        ).sum().backward()
    assert torch.equal(leaf, before)
    head_output = leaf * 1  # the same views of what a head returned
    token_logprobs(VIEWS_OF_LEAVES[place](leaf), labels).sum().backward()
    expected, leaf.grad = leaf.grad, None
    if not _shares_memory(VIEWS_OF_LEAVES[place](head_output)):
        token_logprobs(
            VIEWS_OF_LEAVES[place](head_output), labels, inplace_backward=True
        ).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def _shares_memory(tensor):
    """Whether two elements have one address, by looking at all of them."""
    addresses = sum(
        torch.arange(n).mul(s).view(-1, *(1,) * (tensor.ndim - 1 - d))
        for d, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    )
    return addresses.unique().numel() < tensor.numel()


def test_memory_that_several_logits_share_is_not_overwritten():
    """Three rows by hand, then any strides: shared memory is refused; all else has the gradient
    that it has out of place."""
    one = torch.zeros(1, 1, 3, requires_grad=True) * 1
    with pytest.raises(
        ValueError,
        match=(
            r"memory of its own for each logit; these have shape \(2, 1, 3\) and strides \(0,"
            r" 3, 1\)"
        ),
    ):
        token_logprobs(one.expand(2, 1, 3), torch.tensor([[0], [1]]), inplace_backward=True)
    refused = 0
    for b, t in itertools.product(range(13), repeat=2):
        for shape in ((2, 3, 4), (1, 3, 4), (2, 1, 4)):
            leaf = torch.randn(60, generator=torch.Generator().manual_seed(b * t)).requires_grad_()
            labels = torch.arange(shape[0] * shape[1]).view(shape[:2]) % 4
            logits = (leaf * 1).as_strided(shape, (b, t, 1), 2)
            if _shares_memory(logits):
                refused += 1
                with pytest.raises(ValueError, match="memory of its own"):
                    token_logprobs(logits, labels, inplace_backward=True)
                continue
            try:
                token_logprobs(logits, labels, inplace_backward=True).sum().backward()
            except ValueError:  # rows that interlace may be refused too
                assert shape == (2, 3, 4) and b < 3 * t and t < 5 * b
                continue
            got, leaf.grad = leaf.grad, None
            token_logprobs((leaf * 1).as_strided(shape, (b, t, 1), 2), labels).sum().backward()
            torch.testing.assert_close(got, leaf.grad)
    assert refused > 100


@pytest.fixture
def divided():
    """Makes a DTensor over two ranks; the process group is torch's fake one, which starts no thread
    and sends nothing."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "name"), TENSORS, ids=[f"{call}: {name}" for call, name in TENSORS]
)
def test_what_is_no_plain_tensor(call, name, divided):
    """Each tensor of each function as a list, as an array, and divided over ranks."""
    arguments = {n: a for n, a in CALLS[call].items() if n != "frozen"}
    tensor, function = arguments[name], function_of(call)
    said = "reference_logps" if name == "constants" else name
    for other in (tensor.tolist(), tensor.numpy()):
        with pytest.raises(
            ValueError,
            match=f"^{said} must be a tensor, not {type(other).__name__}; torch.as_tensor",
        ):
            called(function, arguments | {name: other})
    how = (
        "Call the loss inside the head"
        if name in ("weight", "bias")
        else f"Give {said}.to_local\\(\\) and say with `parallel`"
    )
    with pytest.raises(ValueError, match=f"^{said} is a DTensor.*{how}"):
        called(function, arguments | {name: divided(tensor)})


@pytest.mark.parametrize(("call", "name"), [(c, n) for c, n in TENSORS if n in SIDES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("only_rank")
def test_side_inputs_of_another_precision_do_not_change_the_results_dtype(call, name, dtype):
    """The problem's own dtype says in what is computed."""
    tensors = {
        n: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in CALLS[call].items()
    }
    other = torch.float32 if dtype == torch.float64 else torch.float64
    want, got = results(call, tensors), results(call, tensors | {name: tensors[name].to(other)})
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_float64_is_not_computed_by_another_backend_than_the_one_forced(monkeypatch):
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")
    with pytest.raises(
        ValueError, match="MPO_KERNELS_BACKEND is triton, but the kernels do not compute in float64"
    ):
        token_logprobs(LOGITS.double(), LABELS)


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="MPO_KERNELS_BACKEND is 'cuda'; it can be auto, triton or torch"
    ):
        token_logprobs(LOGITS, LABELS)
