"""Triton kernels of other libraries that do this package's job, as their own launch code
specialises them; none is run.

    for kernel in PEERS[0].kernels(128256, "sm_90"):
        kernel.report.registers

The libraries are optional and their names are private: any may be missing or have moved. Whoever
calls catches what is raised and shows the peer as absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.instruments.launch import Specialised, recorded
from benchmarks.instruments.machine_code import Report

ROWS, TOKENS, HIDDEN = 4, 2048, 4096
"""Sequences, tokens of each and hidden size of the launches; they decide only which arguments 16
divides."""
ARCHITECTURES = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}
"""Liger's names of the targets."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a peer, compiled."""

    name: str
    does: str  # by one launch
    block: int | None  # columns at a time; None where they are not what it steps over
    report: Report


@dataclass(frozen=True)
class Peer:
    """A way to get log-probabilities or their gradient from a library."""

    name: str
    package: str
    launch: Callable[[int, str], object]
    """Calls the library for a vocabulary and a target."""
    does: Mapping[str, str]
    """What one launch does, by kernel; other kernels that it launches are left out."""
    has_logits: bool = True
    """False where the kernel makes the logits itself, by matrix products: then nothing can be said
    per logit."""

    def kernels(self, vocab: int, target: str) -> Iterator[Kernel]:
        """The first launch of each kernel, for bf16 logits of `vocab` columns.

        Raises:
            ImportError: the library is not installed.
            AttributeError, TypeError, ...: another version than this was written for.
            LookupError: it launched none of these kernels.
        """
        with recorded(target) as launches:
            self.launch(vocab, target)
        for name, does in self.does.items():
            launch = next((launch for launch in launches if launch.kernel.__name__ == name), None)
            if launch is None:
                raise LookupError(f"{name} was not launched")
            block = _block(launch) if self.has_logits else None
            yield Kernel(name, does, block, launch.report(elements_per_program=block))


def _block(launch: Specialised) -> int | None:
    return next(
        (launch.bound[name] for name in ("BLOCK_SIZE", "BLOCK_N", "BLOCK") if name in launch.bound),
        None,
    )


# Calls that give log-probabilities (B, T) from logits (B, T, V) and labels (B, T), -100 for none;
# also run in the interpreter


def liger(logits: torch.Tensor, labels: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """Liger's cross-entropy without a reduction. It writes over the logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    losses = LigerCrossEntropyFunction.apply(
        logits.flatten(0, 1), labels.flatten(), None, -100, 0.0, 0.0, "none", softcap
    )[0]
    return -losses.view(labels.shape)


def trl(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """TRL's selective log-softmax on a GPU."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, labels.clamp_min(0), row_mask=labels != -100)[
        0
    ]


# Launches


def _bf16(*shape: int) -> torch.Tensor:
    """Has no memory: launches are recorded, not run."""
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _labels(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="meta")


def _liger_cross_entropy(vocab: int, target: str, softcap: float | None = None) -> None:
    from liger_kernel.ops import cross_entropy

    with _liger_on(target, cross_entropy):  # it reads labels back to the host, so real tensors
        liger(
            torch.zeros(1, ROWS, vocab, dtype=torch.bfloat16, requires_grad=True),
            torch.zeros(1, ROWS, dtype=torch.int64),
            softcap,
        )


def _liger_grpo(vocab: int, target: str) -> None:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    labels, mask = _labels(ROWS, TOKENS), torch.ones(ROWS, TOKENS, device="meta")
    advantages = torch.ones(ROWS, device="meta")
    # Temperature 1, no penalty, so that nothing but the log-probability is computed per logit.
    loss = GrpoLossFunction.apply(
        _bf16(ROWS, TOKENS + 1, vocab),
        None,
        None,
        labels,
        advantages,
        mask,
        1.0,
        0.0,
        0.2,
        0.2,
        False,
    )[0]
    loss.backward()


def _liger_selective(vocab: int, target: str) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool, device="meta")
    fused_selective_log_softmax(_bf16(ROWS, TOKENS + 1, vocab), _labels(ROWS, TOKENS), 1.0, mask)


def _trl_selective(vocab: int, target: str) -> None:
    trl(_bf16(ROWS, TOKENS, vocab), _labels(ROWS, TOKENS)).sum().backward()


def _trl_chunked(vocab: int, target: str) -> None:
    from trl.kernels import chunked_logprob

    # Autocast, which it asks about, knows no meta device; the hidden size is no argument of its
    # kernels.
    hidden, weight = (
        torch.zeros(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (16, vocab)
    )
    labels = torch.zeros(16, dtype=torch.int64)
    with patch.object(chunked_logprob, "_use_triton", lambda device: True):
        chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, 8192, None, 1.0, ()
        )[0].sum().backward()


def _cut_cross_entropy(vocab: int, target: str) -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    hidden, weight = _bf16(TOKENS, HIDDEN), _bf16(vocab, HIDDEN)
    normalizer = cce_lse_forward_kernel(hidden, weight)
    # Without its filter, which drops small gradients.
    cce_backward_kernel(
        torch.ones(TOKENS, device="meta"),
        hidden,
        weight,
        normalizer,
        None,
        None,
        None,
        targets=_labels(TOKENS),
    )


@contextlib.contextmanager
def _liger_on(target: str, module: Any) -> Iterator[None]:
    """Liger takes its warps from what it believes to run on."""
    with (
        patch.object(module, "is_hip", lambda: target.startswith("gfx")),
        patch.object(module, "infer_device_arch", lambda *_: ARCHITECTURES[target]),
    ):
        yield


_LOGPROB = "one read: log-probability and log-sum-exp"
_GRADIENT = "one read, one write: gradient for any upstream gradient"
_LIGER = (
    "two reads, one write: loss, and over the logits its gradient for an upstream gradient of 1; "
    "torch then multiplies by the true one, which is another read and write"
)

PEERS = (
    Peer(
        "Liger cross-entropy",
        "liger-kernel",
        _liger_cross_entropy,
        {"liger_cross_entropy_kernel": _LIGER},
    ),
    Peer(
        "Liger cross-entropy, softcap",
        "liger-kernel",
        lambda vocab, target: _liger_cross_entropy(vocab, target, 30.0),
        {"liger_cross_entropy_kernel": _LIGER},
    ),
    Peer(
        "Liger GRPO",
        "liger-kernel",
        _liger_grpo,
        {
            "_grpo_loss_fwd_kernel": "one read: log-probability and GRPO's loss",
            "_grpo_loss_bwd_kernel": _GRADIENT,
        },
    ),
    Peer(
        "Liger selective log-softmax",
        "liger-kernel",
        _liger_selective,
        {"_selective_log_softmax_kernel": _LOGPROB + "; has no gradient"},
    ),
    Peer(
        "TRL selective log-softmax",
        "trl",
        _trl_selective,
        {"_forward_kernel": _LOGPROB + ", and always the entropy", "_backward_kernel": _GRADIENT},
    ),
    Peer(
        "TRL chunked log-probs",
        "trl",
        _trl_chunked,
        {
            "_forward_kernel": "one read of a tile of 8192 columns: updates the row's sums",
            "_backward_kernel": (
                "one read, one write of a tile of 8192 columns: gradient for any upstream gradient"
            ),
        },
    ),
    Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        _cut_cross_entropy,
        {
            "_cce_lse_forward_kernel": (
                "makes logits by matrix products and keeps their log-sum-exp"
            ),
            "_cce_backward_kernel": "makes logits again, and both gradients by matrix products",
        },
        has_logits=False,
    ),
)
