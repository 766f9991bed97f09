"""What autograd, torch.func and vmap ask of the functions beyond a backward pass: the right answer,
or a refusal in one sentence.

Every public function in both layouts, with each of its tensors trained or frozen, against the
oracle in float64.
"""

import contextlib
import copy
import inspect
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import INTERPRETED, labels_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import losses, oracle

if INTERPRETED:
    pytest.skip("asks what is done with operators, not what they compute", allow_module_level=True)

P, T, V, D = 2, 3, 11, 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("mpo_kernels.ops.chunks.ROW_MULTIPLE", 4)


ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}
REFUSAL = (
    "mpo_kernels computes first derivatives in reverse mode only; mpo_kernels.oracle is plain"
    " PyTorch"
)


class Call:
    """One call of a public function with the tensors that it can train, by name; `ours` and
    `oracle` take these and return its result."""

    def __init__(
        self, function: str, packed: bool = False, dtype: torch.dtype = torch.float32, **options
    ):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        if dtype == torch.float64:  # whose logits are not to be rounded
            options.pop("logits_dtype", None)
        self.function, self.options, self.packed = function, options, packed
        from_logits = function in (
            "token_logprobs",
            "token_statistics",
            "mpo_loss",
            "sequence_loss",
        )
        rows = (2 * P * T,) if packed else (2 * P, T)
        self.tensors = {"logits": random(*rows, V)} if from_logits else {"hidden": random(*rows, D)}
        if function.startswith("linear"):
            self.tensors |= {"weight": random(V, D), "bias": random(V)}
        offsets = torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)
        self.labels = labels_of((2 * P, T), V).view(rows)
        self.layout = (
            {"cu_seqlens": offsets} if packed and function.endswith(("loss", "pool")) else {}
        )
        self.gap, self.pool = torch.tensor([0.3, -0.2]), torch.randn(2 * P, D, generator=generator)
        self.mask, self.loss = self.labels != -100, losses.MPO()
        self.dtype = dtype

    def arguments(self, tensors: dict, wide: bool) -> tuple[list, dict]:
        first, *others = tensors.values()
        side = [t.double() if wide else t for t in (self.gap, self.pool)]
        if self.function in ("mean_pool", "retention_loss"):
            positional = [first] if self.function == "mean_pool" else [first, side[1]]
            return positional, {"mask": self.mask, **self.layout, **self.options}
        positional = [
            first,
            *others[:1],
            self.labels,
            *([self.loss] if self.function.endswith("sequence_loss") and not wide else []),
            *([side[0]] if self.function.endswith("loss") else []),
        ]
        return positional, {
            **({"bias": others[1]} if others else {}),
            **self.layout,
            **self.options,
        }

    def ours(self, **tensors) -> object:
        if self.options.get("inplace_backward"):
            tensors = {name: tensor * 1 for name, tensor in tensors.items()}
        positional, options = self.arguments({**self.tensors, **tensors}, wide=False)
        return getattr(mpo_kernels, self.function)(*positional, **options)

    def value(self, **tensors) -> torch.Tensor:
        """The differentiable result."""
        result = self.ours(**tensors)
        if self.options.get("entropy_grad"):
            return result.logprobs + 0.7 * result.entropy
        return result if isinstance(result, torch.Tensor) else result[0]

    def oracle(self, **tensors) -> torch.Tensor:
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        positional, options = self.arguments({**wide, **tensors}, wide=True)
        ours_alone = ("inplace_backward", "token_outputs", "validate", "moments", "entropy_grad")
        ours_alone += ("logits_dtype", "chunk_bytes")
        options = {k: v for k, v in options.items() if k not in ours_alone}
        if self.options.get("entropy_grad"):
            logits = positional[0]
            if self.function.startswith("linear"):
                logits = torch.nn.functional.linear(*positional[:2], options.get("bias"))
            logps, entropies = (
                f(logits, self.labels) for f in (oracle.token_logprobs, oracle.token_entropy)
            )
            return logps + 0.7 * entropies
        name = self.function.replace("statistics", "logprobs").replace("sequence_loss", "mpo_loss")
        result = getattr(oracle, name)(*positional, **options)
        return result if isinstance(result, torch.Tensor) else result[0]

    def __repr__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        return f"{self.function}{options}{' packed' if self.packed else ''} {str(self.dtype)[6:]}"


def calls(dtypes=(torch.float32,)) -> list[Call]:
    """Every function, with the options that send it another way through autograd."""
    ways = [
        ("token_logprobs", {}),
        ("token_logprobs", {"inplace_backward": True}),
        ("token_statistics", {}),
        ("token_statistics", {"moments": True, "entropy_grad": True}),
        ("token_statistics", {"entropy_grad": True, "inplace_backward": True}),
        ("mpo_loss", {}),
        ("mpo_loss", {"reduction": "none", "token_outputs": True}),
        ("mpo_loss", {"inplace_backward": True, "token_outputs": True}),
        ("linear_token_logprobs", {}),
        ("linear_token_logprobs", {"logits_dtype": torch.float32}),
        ("linear_token_statistics", {}),
        ("linear_token_statistics", {"moments": True, "entropy_grad": True}),
        ("linear_mpo_loss", {"token_outputs": True}),
        ("linear_mpo_loss", {"reduction": "none", "token_outputs": True}),
        ("sequence_loss", {}),
        ("sequence_loss", {"reduction": "none", "inplace_backward": True}),
        ("linear_sequence_loss", {"token_outputs": True}),
        ("linear_sequence_loss", {"chunk_bytes": 1}),  # more than one chunk
        ("mean_pool", {}),
        ("retention_loss", {}),
    ]
    return [
        Call(name, packed, dtype, **options)
        for name, options in ways
        for packed in (False, True)
        for dtype in dtypes
    ]


def trained(call: Call) -> list[tuple[str, ...]]:
    """Choices of tensors that are trained: all, and in one of the layouts each one alone."""
    alone = [] if call.packed or len(call.tensors) == 1 else [(name,) for name in call.tensors]
    return [tuple(call.tensors), *alone]


def test_every_public_function_is_asked():
    public = {
        name for name in mpo_kernels.__all__ if inspect.isfunction(getattr(mpo_kernels, name))
    }
    assert {call.function for call in calls()} == public


def scalar(function, names):
    """`function` of a list of tensors, contracted with a fixed upstream gradient."""

    def contracted(*tensors):
        value = function(**dict(zip(names, tensors, strict=True)))
        return (value * torch.arange(1, value.numel() + 1).view(value.shape).to(value)).sum()

    return contracted


def directions(tensors):
    return tuple(torch.arange(t.numel()).view(t.shape).sin().to(t) for t in tensors)


def grad(f, xs, **options):
    leaves = [x.clone().requires_grad_() for x in xs]
    return leaves, torch.autograd.grad(f(*leaves), leaves, **options)


def penalty(f, xs):
    leaves, grads = grad(f, xs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def backward_of_a_gradient(f, xs):
    leaves, grads = grad(f, xs, create_graph=True)
    sum((g * d).sum() for g, d in zip(grads, directions(xs), strict=True)).backward()
    return [leaf.grad for leaf in leaves]


def of_one_tensor_only(f, xs):
    """The second derivative that plain autograd would find through `allow_unused`, as 0."""
    leaves, grads = grad(f, xs, create_graph=True)
    found = torch.autograd.grad((grads[0] * directions(xs)[0]).sum(), leaves[-1], allow_unused=True)
    return [torch.zeros_like(leaves[-1]) if g is None else g for g in found]


def dual(f, xs, leaf):
    xs = [x.clone().requires_grad_(leaf) for x in xs]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            f(*(forward_ad.make_dual(x, d) for x, d in zip(xs, directions(xs), strict=True)))
        ).tangent
        return [torch.zeros(()) if tangent is None else tangent.detach()]


def jvp_beneath_a_jvp(f, xs):
    """The tangent is the outer transform's, and the function is called within an inner one that
    does not know it."""

    def outer(*ys):
        return torch.func.jvp(lambda z: f(*ys) + z, (torch.zeros(()),), (torch.ones(()),))[0]

    return [torch.func.jvp(outer, tuple(xs), directions(xs))[1]]


BEYOND = {
    "hvp": lambda f, xs: functional.hvp(f, tuple(xs), directions(xs))[1],
    "vhp": lambda f, xs: functional.vhp(f, tuple(xs), directions(xs))[1],
    "hessian": lambda f, xs: sum(functional.hessian(f, tuple(xs)), ()),
    "hessian, vectorized": lambda f, xs: sum(functional.hessian(f, tuple(xs), vectorize=True), ()),
    "jvp by two backward passes": lambda f, xs: [functional.jvp(f, tuple(xs), directions(xs))[1]],
    "gradient penalty": penalty,
    "backward of a gradient": backward_of_a_gradient,
    "mixed derivative": of_one_tensor_only,
    "dual numbers": lambda f, xs: dual(f, xs, False),
    "dual numbers of leaves": lambda f, xs: dual(f, xs, True),
    "jacobian, forward": lambda f, xs: functional.jacobian(
        f, tuple(xs), vectorize=True, strategy="forward-mode"
    ),
    "func.jvp": lambda f, xs: [torch.func.jvp(f, tuple(xs), directions(xs))[1]],
    "func.jvp beneath a jvp": jvp_beneath_a_jvp,
    "func.jacfwd": lambda f, xs: torch.func.jacfwd(f, tuple(range(len(xs))))(*xs),
    "func.grad": lambda f, xs: torch.func.grad(f, tuple(range(len(xs))))(*xs),
    "func.vjp": lambda f, xs: torch.func.vjp(f, *xs)[1](torch.ones((), dtype=f(*xs).dtype)),
    "func.hessian": lambda f, xs: sum(torch.func.hessian(f, tuple(range(len(xs))))(*xs), ()),
    "gradients of each sample": lambda f, xs: torch.func.vmap(torch.func.grad(f))(
        *(torch.stack([x, x]) for x in xs)
    ),
    "gradient over samples": lambda f, xs: [
        torch.func.grad(lambda *ys: torch.func.vmap(f)(*(torch.stack([y, y]) for y in ys)).sum())(
            *xs
        )
    ],
}


def right_or_refused(call, way, names):
    """Whether it was right; a wrong or unexplained answer fails."""
    xs = [call.tensors[name] for name in names]
    try:
        got = way(scalar(call.value, names), xs)
    except NotImplementedError as refusal:
        assert REFUSAL in str(refusal)
        return False
    want = way(scalar(call.oracle, names), [x.double() for x in xs])
    assert max(map(relative_error, got, want)) < ERROR[call.dtype], "silently wrong"
    return True


@pytest.mark.parametrize("call", calls(), ids=repr)
def test_derivatives_beyond_the_first_are_right_or_refused(call):
    for names in trained(call):
        for name, way in BEYOND.items():
            # those are refused for another reason
            if not call.options.get("inplace_backward") or "samples" not in name:
                assert right_or_refused(call, way, names) is False, (
                    f"{name} of {names} works: say so in README"
                )


def test_a_graph_of_gradients_is_refused_only_when_it_is_followed():
    call = Call("linear_mpo_loss")
    (hidden,), (first,) = grad(
        lambda h: call.value(hidden=h), [call.tensors["hidden"]], create_graph=True
    )
    exact = call.tensors["hidden"].double().requires_grad_()
    (want,) = torch.autograd.grad(call.oracle(hidden=exact), exact)
    assert relative_error(first.detach(), want) < 1e-5
    with pytest.raises(NotImplementedError, match=REFUSAL):
        (call.value(hidden=hidden) + first.norm()).backward()


def test_what_refuses_keeps_no_hidden_states():
    """It holds their place in autograd's graph, not their data."""
    call = Call("linear_mpo_loss")
    leaf = call.tensors["hidden"].clone().requires_grad_()
    hidden = leaf * 2
    storage = weakref.ref(hidden.untyped_storage())
    loss = call.value(hidden=hidden)
    del hidden
    assert storage() is None
    loss.backward()
    assert leaf.grad.any()


def test_what_was_compiled_is_refused_in_forward_mode_too():
    call = Call("token_logprobs")
    compiled = torch.compile(lambda x: call.value(logits=x), backend="aot_eager", fullgraph=True)
    compiled(call.tensors["logits"])
    # torch 2.15 refuses it by itself
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{REFUSAL}|forward-mode AD tangent"):
        dual(compiled, [call.tensors["logits"]], False)


BATCHED = {
    "is_grads_batched": lambda f, xs, up: (
        lambda leaves: torch.autograd.grad(f(*leaves), leaves, up, is_grads_batched=True)
    )([x.clone().requires_grad_() for x in xs]),
    "jacobian, vectorized": lambda f, xs, up: functional.jacobian(f, tuple(xs), vectorize=True),
    "jacobian, vectorized, with a graph": lambda f, xs, up: functional.jacobian(
        f, tuple(xs), vectorize=True, create_graph=True
    ),
}


@pytest.mark.parametrize("call", calls(tuple(ERROR)), ids=repr)
def test_batched_upstream_gradients(call):
    """Several upstream gradients at once are as right as one after the other."""
    for names in trained(call) if call.dtype == torch.float32 else trained(call)[:1]:
        xs = [call.tensors[name] for name in names]

        def ours(*tensors, names=names):
            return call.value(**dict(zip(names, tensors, strict=True)))

        def exact(*tensors, names=names):
            return call.oracle(**dict(zip(names, tensors, strict=True)))

        value = ours(*xs)
        upstream = torch.randn(3, *value.shape, generator=torch.Generator().manual_seed(1)).to(
            value.dtype
        )
        for way in list(BATCHED.values())[: None if call.dtype == torch.float32 else 1]:
            if call.options.get("inplace_backward"):
                with pytest.raises(NotImplementedError, match="one place for one gradient"):
                    way(ours, xs, upstream)
                continue
            got = way(ours, xs, upstream)
            want = way(exact, [x.double() for x in xs], upstream.double())
            assert (
                max(relative_error(a.detach(), b.detach()) for a, b in zip(got, want, strict=True))
                < ERROR[call.dtype]
            )


@pytest.mark.parametrize("call", calls(), ids=repr)
def test_vmap_is_one_call_after_the_other(call):
    names = tuple(call.tensors)
    samples = [torch.stack([t, t * 0.5, -t]) for t in call.tensors.values()]

    def value(*tensors):
        return call.value(**dict(zip(names, tensors, strict=True)))

    if call.options.get("inplace_backward"):
        with pytest.raises(ValueError, match=r"inplace_backward=True .* vmap"):
            torch.func.vmap(value)(*samples)
        return
    torch.testing.assert_close(
        torch.func.vmap(value)(*samples),
        torch.stack([value(*(s[i] for s in samples)) for i in range(3)]),
    )


WITHOUT_DATA = {
    "meta": lambda: (lambda tensor: tensor.to("meta"), contextlib.nullcontext()),
    "fake": lambda: (lambda mode: (mode.from_tensor, mode))(FakeTensorMode()),
    "fake, outside of its mode": lambda: (FakeTensorMode().from_tensor, contextlib.nullcontext()),
    "fake, with symbols": lambda: (lambda mode: (mode.from_tensor, mode))(
        FakeTensorMode(shape_env=ShapeEnv())
    ),
}


def described(result):
    """Shapes, dtypes and strides of all tensors."""
    return [
        (t.shape, t.dtype, t.stride(), t.requires_grad)
        for t in tree_leaves(result)
        if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize("kind", WITHOUT_DATA)
@pytest.mark.parametrize("call", calls(), ids=repr)
def test_shapes_without_data(call, kind):
    """Results and gradients have the shapes, dtypes and strides that they have with data."""
    validated = [] if call.function.startswith("linear") else [((), {"validate": True})]
    for names, options in [((), {}), *((names, {}) for names in trained(call)), *validated]:
        with_data, without = copy.copy(call), copy.copy(call)
        with_data.options = without.options = {**call.options, **options}
        convert, mode = WITHOUT_DATA[kind]()
        for name, value in vars(call).items():
            if isinstance(value, torch.Tensor):
                setattr(without, name, convert(value))
        without.layout = {name: convert(value) for name, value in call.layout.items()}
        without.tensors = {name: convert(value) for name, value in call.tensors.items()}
        found = []
        for one, within in ((with_data, contextlib.nullcontext()), (without, mode)):
            with within:
                leaves = {name: one.tensors[name].detach().requires_grad_() for name in names}
                result = one.ours(**leaves)
                value = result if isinstance(result, torch.Tensor) else result[0]
                grads = torch.autograd.grad(value.sum(), list(leaves.values())) if names else ()
                found.append((described(result), described(grads)))
        assert found[0] == found[1]


@pytest.mark.parametrize("call", calls(), ids=repr)
def test_export(call):
    """A program of torch.export computes the same."""

    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return call.ours(**tensors)

    tensors = {name: tensor.clone() for name, tensor in call.tensors.items()}
    for strict in (False, True) if call.packed else (False,):
        program = torch.export.export(Module(), (), tensors, strict=strict)
        torch.testing.assert_close(
            tree_leaves(program.module()(**tensors)), tree_leaves(call.ours(**tensors))
        )


@pytest.mark.parametrize("call", calls(), ids=repr)
def test_detached_results_are_the_callers_to_edit(call):
    """Each in turn is overwritten: the other results stay, and the gradients are what they were."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.tensors.items()}

    def results():
        return [t for t in tree_leaves(call.ours(**leaves)) if isinstance(t, torch.Tensor)]

    untouched = results()
    grads = torch.autograd.grad(untouched[0].sum(), list(leaves.values()))
    for place, result in enumerate(untouched):
        if result.requires_grad:
            continue
        edited = results()
        edited[place].fill_(7)
        for other, (got, want) in enumerate(zip(edited, untouched, strict=True)):
            assert other == place or torch.equal(got, want)
        again = torch.autograd.grad(edited[0].sum(), list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
