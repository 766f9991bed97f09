"""One rank of a vocabulary-parallel and context-parallel run; compares every function with the
whole, computed alone.

Started by test_parallel.py: rank, world size, rendezvous file, backend of the collectives. With
nccl all tensors are on a GPU of the rank's own. Exits with 1 where anything differs;
a collective that a rank does not take part in ends the others after two minutes.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

import mpo_kernels
import mpo_kernels.ops.chunks
from mpo_kernels import Parallel, losses, oracle

P, T, D, V = 3, 7, 12, 53
PROMPT = 3
"""Positions at the start of each sequence, none of which is scored."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter is slow; float64 is the other backend's
DTYPES = (torch.float32, torch.float16) if INTERPRETED else tuple(TOLERANCE)
IGNORED = (-100, -1, -2, 0, 2, 30, V - 1, V, 2**40, -(2**63))
"""Not scored: labels that no vocabulary has, that the first, a middle or the last slice has, and
that a slice may take for its own."""

HEADS = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Layout:
    """What this rank has of the whole."""

    vocab: slice
    positions: slice
    parallel: Parallel

    def share(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**data, "weight": data["weight"][self.vocab], "bias": data["bias"][self.vocab]} | {
            name: data[name][:, self.positions] for name in ("hidden", "labels", "upstream")
        }


def problem(dtype: torch.dtype, ignore_index: int) -> dict[str, torch.Tensor]:
    generator = seeded(0)
    labels = torch.randint(0, V, (2 * P, T), generator=generator)
    labels[labels == ignore_index] = (ignore_index + 1) % V
    scored = torch.rand(labels.shape, generator=generator) < 0.7
    scored[:, -1], scored[1], scored[:, :PROMPT] = True, False, False
    scored[1, PROMPT] = True  # a sequence that lies on one rank of a context alone
    mistakable = [
        s.start + ignore_index
        for s in slices(V, dist.get_world_size())
        if 0 < s.start + ignore_index < V and s.start
    ]
    for sequence, label in zip(
        (0, 2, 3, 4), [2 if ignore_index != 2 else 3, *mistakable], strict=False
    ):
        labels[sequence, -1] = label  # counted from its slice, it is the ignore_index
    return {
        "hidden": torch.randn(2 * P, T, D, generator=generator).to(dtype),
        "weight": torch.randn(V, D, generator=generator).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "labels": labels.masked_fill(~scored, ignore_index),
        "gap": torch.randn(P, generator=generator).to(torch.promote_types(dtype, torch.float32)),
        "pair_weights": (
            torch.rand(P, generator=generator).to(torch.promote_types(dtype, torch.float32))
        ),
        "upstream": torch.randn(2 * P, T, generator=generator),
    }


def seeded(seed: int) -> torch.Generator:
    """Of the device that tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def slices(total: int, ranks: int) -> list[slice]:
    """Consecutive slices of different sizes."""
    bounds = [0, *(total * (r + 1) * (r + 2) // (ranks * (ranks + 1)) for r in range(ranks))]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def close(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
    if not error <= tolerance:
        raise AssertionError(f"rank {dist.get_rank()}: {what} differs by {float(error):.2e}")


def trained(
    data: dict[str, torch.Tensor], names: tuple[str, ...] = HEADS
) -> dict[str, torch.Tensor]:
    return data | {
        name: data[name].detach().clone().requires_grad_(name in names) for name in HEADS
    }


def compare_gradients(
    mine: dict[str, torch.Tensor],
    whole: dict[str, torch.Tensor],
    layout: Layout,
    tolerance: float,
    what: str,
) -> None:
    if whole["hidden"].grad is not None:
        close(
            mine["hidden"].grad, whole["hidden"].grad[:, layout.positions], f"{what}: dH", tolerance
        )
    for name in ("weight", "bias"):
        if whole[name].grad is None:
            continue
        # this rank's part of a sum over the context
        total = mine[name].grad.to(torch.promote_types(mine[name].dtype, torch.float32))
        if layout.parallel.context_group is not None:
            dist.all_reduce(total, group=layout.parallel.context_group)
        close(total, whole[name].grad[layout.vocab], f"{what}: d{name}", tolerance)


def check_loss(
    layout: Layout,
    chunk_bytes: int | None,
    reduction: str,
    dtype: torch.dtype,
    ignore_index: int,
    packed: bool,
) -> None:
    """linear_mpo_loss, and mpo_loss of the same logits, against the oracle; in half precision
    against the package on one rank, which rounds the logits as this does."""
    data, tolerance, exact = problem(dtype, ignore_index), TOLERANCE[dtype], dtype.itemsize >= 4
    options = {
        "beta": 1.3,
        "softcap": 6.0,
        "logit_scale": 0.7,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    whole, mine = trained(data), trained(layout.share(data))
    weights = {"pair_weights": data["pair_weights"]}

    def call(function, d, logits=None, **more):
        first = (d["hidden"], d["weight"]) if logits is None else (logits,)
        more |= {"bias": d["bias"]} if logits is None else {}
        return function(*first, d["labels"], data["gap"], **options, **weights, **more)

    if exact:
        wide = {name: t.double() if t.is_floating_point() else t for name, t in data.items()}
        whole, weights["pair_weights"] = trained(wide), wide["pair_weights"]
        expected = call(oracle.linear_mpo_loss, whole)
    else:
        expected = call(mpo_kernels.linear_mpo_loss, whole)
    (expected[0].sum() * 1.7).backward()

    weights["pair_weights"] = data["pair_weights"]
    local = {"parallel": layout.parallel, "token_outputs": True}
    given = mine
    if packed:
        given = {**mine, "labels": mine["labels"].flatten(), "hidden": mine["hidden"].flatten(0, 1)}
        local["cu_seqlens"] = torch.arange(2 * P + 1, dtype=torch.int32) * mine["labels"].shape[1]
    got = call(mpo_kernels.linear_mpo_loss, given, chunk_bytes=chunk_bytes, **local)
    (got.loss.sum() * 1.7).backward()
    for name, want in zip(
        ("loss", "chosen_logps", "rejected_logps", "reward_gap"), expected, strict=False
    ):
        close(getattr(got, name), want, name, tolerance)
    compare_gradients(mine, whole, layout, tolerance, "linear_mpo_loss")
    # Bitwise the same on every rank, or ranks would drift apart.
    losses = [torch.empty_like(got.loss) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, got.loss.detach())
    assert all(torch.equal(losses[0], other) for other in losses)

    full = torch.nn.functional.linear(*(data[name].double() for name in HEADS)).to(dtype)
    logits, exact_logits = (
        full[:, layout.positions, layout.vocab].clone().requires_grad_(),
        full.double().requires_grad_(),
    )
    exact_weights = data["pair_weights"].double()
    expected = oracle.mpo_loss(
        exact_logits, data["labels"], data["gap"].double(), pair_weights=exact_weights, **options
    )
    got = call(mpo_kernels.mpo_loss, mine, logits, parallel=layout.parallel, token_outputs=True)
    close(got.loss, expected[0], "loss from logits", max(tolerance, 1e-5) if exact else 1e-4)
    tokens = {name: options[name] for name in ("softcap", "logit_scale", "ignore_index")}
    here = layout.positions
    close(
        got.tokens.logprobs,
        oracle.token_logprobs(full.double(), data["labels"], **tokens)[:, here],
        "token logprobs",
        1e-5,
    )
    close(
        got.tokens.entropy,
        oracle.token_entropy(full.double(), data["labels"], **tokens)[:, here],
        "entropy",
        1e-5,
    )
    assert torch.equal(
        got.tokens.is_argmax,
        oracle.token_is_argmax(full.double(), data["labels"], **tokens)[:, here],
    )
    expected[0].sum().backward()
    got.loss.sum().backward()
    close(
        logits.grad,
        exact_logits.grad[:, layout.positions, layout.vocab],
        "dlogits",
        tolerance if exact else 4e-3,
    )


def check_tokens(
    layout: Layout, names: tuple[str, ...], dtype: torch.dtype, ignore_index: int
) -> None:
    """linear_token_logprobs with any upstream gradient, of which `names` are trained."""
    data, options = problem(dtype, ignore_index), {"ignore_index": ignore_index, "softcap": 6.0}
    share = layout.share(data)
    whole, mine = (
        trained({n: t.double() if t.is_floating_point() else t for n, t in data.items()}, names),
        trained(share, names),
    )
    want = oracle.linear_token_logprobs(
        whole["hidden"], whole["weight"], whole["labels"], bias=whole["bias"], **options
    )
    got = mpo_kernels.linear_token_logprobs(
        mine["hidden"],
        mine["weight"],
        mine["labels"],
        bias=mine["bias"],
        parallel=layout.parallel,
        **options,
    )
    tolerance = max(TOLERANCE[dtype], 1e-6) if dtype.itemsize >= 4 else 2e-2
    close(got, want[:, layout.positions], "linear_token_logprobs", tolerance)
    if names:
        (want * data["upstream"]).sum().backward()
        (got * share["upstream"]).sum().backward()
        compare_gradients(mine, whole, layout, tolerance, f"linear_token_logprobs, trained {names}")


def check_statistics(
    layout: Layout, names: tuple[str, ...], dtype: torch.dtype, ignore_index: int
) -> None:
    """linear_token_statistics with all that there is, of which `names` are trained; in half
    precision the logits are left in float32."""
    data, options = problem(dtype, ignore_index), {"ignore_index": ignore_index, "softcap": 6.0}
    share, labels = layout.share(data), data["labels"]
    wide = {n: t.double() if t.is_floating_point() else t for n, t in data.items()}
    whole, mine = trained(wide, names), trained(share, names)
    got = mpo_kernels.linear_token_statistics(
        *(mine[name] for name in ("hidden", "weight", "labels")),
        bias=mine["bias"],
        moments=True,
        entropy_grad=True,
        logits_dtype=torch.float32 if dtype.itemsize == 2 else None,
        parallel=layout.parallel,
        **options,
    )
    logits = torch.nn.functional.linear(*(whole[name] for name in HEADS))
    logp, entropy, is_argmax = (
        f(logits, labels, **options)
        for f in (oracle.token_logprobs, oracle.token_entropy, oracle.token_is_argmax)
    )
    want = (logp, entropy, is_argmax, *oracle.token_moments(logits, labels, **options))
    tolerance = max(TOLERANCE[dtype], 1e-6)
    bar = 1e-6 if dtype == torch.float64 else 1e-5
    for name, one, other in zip(got._fields, got, want, strict=True):
        if name != "is_argmax":
            close(one, other[:, layout.positions], name, bar)
    if names:
        (logp * data["upstream"] + entropy * data["upstream"].flip(0)).sum().backward()
        upstream = share["upstream"]
        (got.logprobs * upstream + got.entropy * upstream.flip(0)).sum().backward()
        compare_gradients(mine, whole, layout, tolerance, f"entropy, trained {names}")


def check_sequence_loss(
    layout: Layout, chunk_bytes: int | None, dtype: torch.dtype, ignore_index: int
) -> None:
    """linear_sequence_loss, and sequence_loss of the same logits, against the definition."""
    data, tolerance = problem(dtype, ignore_index), max(TOLERANCE[dtype], 1e-6)
    loss, reference_logps = losses.DPO(0.3), torch.linspace(-9, -3, 2 * P).view(2, P)
    options = {"softcap": 6.0, "ignore_index": ignore_index}
    whole = trained({n: t.double() if t.is_floating_point() else t for n, t in data.items()})
    mine = trained(layout.share(data))

    def expected(logps: torch.Tensor) -> torch.Tensor:
        scored = (data["labels"] != ignore_index).sum(1).view(2, P)
        return loss(losses.Scores(logps.sum(1).view(2, P), scored), reference_logps.double()).mean()

    want = expected(
        oracle.linear_token_logprobs(
            whole["hidden"], whole["weight"], whole["labels"], bias=whole["bias"], **options
        )
    )
    got = mpo_kernels.linear_sequence_loss(
        mine["hidden"],
        mine["weight"],
        mine["labels"],
        loss,
        reference_logps,
        bias=mine["bias"],
        chunk_bytes=chunk_bytes,
        parallel=layout.parallel,
        **options,
    )
    bar = tolerance if dtype.itemsize >= 4 else 2e-2
    close(got.loss, want, "linear_sequence_loss", bar)
    (want * 1.7).backward()
    (got.loss * 1.7).backward()
    compare_gradients(mine, whole, layout, bar, "linear_sequence_loss")
    everywhere = [torch.empty_like(got.loss) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, got.loss.detach())
    assert all(torch.equal(everywhere[0], other) for other in everywhere)

    full = torch.nn.functional.linear(*(data[name].double() for name in HEADS)).to(dtype)
    logits = full[:, layout.positions, layout.vocab].clone().requires_grad_()
    exact = full.double().requires_grad_()
    want = expected(oracle.token_logprobs(exact, data["labels"], **options))
    got = mpo_kernels.sequence_loss(
        logits, mine["labels"], loss, reference_logps, parallel=layout.parallel, **options
    )
    close(got.loss, want, "sequence_loss", max(tolerance, 1e-5) if dtype.itemsize >= 4 else 1e-4)
    want.backward()
    got.loss.backward()
    close(
        logits.grad,
        exact.grad[:, layout.positions, layout.vocab],
        "dlogits of sequence_loss",
        tolerance if dtype.itemsize >= 4 else 4e-3,
    )


class Collectives:
    """Counts calls of torch.distributed by name, inside."""

    NAMES = ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor")

    def __enter__(self) -> Collectives:
        self.counts: dict[str, int] = {}
        self._patch = pytest.MonkeyPatch()
        for name in filter(partial(hasattr, dist), self.NAMES):
            self._patch.setattr(dist, name, partial(self._call, name, getattr(dist, name)))
        return self

    def _call(self, name, collective, *arguments, **keywords):
        kind = name.removesuffix("_single").removesuffix("_tensor")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return collective(*arguments, **keywords)

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()


def sequence_parallel_calls(data: dict[str, torch.Tensor]) -> dict[str, Callable]:
    """(package, hidden, weight, bias, **options) -> a sum, of each linear function."""
    labels, gap, flat = data["labels"], data["gap"], data["labels"].flatten()
    few = torch.arange(0, flat.numel(), 2)
    reference = torch.linspace(-9, -3, 2 * P).view(2, P)
    upstream = torch.linspace(-1, 1, flat.numel())

    def dpo(package, h, w, b, **options):
        if package is mpo_kernels:
            return package.linear_sequence_loss(
                h, w, labels, losses.DPO(0.3), reference, bias=b, **options
            ).loss
        logp = package.linear_token_logprobs(h, w, labels, bias=b, **options).sum(1).view(2, P)
        counts = (labels != -100).sum(1).view(2, P)
        return losses.DPO(0.3)(losses.Scores(logp, counts), reference.double()).mean()

    def gathered(package, h, w, b, **options):
        if package is mpo_kernels:
            options["rows"] = few
        else:
            h = h.flatten(0, 1)[few]
        logp = package.linear_token_logprobs(h, w, flat[few], bias=b, **options)
        return (logp * upstream[few]).sum()

    return {
        "linear_mpo_loss": lambda package, h, w, b, **options: package.linear_mpo_loss(
            h, w, labels, gap.to(w.dtype), bias=b, **options
        )[0],
        "linear_token_logprobs": lambda package, h, w, b, **options: (
            package.linear_token_logprobs(h, w, labels, bias=b, **options).flatten() * upstream
        ).sum(),
        "linear_token_statistics": lambda package, h, w, b, **options: (
            (
                package.linear_token_statistics(h, w, labels, bias=b, **options).logprobs.flatten()
                if package is mpo_kernels
                else package.linear_token_logprobs(h, w, labels, bias=b, **options).flatten()
            )
            .mul(upstream)
            .sum()
        ),
        "linear_sequence_loss": dpo,
        "gathered rows": gathered,
    }


def check_sequence_parallel(vocab: slice, dtype: torch.dtype, chunk_bytes: int | None) -> None:
    """Each rank holds some rows of the hidden states: values and gradients of all functions are the
    whole's, dH comes by one reduce-scatter and no all-reduce."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    data = problem(dtype, -100)
    # a position more, which is not scored, divides by the ranks
    data["hidden"] = torch.nn.functional.pad(data["hidden"], (0, 0, 0, 1), value=3.0)
    data["labels"] = torch.nn.functional.pad(data["labels"], (0, 1), value=-100)
    own = data["hidden"].flatten(0, 1).chunk(ranks)[rank]
    parallel = Parallel(
        vocab_group=dist.group.WORLD,
        vocab_slice=vocab.stop - vocab.start,
        sequence_parallel=True,
    )
    here = {"hidden": own, "weight": data["weight"][vocab], "bias": data["bias"][vocab]}
    wide = {name: data[name].double() for name in HEADS}
    tolerance = max(TOLERANCE[dtype], 1e-6) if dtype.itemsize >= 4 else 3e-2
    for name, call in sequence_parallel_calls(data).items():
        for trained_names in (HEADS, ("hidden",)):
            whole, mine = trained(wide, trained_names), trained(here, trained_names)
            want = call(oracle, *(whole[each] for each in HEADS), softcap=6.0)
            want.backward()
            with Collectives() as collectives:
                got = call(
                    mpo_kernels,
                    *(mine[each] for each in HEADS),
                    softcap=6.0,
                    chunk_bytes=chunk_bytes,
                    parallel=parallel,
                )
                got.backward()
            assert collectives.counts == {"reduce_scatter": 1}, (name, collectives.counts)
            close(got, want, f"{name}, sequence-parallel", tolerance)
            for each, exact in (
                ("hidden", whole["hidden"].grad.flatten(0, 1).chunk(ranks)[rank]),
                *((n, whole[n].grad[vocab]) for n in ("weight", "bias") if n in trained_names),
            ):
                assert mine[each].grad.dtype == dtype
                close(mine[each].grad, exact, f"{name}, sequence-parallel: d{each}", tolerance)


def check_sequence_parallel_refusals(vocab: slice, rank: int) -> None:
    """What cannot be gathered is refused by all ranks."""
    parallel = Parallel(
        vocab_group=dist.group.WORLD,
        vocab_slice=vocab.stop - vocab.start,
        sequence_parallel=True,
    )
    assert ", divided rows" in repr(parallel)
    weight, labels = torch.zeros(vocab.stop - vocab.start, D), torch.zeros(2 * P, T).long()
    call = partial(mpo_kernels.linear_token_logprobs, parallel=parallel)
    with pytest.raises(ValueError, match=r"hidden has shape \(6, 7, 12\); with sequence_parallel"):
        call(torch.zeros(2 * P, T, D), weight, labels)
    with pytest.raises(ValueError, match=r"hidden holds 5 rows and labels 42.*Pad hidden"):
        call(torch.zeros(5, D), weight, labels)
    with pytest.raises(ValueError, match=r"hidden holds \[3, 4.*\] rows on the ranks"):
        call(torch.zeros(3 + rank, D), weight, labels[0], rows=torch.zeros(T).long())


def check_unknown_label(parallel: Parallel) -> None:
    """A label that no rank has: value, entropy and gradient are NaN in its row, as on one rank, and
    in no other."""
    labels = torch.tensor([V, 1, -7, V + 2**40])
    wrong = torch.tensor([True, False, True, True])
    logits = torch.randn(4, parallel.vocab_slice, generator=seeded(1)).requires_grad_()
    got = mpo_kernels.token_statistics(logits, labels, parallel=parallel, validate=False)
    got.logprobs.sum().backward()
    for what in (got.logprobs, got.entropy, logits.grad.sum(-1), logits.grad.amax(-1)):
        assert torch.equal(what.isnan(), wrong), what
    alone = torch.randn(4, V).requires_grad_()
    mpo_kernels.token_logprobs(alone, labels, validate=False).sum().backward()
    assert torch.equal(alone.grad.isnan().all(-1), wrong)


def check_by_hand(rank: int) -> None:
    """Probabilities .1, .2, .3, .4, half of them on each rank; the label's is .3, whichever other
    label is not scored."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[2 * rank : 2 * rank + 2]
    parallel = Parallel(vocab_group=dist.group.WORLD, vocab_slice=2)
    for ignore_index in (0, 1, 3, -1, -2):
        logp = mpo_kernels.token_logprobs(
            logits[None], torch.tensor([2]), ignore_index=ignore_index, parallel=parallel
        )
        torch.testing.assert_close(logp.exp(), torch.tensor([0.3]))


def check_lifetime(vocab: slice) -> None:
    """A Parallel that its caller does not keep lives until backward has run."""
    data = problem(torch.float32, -100)
    mine = trained({**data, "weight": data["weight"][vocab], "bias": data["bias"][vocab]})
    hidden, weight, labels = (mine[name] for name in ("hidden", "weight", "labels"))
    for call in (
        lambda parallel: mpo_kernels.linear_token_logprobs(
            hidden, weight, labels, parallel=parallel
        ),
        lambda parallel: mpo_kernels.linear_token_logprobs(
            hidden, weight.detach(), labels, parallel=parallel
        ),
        lambda parallel: (
            mpo_kernels.linear_mpo_loss(hidden, weight, labels, data["gap"], parallel=parallel).loss
        ),
        lambda parallel: mpo_kernels.token_logprobs(hidden @ weight.T, labels, parallel=parallel),
        lambda parallel: mpo_kernels.token_logprobs(
            hidden @ weight.T, labels, inplace_backward=True, parallel=parallel
        ),
    ):
        value = call(Parallel(vocab_group=dist.group.WORLD, vocab_slice=vocab.stop - vocab.start))
        gc.collect()
        value.sum().backward()


def check_refused_together(layout: Layout, rank: int) -> None:
    """What is wrong with the part of one rank of a context is refused by all ranks: none is left
    waiting for it."""
    data = layout.share(problem(torch.float32, -100))
    if rank == 1:
        data["labels"][0, 0] = V + 5
    message = rf"labels.* is {V + 5}" if rank == 1 else r"rank\(s\) \[1\] of context_group"
    for reduction in ("mean", "none"):
        with pytest.raises(ValueError, match=message):
            mpo_kernels.linear_mpo_loss(
                *(data[name] for name in ("hidden", "weight", "labels", "gap")),
                reduction=reduction,
                parallel=layout.parallel,
            )
    logits = data["hidden"] @ data["weight"].T
    with pytest.raises(ValueError, match=message):
        mpo_kernels.mpo_loss(
            logits, data["labels"], data["gap"], parallel=layout.parallel, validate=True
        )


def check_refusals(rank: int, parallel: Parallel) -> None:
    """A slice that is not what Parallel was made for; a slice of nothing on one rank, which all
    ranks refuse."""
    with pytest.raises(ValueError, match="vocab_slice"):
        mpo_kernels.token_logprobs(
            torch.zeros(1, parallel.vocab_slice + 1), torch.tensor([1]), parallel=parallel
        )
    with pytest.raises(ValueError, match="each of them needs at least one token"):
        Parallel(vocab_group=dist.group.WORLD, vocab_slice=rank)


def layouts_of(rank: int, ranks: int) -> dict[str, Layout]:
    """By name; the last three leave ranks without scored rows, or without any."""
    everything, world = slice(None), dist.group.WORLD
    vocab, context = slices(V, ranks)[rank], Parallel(context_group=world)
    response = [
        slice(PROMPT + s.start, PROMPT + s.stop) for s in slices(T - PROMPT, max(1, ranks - 1))
    ]
    layouts = {
        "vocab": Layout(
            vocab, everything, Parallel(vocab_group=world, vocab_slice=vocab.stop - vocab.start)
        ),
        "context": Layout(everything, slices(T, ranks)[rank], context),
        "prompt on a rank": Layout(everything, [slice(0, PROMPT), *response][rank], context),
        "nothing on a rank": Layout(
            everything, [*slices(T, ranks - 1), slice(T, T)][rank], context
        ),
    }
    if ranks == 4:  # two ranks share a vocabulary, two a context
        grid = [
            [dist.new_group([0, 1]), dist.new_group([2, 3])],
            [dist.new_group([0, 2]), dist.new_group([1, 3])],
        ]
        vocab, halves = (
            slices(V, 2)[rank % 2],
            {
                "both": slices(T, 2),
                "both, prompt on two": [slice(0, PROMPT), slice(PROMPT, T)],
            },
        )
        both = Parallel(
            vocab_group=grid[0][rank // 2],
            vocab_slice=vocab.stop - vocab.start,
            context_group=grid[1][rank % 2],
        )
        layouts |= {name: Layout(vocab, half[rank // 2], both) for name, half in halves.items()}
    return layouts


def main(rank: int, ranks: int, rendezvous: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    dist.init_process_group(
        backend, f"file://{rendezvous}", timedelta(seconds=120), rank=rank, world_size=ranks
    )
    layouts, ignored = layouts_of(rank, ranks), itertools.cycle(IGNORED)
    for name, layout in layouts.items():
        if INTERPRETED and name not in ("vocab", "prompt on a rank"):
            continue
        for dtype in DTYPES:
            mpo_kernels.ops.chunks.ROW_MULTIPLE = 128
            check_loss(layout, None, "mean", dtype, next(ignored), packed=False)
            mpo_kernels.ops.chunks.ROW_MULTIPLE = 1
            # a few rows a chunk: pairs in pieces
            check_loss(layout, 4 * V * 4, "sum", dtype, next(ignored), packed=True)
            check_sequence_loss(layout, 4 * V * 4, dtype, next(ignored))
            check_tokens(layout, ("hidden",), dtype, next(ignored))
            check_statistics(layout, HEADS, dtype, next(ignored))
            if not INTERPRETED:
                check_loss(layout, None, "none", dtype, next(ignored), packed=True)
                mpo_kernels.ops.chunks.ROW_MULTIPLE = 128  # one chunk, whose logits are kept
                check_sequence_loss(layout, None, dtype, next(ignored))
                check_statistics(layout, ("hidden",), dtype, next(ignored))
                mpo_kernels.ops.chunks.ROW_MULTIPLE = 1
                for names in (HEADS, ("weight", "bias"), ()):
                    check_tokens(layout, names, dtype, next(ignored))
        print(f"rank {rank}: {name} agrees", flush=True)
    for ignore_index in IGNORED[:: 3 if INTERPRETED else 1]:
        check_loss(layouts["vocab"], None, "mean", torch.float32, ignore_index, packed=False)
    if ranks == 2:
        check_by_hand(rank)
    check_unknown_label(layouts["vocab"].parallel)
    check_lifetime(layouts["vocab"].vocab)
    check_refused_together(layouts["context"], rank)
    check_refusals(rank, layouts["vocab"].parallel)
    vocab = layouts["vocab"].vocab
    for dtype in DTYPES:
        for chunk_bytes in (4 * V * 4,) if INTERPRETED else (None, 4 * V * 4):
            mpo_kernels.ops.chunks.ROW_MULTIPLE = 128 if chunk_bytes is None else 1
            check_sequence_parallel(vocab, dtype, chunk_bytes)
    check_sequence_parallel_refusals(vocab, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
    sys.stdout.flush()
    # All is checked. Now and then an interpreter that takes gloo's threads down aborts.
    os._exit(0)
