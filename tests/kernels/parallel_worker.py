"""One rank of a vocabulary-parallel and context-parallel run; compares every function with the single-process result.

Started by test_parallel.py: rank, world size, rendezvous file. Exits with 1 where anything differs.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import mpo_kernels
from mpo_kernels import Parallel

P, T, D, V = 3, 7, 12, 53
OPTIONS = {"beta": 1.3, "softcap": 6.0, "logit_scale": 0.7}


def problem(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (2 * P, T), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[:, -1] = 5
    labels[1] = -100
    labels[1, 2] = V - 1  # a sequence that lies on one rank of a context alone
    return {
        "hidden": torch.randn(2 * P, T, D, generator=generator).to(dtype),
        "weight": torch.randn(V, D, generator=generator).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "labels": labels,
        "gap": torch.randn(P, generator=generator),
        "pair_weights": torch.rand(P, generator=generator),
    }


def uneven(total: int, ranks: int) -> list[slice]:
    """Consecutive slices of different sizes."""
    bounds = [0, *(total * (r + 1) * (r + 2) // (ranks * (ranks + 1)) for r in range(ranks))]
    return [slice(a, b) for a, b in pairwise(bounds)]


def close(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
    if not error <= tolerance:
        raise AssertionError(f"rank {dist.get_rank()}: {what} differs by {float(error):.2e}")


def check(
    rank: int, vocab: slice, positions: slice, parallel: Parallel, chunk_bytes: int | None, reduction: str, dtype: torch.dtype
) -> None:
    """This rank's share of every result against the whole, computed alone."""
    data = problem(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1.2e-2
    whole = [data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    settings = {**OPTIONS, "pair_weights": data["pair_weights"], "reduction": reduction, "token_outputs": True}
    expected = mpo_kernels.linear_mpo_loss(whole[0], whole[1], data["labels"], data["gap"], bias=whole[2], **settings)
    (expected.loss.sum() * 1.7).backward()

    share = [data["hidden"][:, positions], data["weight"][vocab], data["bias"][vocab]]
    labels = data["labels"][:, positions]
    mine = [t.clone().requires_grad_() for t in share]
    got = mpo_kernels.linear_mpo_loss(
        mine[0], mine[1], labels, data["gap"], bias=mine[2], chunk_bytes=chunk_bytes, parallel=parallel, **settings
    )
    (got.loss.sum() * 1.7).backward()
    for name in ("loss", "chosen_logps", "rejected_logps", "reward_gap"):
        close(getattr(got, name), getattr(expected, name), name, tolerance)
    close(got.tokens.logprobs, expected.tokens.logprobs[:, positions], "token logprobs", tolerance)
    close(got.tokens.entropy, expected.tokens.entropy[:, positions], "entropy", tolerance)
    if dtype == torch.float32:
        assert torch.equal(got.tokens.is_argmax, expected.tokens.is_argmax[:, positions])
    close(mine[0].grad, whole[0].grad[:, positions], "dH", tolerance)
    # The weight's gradient is this rank's part of a sum over the context.
    for name, part, full in (("dW", mine[1], whole[1]), ("db", mine[2], whole[2])):
        total = part.grad.float()
        if parallel.context_group is not None:
            dist.all_reduce(total, group=parallel.context_group)
        close(total, full.grad[vocab], name, tolerance)

    logits_whole = torch.nn.functional.linear(data["hidden"].float(), data["weight"].float(), data["bias"].float()).requires_grad_()
    logits = logits_whole.detach()[:, positions, vocab].clone().requires_grad_()
    expected = mpo_kernels.mpo_loss(logits_whole, data["labels"], data["gap"], **settings)
    got = mpo_kernels.mpo_loss(logits, labels, data["gap"], parallel=parallel, **settings)
    close(got.loss, expected.loss, "loss from logits", 1e-5)
    expected.loss.sum().backward()
    got.loss.sum().backward()
    close(logits.grad, logits_whole.grad[:, positions, vocab], "dlogits", 1e-5)
    # Bitwise the same on every rank, or ranks would drift apart.
    losses = [torch.empty_like(got.loss) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, got.loss.detach())
    assert all(torch.equal(losses[0], other) for other in losses)


def main(rank: int, ranks: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    everything = slice(None)
    vocab, positions = uneven(V, ranks)[rank], uneven(T, ranks)[rank]
    layouts = [
        (vocab, everything, Parallel(vocab_group=dist.group.WORLD, vocab_slice=vocab.stop - vocab.start)),
        (everything, positions, Parallel(context_group=dist.group.WORLD)),
    ]
    if ranks == 4:  # two ranks share a vocabulary, two a context
        grid = [[dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([0, 2]), dist.new_group([1, 3])]]
        vocab, positions = uneven(V, 2)[rank % 2], uneven(T, 2)[rank // 2]
        layouts.append(
            (
                vocab,
                positions,
                Parallel(vocab_group=grid[0][rank // 2], vocab_slice=vocab.stop - vocab.start, context_group=grid[1][rank % 2]),
            )
        )
    import mpo_kernels.planning

    for vocab, positions, parallel in layouts:
        for dtype in (torch.float32, torch.bfloat16):
            mpo_kernels.planning.ROW_MULTIPLE = 128
            check(rank, vocab, positions, parallel, None, "mean", dtype)
            check(rank, vocab, positions, parallel, None, "none", dtype)
            mpo_kernels.planning.ROW_MULTIPLE = 1
            check(rank, vocab, positions, parallel, 4 * V * 4, "sum", dtype)  # a few rows a chunk: pairs in pieces

    # A label that no rank has, and a slice that is not what Parallel was made for.
    parallel = layouts[0][2]
    label = torch.tensor([1])
    logits = torch.zeros(1, parallel.vocab_slice)
    assert torch.isnan(mpo_kernels.token_logprobs(logits, torch.tensor([V]), parallel=parallel, validate=False))
    with pytest.raises(ValueError, match="vocab_slice"):
        mpo_kernels.token_logprobs(torch.zeros(1, parallel.vocab_slice + 1), label, parallel=parallel)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
