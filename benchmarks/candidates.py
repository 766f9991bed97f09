"""What is compared: this package, plain PyTorch, and the libraries that a user would pick instead,
each called as its documentation says.

Peers give per-token or per-sequence log-probabilities; `mpo_of` makes the same loss of them for
all.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import mpo_kernels
from benchmarks.harness import Absent, Candidate, Inputs, Loss
from benchmarks.workloads import BETA, GAP, FromHidden, FromLogits

TRL_CHUNK = 8192
"""Vocabulary columns per tile of TRL's chunked log-probabilities."""


def mpo_of(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The MPO loss of per-token log-probabilities (2P, T)."""
    scored = labels != -100
    means = (logps * scored).sum(1) / scored.sum(1)
    return _of_means(means)


def _of_means(means: torch.Tensor) -> torch.Tensor:
    chosen, rejected = means.chunk(2)
    return ((BETA * (chosen - rejected) - GAP) ** 2).mean()


def _needs_gpu(workload: FromLogits | FromHidden) -> None:
    if workload.device.type != "cuda":
        raise Absent("its kernels need a GPU")


def _log_softmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logps = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return mpo_of(logps, labels)


# From logits


def _plain_logits(workload: FromLogits) -> Loss:
    return lambda inputs: _log_softmax(inputs["logits"], workload.labels)


def _compiled_logits(workload: FromLogits) -> Loss:
    compiled = torch.compile(_log_softmax)
    return lambda inputs: compiled(inputs["logits"], workload.labels)


def _trl_loop(workload: FromLogits) -> Loss:
    """Its path for devices without its kernel, also on a GPU."""
    utils = _import("trl.trainer.utils")
    supported = utils._supports_trl_loss_kernel

    def loss(inputs: Inputs) -> torch.Tensor:
        utils._supports_trl_loss_kernel = lambda *_: False
        try:
            return mpo_of(
                utils.selective_log_softmax(inputs["logits"], workload.labels.clamp_min(0)),
                workload.labels,
            )
        finally:
            utils._supports_trl_loss_kernel = supported

    return loss


def _trl_kernel(workload: FromLogits) -> Loss:
    _needs_gpu(workload)
    from trl.trainer.utils import selective_log_softmax

    mask = workload.labels != -100
    return lambda inputs: mpo_of(
        selective_log_softmax(inputs["logits"], workload.labels.clamp_min(0), row_mask=mask),
        workload.labels,
    )


def _liger_logits(workload: FromLogits) -> Loss:
    _needs_gpu(workload)
    from liger_kernel.transformers import LigerCrossEntropyLoss

    nll = LigerCrossEntropyLoss(reduction="none")
    shape = workload.labels.shape
    return lambda inputs: mpo_of(
        -nll(inputs["logits"].flatten(0, 1), workload.labels.flatten()).view(shape), workload.labels
    )


def _quack(workload: FromLogits) -> Loss:
    _needs_gpu(workload)
    from quack.cross_entropy import cross_entropy

    shape = workload.labels.shape
    return lambda inputs: mpo_of(
        -cross_entropy(
            inputs["logits"].flatten(0, 1), workload.labels.flatten(), reduction="none"
        ).view(shape),
        workload.labels,
    )


def _ours_logits(workload: FromLogits, inplace: bool) -> Loss:
    return lambda inputs: (
        mpo_kernels.mpo_loss(
            inputs["logits"],
            workload.labels,
            workload.gap,
            beta=BETA,
            inplace_backward=inplace,
            validate=False,
        ).loss
    )


def from_logits() -> list[Candidate[FromLogits]]:
    """Everything that starts from logits."""
    return [
        Candidate("plain PyTorch", _plain_logits),
        Candidate("torch.compile", _compiled_logits),
        Candidate("TRL selective log-softmax", _trl_loop),
        Candidate("TRL Triton kernel", _trl_kernel),
        Candidate("Liger cross-entropy", _liger_logits),
        Candidate("quack cross-entropy", _quack),
        Candidate("mpo_kernels", functools.partial(_ours_logits, inplace=False), ours=True),
        Candidate("mpo_kernels in place", functools.partial(_ours_logits, inplace=True), ours=True),
    ]


# From hidden states


def _head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _log_softmax(F.linear(hidden, weight), labels)


def _plain_hidden(workload: FromHidden) -> Loss:
    return lambda inputs: _head(inputs["hidden"], inputs["weight"], workload.labels)


def _compiled_hidden(workload: FromHidden) -> Loss:
    compiled = torch.compile(_head)
    return lambda inputs: compiled(inputs["hidden"], inputs["weight"], workload.labels)


def _scored_rows(workload: FromHidden) -> Loss:
    """Plain PyTorch by someone who drops the prompt before the head: the best that a page of code
    does."""
    scored = workload.labels != -100
    labels = workload.labels[scored]

    def loss(inputs: Inputs) -> torch.Tensor:
        logits = F.linear(inputs["hidden"][scored], inputs["weight"]).float()
        logps = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return mpo_of(
            torch.zeros(scored.shape, device=logps.device).masked_scatter(scored, logps),
            workload.labels,
        )

    return loss


def _liger_hidden(workload: FromHidden, chunk: int) -> Loss:
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    class LigerMPO(LigerFusedLinearPreferenceBase):
        @staticmethod
        def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=BETA):
            return (
                ((beta * (chosen_logps - rejected_logps) - GAP) ** 2).sum()
                / (full_target.shape[0] // 2),
                chosen_logps,
                rejected_logps,
            )

        @classmethod
        def forward(cls, ctx, hidden, weight, labels):
            return super().forward(
                cls,
                ctx,
                hidden,
                weight,
                labels,
                chunk_size=chunk,
                beta=BETA,
                compute_nll_loss=False,
                average_log_prob=True,
            )

        @staticmethod
        def backward(ctx, *grad_output):
            return LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:3]

    return lambda inputs: LigerMPO.apply(inputs["hidden"], inputs["weight"], workload.labels)[0]


def _trl_hidden(workload: FromHidden) -> Loss:
    """As its fused head calls it: scored positions only on a GPU, all elsewhere."""
    from trl.kernels import ChunkedLogProbFunction

    compact = workload.device.type == "cuda"
    scored = (
        workload.labels != -100 if compact else torch.ones_like(workload.labels, dtype=torch.bool)
    )
    targets = workload.labels[scored].clamp_min(0)

    def loss(inputs: Inputs) -> torch.Tensor:
        rows = inputs["hidden"][scored] if compact else inputs["hidden"].flatten(0, 1)
        logps = ChunkedLogProbFunction.apply(
            rows, inputs["weight"], None, targets, 1.0, TRL_CHUNK, None, 1.0, ()
        )[0]
        return mpo_of(logps.new_zeros(scored.shape).masked_scatter(scored, logps), workload.labels)

    return loss


def _cut_cross_entropy(workload: FromHidden) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps drops small gradients to be faster; None computes what everyone else here computes.
    impl = (
        {"impl": "cce", "filter_eps": None}
        if workload.device.type == "cuda"
        else {"impl": "torch_compile"}
    )
    return lambda inputs: mpo_of(
        -linear_cross_entropy(
            inputs["hidden"], inputs["weight"], workload.labels, reduction="none", **impl
        ),
        workload.labels,
    )


def _torch_linear_cross_entropy(workload: FromHidden) -> Loss:
    """Its chunked form gives one sum a call, so it is called once a sequence, with the chunks that
    torch tuned."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent("torch has it from 2.13 on")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(inputs: Inputs) -> torch.Tensor:
        means = [
            -F.linear_cross_entropy(
                h, inputs["weight"], y, reduction="mean", ignore_index=-100, options=options
            )
            for h, y in zip(inputs["hidden"], workload.labels, strict=True)
        ]
        return _of_means(torch.stack(means))

    return loss


def _ours_hidden(workload: FromHidden, chunk_bytes: int | None = None) -> Loss:
    return lambda inputs: (
        mpo_kernels.linear_mpo_loss(
            inputs["hidden"],
            inputs["weight"],
            workload.labels,
            workload.gap,
            beta=BETA,
            chunk_bytes=chunk_bytes,
        ).loss
    )


def _ours_tokens(workload: FromHidden) -> Loss:
    return lambda inputs: mpo_of(
        mpo_kernels.linear_token_logprobs(inputs["hidden"], inputs["weight"], workload.labels),
        workload.labels,
    )


def from_hidden() -> list[Candidate[FromHidden]]:
    """Everything that starts from hidden states."""
    return [
        Candidate("plain PyTorch", _plain_hidden),
        Candidate("torch.compile", _compiled_hidden),
        Candidate("plain, scored rows only", _scored_rows),
        Candidate("Liger fused, chunk 1", functools.partial(_liger_hidden, chunk=1)),
        Candidate("Liger fused, chunk 16", functools.partial(_liger_hidden, chunk=16)),
        Candidate("TRL chunked log-probs", _trl_hidden),
        Candidate("cut-cross-entropy", _cut_cross_entropy),
        Candidate("torch linear_cross_entropy", _torch_linear_cross_entropy),
        Candidate("mpo_kernels", _ours_hidden, ours=True),
        Candidate(
            "mpo_kernels, 32 MiB chunks",
            functools.partial(_ours_hidden, chunk_bytes=32 << 20),
            ours=True,
        ),
        Candidate("mpo_kernels token log-probs", _ours_tokens, ours=True),
    ]


def _import(name: str):
    import importlib

    return importlib.import_module(name)
