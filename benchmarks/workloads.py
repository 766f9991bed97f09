"""The MPO loss from logits, and any objective from hidden states, with the exact results.

Those are float64 autograd, of a block of rows at a time, and lie on the host: the largest logits of
a GPU's workloads would take 34 GB in float64, and autograd four times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import UPSTREAM, Inputs
from benchmarks.objectives import GAP, MPO, Objective
from mpo_kernels import oracle

SEED = 0
EXACT_BYTES = 2 << 30
"""Of float64 logits that exist at once for the exact result; autograd holds four such tensors."""
CPU = torch.device("cpu")


class Source(torch.autograd.Function):
    """Hands on a buffer as a model's head would, and keeps its gradient without a copy, which is
    fair to gradients in place."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        """The buffer, which is taken out of `kept`."""
        ctx.kept = kept
        return kept.pop()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        """Keeps the gradient."""
        ctx.kept.append(grad)
        return None, None


def scored_tokens(tokens: int, scored: float) -> int:
    """Of a sequence of so many."""
    return max(1, round(tokens * scored))


def masked_labels(
    sequences: int, tokens: int, vocab: int, scored: float, device: torch.device
) -> torch.Tensor:
    """(S, T), the first positions ignored as a prompt is."""
    labels = torch.randint(
        0, vocab, (sequences, tokens), generator=torch.Generator().manual_seed(SEED + 1)
    )
    labels[:, : tokens - scored_tokens(tokens, scored)] = -100
    # on the meta device they would tell nothing
    return labels if device.type == "meta" else labels.to(device)


def _normal(
    *shape: int, std: float, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Made in its dtype where it is used: a copy on the host could be larger than the host."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)


def _on_host(blocks: Iterable[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Exact results lie there, so that the device is free for the candidates."""
    return torch.cat([block.cpu() for block in blocks]).view(shape)


def _grad_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _blocks(rows: int, vocab: int) -> list[slice]:
    """Rows whose float64 logits take EXACT_BYTES."""
    size = max(1, EXACT_BYTES // (8 * vocab))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _upstream(
    objective: Objective, logps: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of log-probabilities (N,) and its gradient of them, times UPSTREAM."""
    logps.requires_grad_()
    loss = objective.of_tokens(logps.view(labels.shape), labels)
    return loss.detach(), torch.autograd.grad(loss * UPSTREAM, logps)[0]


@dataclass
class FromLogits:
    """Loss and gradient of the logits (2P, T, V)."""

    pairs: int
    tokens: int
    vocab: int
    scored: float = 0.625
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    name: str = "from logits"
    product_flops: int = 0

    def __post_init__(self) -> None:
        shape = (2 * self.pairs, self.tokens, self.vocab)
        self._logits = _normal(*shape, std=2.0, seed=SEED, dtype=self.dtype, device=self.device)
        self.labels = masked_labels(
            2 * self.pairs, self.tokens, self.vocab, self.scored, self.device
        )
        self.gap = torch.full((self.pairs,), GAP, device=self.device)

    def settings(self) -> dict[str, str | int | float]:
        return {
            "pairs": self.pairs,
            "tokens": self.tokens,
            "vocab": self.vocab,
            "scored": self.scored,
            "dtype": str(self.dtype)[6:],
        }

    def inputs(self) -> Inputs:
        self._kept = [self._logits.clone()]
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        return {"logits": Source.apply(anchor, self._kept)}

    def gradients(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        return {"logits": self._kept[0]}

    def exact(self) -> dict[str, torch.Tensor]:
        rows, labels = self._logits.flatten(0, 1), self.labels.flatten()
        blocks = _blocks(*rows.shape)
        logps = torch.cat([oracle.token_logprobs(rows[b].double(), labels[b]) for b in blocks])
        loss, upstream = _upstream(MPO, logps, self.labels)

        def grads() -> Iterator[torch.Tensor]:
            for block in blocks:
                logits = rows[block].double().requires_grad_()
                logp = oracle.token_logprobs(logits, labels[block])
                yield torch.autograd.grad(logp, logits, upstream[block])[0]

        return {
            "loss": _on_host([loss[None]], ()),
            "logits": _on_host(grads(), self._logits.shape),
        }

    def bound(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """One read forward, one copy backward, of the scored rows."""
        rows = self._logits[self.labels != -100]
        return lambda: rows.amax(), lambda: rows.clone()


@dataclass
class FromHidden:
    """An objective and its gradients of the hidden states (2P, T, D) and, unless it is frozen, of
    the head's weight (V, D)."""

    pairs: int
    tokens: int
    hidden: int
    vocab: int
    scored: float = 0.625
    trainable: bool = True
    objective: Objective = MPO
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.name = "from hidden states, " + ("trainable head" if self.trainable else "frozen head")
        place: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        std = 2 * self.hidden**-0.5
        self._weight = _normal(self.vocab, self.hidden, std=std, seed=SEED, **place)
        shape = (2 * self.pairs, self.tokens, self.hidden)
        self._hidden = _normal(*shape, std=1.0, seed=SEED + 2, **place)
        self.labels = masked_labels(
            2 * self.pairs, self.tokens, self.vocab, self.scored, self.device
        )
        self.scored_tokens = scored_tokens(self.tokens, self.scored)
        scored_rows = 2 * self.pairs * self.scored_tokens
        self.product_flops = 2 * scored_rows * self.hidden * self.vocab
        self.constants = self.objective.constants_of(self.pairs, self.device)

    def settings(self) -> dict[str, str | int | float]:
        sizes = {
            "pairs": self.pairs,
            "tokens": self.tokens,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "scored": self.scored,
        }
        return {
            "loss": self.objective.name,
            **sizes,
            "head": "trainable" if self.trainable else "frozen",
            "dtype": str(self.dtype)[6:],
        }

    def inputs(self) -> Inputs:
        return {
            "hidden": self._hidden.detach().requires_grad_(),
            "weight": self._weight.detach().requires_grad_(self.trainable),
        }

    def gradients(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        return {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}

    def exact(self) -> dict[str, torch.Tensor]:
        rows, labels = self._hidden.flatten(0, 1), self.labels.flatten()
        blocks, weight = _blocks(labels.numel(), self.vocab), self._weight.double()
        logps = torch.cat(
            [
                oracle.linear_token_logprobs(rows[block].double(), weight, labels[block])
                for block in blocks
            ]
        )
        loss, upstream = _upstream(self.objective, logps, self.labels)
        weight.requires_grad_(self.trainable)

        def grads() -> Iterator[torch.Tensor]:
            for block in blocks:
                hidden = rows[block].double().requires_grad_()
                logp = oracle.linear_token_logprobs(hidden, weight, labels[block])
                logp.backward(upstream[block])  # weight.grad is the sum over blocks
                yield _grad_of(hidden)

        exact = {
            "loss": _on_host([loss[None]], ()),
            "hidden": _on_host(grads(), self._hidden.shape),
        }
        if self.trainable:
            exact["weight"] = _on_host([_grad_of(weight)], weight.shape)
        return exact

    def bound(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """The matrix products alone, on the scored rows: one forward, one or two backward."""
        rows = self._hidden[self.labels != -100]
        logits = rows @ self._weight.t()

        def backward() -> object:
            grad_hidden = logits @ self._weight
            return grad_hidden, (logits.t() @ rows if self.trainable else None)

        return lambda: torch.mm(rows, self._weight.t(), out=logits), backward
