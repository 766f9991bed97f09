"""The MPO loss from logits, and any objective from hidden states, with the exact results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness import UPSTREAM, Inputs
from benchmarks.objectives import GAP, MPO, Objective
from mpo_kernels import oracle

SEED = 0
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


def masked_labels(
    sequences: int, tokens: int, vocab: int, scored: float, device: torch.device
) -> torch.Tensor:
    """(S, T), the first positions ignored as a prompt is."""
    labels = torch.randint(
        0, vocab, (sequences, tokens), generator=torch.Generator().manual_seed(SEED + 1)
    )
    labels[:, : tokens - max(1, round(tokens * scored))] = -100
    return labels.to(device)


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
        generator = torch.Generator().manual_seed(SEED)
        self._logits = (
            torch.randn(2 * self.pairs, self.tokens, self.vocab, generator=generator) * 2
        ).to(self.device, self.dtype)
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
        logits = self._logits.double().requires_grad_()
        loss = oracle.mpo_loss(logits, self.labels, self.gap.double())[0]
        (grad,) = torch.autograd.grad(loss * UPSTREAM, logits)
        return {"loss": loss.detach(), "logits": grad}

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
        generator = torch.Generator().manual_seed(SEED)
        self.name = "from hidden states, " + ("trainable head" if self.trainable else "frozen head")
        weight = torch.randn(self.vocab, self.hidden, generator=generator) * (2 * self.hidden**-0.5)
        self._weight = weight.to(self.device, self.dtype)
        self._hidden = torch.randn(
            2 * self.pairs, self.tokens, self.hidden, generator=generator
        ).to(self.device, self.dtype)
        self.labels = masked_labels(
            2 * self.pairs, self.tokens, self.vocab, self.scored, self.device
        )
        self.product_flops = 2 * int((self.labels != -100).sum()) * self.hidden * self.vocab
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
        (
            hidden,
            weight,
        ) = (
            self._hidden.double().requires_grad_(),
            self._weight.double().requires_grad_(self.trainable),
        )
        logps = oracle.linear_token_logprobs(hidden, weight, self.labels)
        loss = self.objective.of_tokens(logps, self.labels)
        leaves = {"hidden": hidden, "weight": weight} if self.trainable else {"hidden": hidden}
        gradients = torch.autograd.grad(loss * UPSTREAM, list(leaves.values()))
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    def bound(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """The matrix products alone, on the scored rows: one forward, one or two backward."""
        rows = self._hidden[self.labels != -100]
        logits = rows @ self._weight.t()

        def backward() -> object:
            grad_hidden = logits @ self._weight
            return grad_hidden, (logits.t() @ rows if self.trainable else None)

        return lambda: torch.mm(rows, self._weight.t(), out=logits), backward
