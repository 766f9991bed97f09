"""Random shapes, layouts and options against the float64 oracle, for as long as it is told.

    python tests/kernels/fuzz.py --seconds 600 --seed 0
    TRITON_INTERPRET=1 MPO_KERNELS_BACKEND=triton python tests/kernels/fuzz.py --seconds 600

Each problem follows from its number alone, so a failure is repeated with `--seed N --seconds 0`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from unittest import mock

import torch
from cases import INTERPRETED, REGIMES, regime, relative_error

import mpo_kernels
from mpo_kernels import reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 3e-3}
LARGEST = {"pairs": 3, "tokens": 12, "vocab": 600 if INTERPRETED else 5000, "hidden": 40}


class Fuzz:
    """One random problem."""

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(list(TOLERANCE))
        self.pairs, self.vocab, self.hidden = (self.size(LARGEST[n]) for n in ("pairs", "vocab", "hidden"))
        self.lengths = [self.size(LARGEST["tokens"]) for _ in range(2 * self.pairs)]
        self.packed, rows = self.rng.random() < 0.5, sum(self.lengths)
        shape = (rows,) if self.packed else (2 * self.pairs, max(self.lengths))
        self.ignore = self.rng.choice([-100, -1, 0])
        self.labels = self.some_labels(shape)
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).int() if self.packed else None
        self.gap = torch.randn(self.pairs, generator=self.generator)
        self.options = {"ignore_index": self.ignore}
        if self.rng.random() < 0.3:
            self.options["softcap"] = self.rng.choice([2.0, 30.0])
        if self.rng.random() < 0.3:
            self.options["logit_scale"] = self.rng.choice([0.1, 3.0])
        self.loss_options = {"beta": self.rng.choice([0.0, 0.3, 1.0, 2.5]), "reduction": self.rng.choice(["mean", "sum", "none"])}
        if self.rng.random() < 0.3:
            self.loss_options["pair_weights"] = torch.rand(self.pairs, generator=self.generator)
        self.upstream = self.rng.choice([1.0, -0.37, 100.0])

    def size(self, most: int) -> int:
        """1 to most, small ones often."""
        return self.rng.choice([1, 2, self.rng.randint(1, most), self.rng.randint(1, most)])

    def some_labels(self, shape: tuple[int, ...]) -> torch.Tensor:
        """At least one scored position per sequence."""
        low = 1 if self.ignore == 0 and self.vocab > 1 else 0
        if self.ignore == 0 and self.vocab == 1:
            self.ignore = -100
        labels = torch.randint(low, self.vocab, shape, generator=self.generator)
        ignored = torch.rand(shape, generator=self.generator) < self.rng.choice([0, 0.3, 0.9])
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        if self.packed:
            for start, length in zip(starts, self.lengths, strict=True):
                ignored[start + self.rng.randrange(length)] = False
        else:
            ignored[:, -1] = False
        labels[ignored] = self.ignore
        return labels.to(self.rng.choice([torch.int64, torch.int32]))

    def strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, sometimes as a view of something larger."""
        if self.rng.random() < 0.5:
            return tensor
        larger = torch.full((tensor.shape[0], *(n + 1 for n in tensor.shape[1:-1]), tensor.shape[-1] + self.rng.choice([0, 1, 16])), 7.0)
        view = larger.to(tensor.dtype)[tuple(slice(0, n) for n in tensor.shape)]
        return view.copy_(tensor)

    def compare(self, what: str, ours: Callable, oracle: Callable, tensors: list[torch.Tensor], tolerance: float) -> None:
        """Value and gradients of two functions of the same rounded tensors."""
        trained = [self.rng.random() < 0.8 for _ in tensors]
        narrow = [t.detach().requires_grad_(g) for t, g in zip(tensors, trained, strict=True)]
        wide = [t.detach().double().requires_grad_(g) for t, g in zip(tensors, trained, strict=True)]
        before = [t.detach().clone() for t in narrow]
        got, want = ours(*narrow), oracle(*wide)
        self.close(f"{what} value", got, want, tolerance)
        if any(trained):
            (got * self.upstream).sum().backward()
            (want * self.upstream).sum().backward()
        scale = max((float(t.grad.norm()) for t in wide if t.grad is not None), default=0.0)
        for index, (mine, theirs) in enumerate(zip(narrow, wide, strict=True)):
            if theirs.grad is not None:
                underflow = 3e-8 * mine.numel() ** 0.5 if mine.dtype == torch.float16 else 0.0  # its least number is 6e-8
                self.close(f"{what} gradient {index}", mine.grad, theirs.grad, tolerance, 1e-7 * scale + underflow)
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, narrow, strict=True)), f"{what}: inputs were changed"

    @staticmethod
    def close(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float, absolute: float = 0.0) -> None:
        got, want = got.detach(), want.detach()
        if float(want.abs().max()) > torch.finfo(got.dtype).max:  # float16 overflows, which a GradScaler takes care of
            return
        error, size = float((got.double() - want).norm()), float(want.norm())
        assert error <= tolerance * max(size, 1e-3) + absolute, f"{what}: {relative_error(got, want):.2e} of {size:.2e}"

    def run(self) -> str:
        """Compares; returns what it was about."""
        kind = self.rng.choice(["token_logprobs", "mpo_loss", "linear_token_logprobs", "linear_mpo_loss", "retention_loss"])
        getattr(self, kind)()
        return kind

    def lost(self, oracle: Callable, tensors: list[torch.Tensor]) -> float:
        """Relative error that rounding the means to float32 leaves in a loss whose gap is nearly right."""
        _, chosen, rejected, gap = oracle(*(t.double() for t in tensors))
        beta = self.loss_options["beta"]
        error = (beta * gap - self.gap).abs().clamp_min(1e-9)
        return float(((beta * (chosen.abs() + rejected.abs()) + self.gap.abs()) / error).max()) * 3e-7

    def widened(self) -> dict:
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in self.loss_options.items()}
        return {**self.options, **wide, "cu_seqlens": self.offsets}

    def logits(self) -> torch.Tensor:
        name = self.rng.choice([r for r in REGIMES if r not in ("huge", "columns_of_minus_inf")])
        labels = self.labels.long().clamp_min(0)
        return self.strided(regime(name, (*self.labels.shape, self.vocab), labels, self.rng.randrange(99)).to(self.dtype))

    def token_logprobs(self) -> None:
        self.compare(
            "token_logprobs",
            lambda z: mpo_kernels.token_logprobs(z, self.labels, **self.options),
            lambda z: reference.token_logprobs(z, self.labels.long(), **self.options),
            [self.logits()],
            TOLERANCE[self.dtype],
        )

    def mpo_loss(self) -> None:
        inplace = self.rng.random() < 0.3
        options = {**self.options, **self.loss_options, "cu_seqlens": self.offsets, "inplace_backward": inplace}
        tensors = [self.logits()]

        def oracle(z: torch.Tensor) -> tuple:
            return reference.mpo_loss(z, self.labels.long(), self.gap.double(), **self.widened())

        self.compare(
            "mpo_loss",
            lambda z: mpo_kernels.mpo_loss(z * 1 if inplace else z, self.labels, self.gap, **options).loss,
            lambda z: oracle(z)[0],
            tensors,
            TOLERANCE[self.dtype] + self.lost(oracle, tensors),
        )

    def head(self) -> list[torch.Tensor]:
        """Hidden states, weight and sometimes a bias; in float32, since the rounding of half-precision logits, common to all ways to
        compute, would need a bar of its own (matrix.py has it)."""
        hidden = torch.randn(*self.labels.shape, self.hidden, generator=self.generator)
        weight = torch.randn(self.vocab, self.hidden, generator=self.generator) * self.hidden**-0.5
        tensors = [hidden, weight, torch.randn(self.vocab, generator=self.generator)]
        return [self.strided(t) if t.ndim > 1 else t for t in tensors[: self.rng.choice([2, 3])]]

    def budget(self) -> int:
        return self.rng.choice([1, 4, 20, 10_000]) * self.vocab * self.dtype.itemsize

    def linear_token_logprobs(self) -> None:
        chunk = self.budget()
        with mock.patch("mpo_kernels.planning.ROW_MULTIPLE", 1):
            self.compare(
                "linear_token_logprobs",
                lambda h, w, b=None: mpo_kernels.linear_token_logprobs(h, w, self.labels, bias=b, chunk_bytes=chunk, **self.options),
                lambda h, w, b=None: reference.linear_token_logprobs(h, w, self.labels.long(), bias=b, **self.options),
                self.head(),
                1e-4,
            )

    def linear_mpo_loss(self) -> None:
        options = {**self.options, **self.loss_options, "cu_seqlens": self.offsets, "chunk_bytes": self.budget()}
        tensors = self.head()

        def oracle(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> tuple:
            return reference.linear_mpo_loss(h, w, self.labels.long(), self.gap.double(), bias=b, **self.widened())

        with mock.patch("mpo_kernels.planning.ROW_MULTIPLE", 1):
            self.compare(
                "linear_mpo_loss",
                lambda h, w, b=None: mpo_kernels.linear_mpo_loss(h, w, self.labels, self.gap, bias=b, **options).loss,
                lambda *heads: oracle(*heads)[0],
                tensors,
                1e-4 + self.lost(oracle, tensors),
            )

    def retention_loss(self) -> None:
        hidden = self.strided(torch.randn(*self.labels.shape, self.hidden, generator=self.generator).to(self.dtype))
        mask = (self.labels != self.ignore) if self.rng.random() < 0.7 else None
        pooled = torch.randn(2 * self.pairs, self.hidden, generator=self.generator)
        options = {"mask": mask, "cu_seqlens": self.offsets, "reduction": self.loss_options["reduction"]}
        self.compare(
            "retention_loss",
            lambda h: mpo_kernels.retention_loss(h, pooled, **options),
            lambda h: reference.retention_loss(h, pooled.double(), **options),
            [hidden],
            TOLERANCE[self.dtype],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="number of the first problem")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    end, seed = time.monotonic() + arguments.seconds, arguments.seed
    while True:
        try:
            Fuzz(seed).run()
        except Exception as error:
            raise SystemExit(f"problem {seed} failed (repeat it with --seed {seed} --seconds 0): {error!r}") from error
        seed += 1
        if time.monotonic() > end:
            break
    print(f"{seed - arguments.seed} problems, numbers {arguments.seed} to {seed - 1}: all agree with the oracle")


if __name__ == "__main__":
    main()
