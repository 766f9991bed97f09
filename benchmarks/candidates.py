"""What is compared: this package, plain PyTorch, and the libraries that a user would pick instead,
each called as its documentation says.

Peers give per-token or per-sequence log-probabilities; the workload's objective makes the same loss
of them for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import mpo_kernels
from benchmarks.harness import Absent, Candidate, Inputs, Loss
from benchmarks.objectives import DPO, MPO, ORPO, REFERENCE_LOGPS, SIMPO, Objective
from benchmarks.workloads import FromHidden, FromLogits
from mpo_kernels.losses import Scores

TRL_CHUNK = 8192
"""Vocabulary columns per tile of TRL's chunked log-probabilities."""


def _needs_gpu(workload: FromLogits | FromHidden) -> None:
    if workload.device.type != "cuda":
        raise Absent("its kernels need a GPU")


def _log_softmax(
    logits: torch.Tensor, labels: torch.Tensor, objective: Objective = MPO
) -> torch.Tensor:
    logps = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return objective.of_tokens(logps, labels)


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
            return MPO.of_tokens(
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
    return lambda inputs: MPO.of_tokens(
        selective_log_softmax(inputs["logits"], workload.labels.clamp_min(0), row_mask=mask),
        workload.labels,
    )


def _liger_logits(workload: FromLogits) -> Loss:
    _needs_gpu(workload)
    from liger_kernel.transformers import LigerCrossEntropyLoss

    nll = LigerCrossEntropyLoss(reduction="none")
    shape = workload.labels.shape
    return lambda inputs: MPO.of_tokens(
        -nll(inputs["logits"].flatten(0, 1), workload.labels.flatten()).view(shape), workload.labels
    )


def _quack(workload: FromLogits) -> Loss:
    _needs_gpu(workload)
    from quack.cross_entropy import cross_entropy

    shape = workload.labels.shape
    return lambda inputs: MPO.of_tokens(
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


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, objective: Objective
) -> torch.Tensor:
    return _log_softmax(F.linear(hidden, weight), labels, objective)


def plain_hidden(workload: FromHidden, head: Callable[..., torch.Tensor] = _head) -> Loss:
    return lambda inputs: head(
        inputs["hidden"], inputs["weight"], workload.labels, workload.objective
    )


def _compiled_hidden(workload: FromHidden) -> Loss:
    return plain_hidden(workload, torch.compile(_head))


def plain_on_scored_rows(workload: FromHidden) -> Loss:
    """Plain PyTorch by someone who drops the prompt before the head: the best that a page of code
    does."""
    scored = workload.labels != -100
    labels = workload.labels[scored]

    def loss(inputs: Inputs) -> torch.Tensor:
        logits = F.linear(inputs["hidden"][scored], inputs["weight"]).float()
        logps = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        return workload.objective.of_tokens(
            torch.zeros(scored.shape, device=logps.device).masked_scatter(scored, logps),
            workload.labels,
        )

    return loss


def liger_hidden(workload: FromHidden, chunk: int) -> Loss:
    """Its own DPO, SimPO and ORPO; of another loss its base class, as its own are made of it."""
    from liger_kernel import chunked_loss

    if chunk > 1 and workload.pairs == 1:
        raise Absent("one pair is chunk 1")
    # its own: it marks them as dynamic, and others' compiled code would be compiled anew for that
    labels = workload.labels.clone()
    if workload.objective in (SIMPO, ORPO):
        made = (
            chunked_loss.LigerFusedLinearSimPOLoss(
                beta=2.5, gamma=1.375, compute_nll_loss=False, chunk_size=chunk
            )
            if workload.objective is SIMPO
            else chunked_loss.LigerFusedLinearORPOLoss(beta=0.1, chunk_size=chunk)
        )
        return lambda inputs: made(inputs["weight"], inputs["hidden"], labels)[0]
    function = _liger_dpo() if workload.objective is DPO else _liger_of(workload)
    return lambda inputs: function.apply(inputs["hidden"], inputs["weight"], labels, chunk)[0]


def _liger_base(preference_loss: Callable[..., Any]) -> type[torch.autograd.Function]:
    """An autograd function of (hidden, weight, labels, chunk), from sums of log-probabilities."""
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    class LigerLoss(LigerFusedLinearPreferenceBase):
        preference_loss_fn = staticmethod(preference_loss)

        @classmethod
        def forward(cls, ctx, hidden, weight, labels, chunk):
            return super().forward(
                cls,
                ctx,
                hidden,
                weight,
                labels,
                chunk_size=chunk,
                compute_nll_loss=False,
                average_log_prob=False,
            )

        @staticmethod
        def backward(ctx, *grad_output):
            return *LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:3], None

    return LigerLoss


def _liger_dpo() -> type[torch.autograd.Function]:
    """Its formula with stored sums of the reference, which it would compute by a second head."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    chosen, rejected = (torch.tensor(logps) for logps in REFERENCE_LOGPS)
    return _liger_base(
        functools.partial(
            LigerFusedLinearDPOFunction.preference_loss_fn,
            ref_chosen_logps=chosen,
            ref_rejected_logps=rejected,
        )
    )


def _liger_of(workload: FromHidden) -> type[torch.autograd.Function]:
    """The objective's formula; its lengths are the same for all sequences, since it is not told of
    which ones a chunk is."""
    formula, tokens = workload.objective.formula, float(workload.scored_tokens)

    def preference_loss(chosen_logps, rejected_logps, full_target, beta):
        sums = torch.stack([chosen_logps, rejected_logps])
        losses = formula(Scores(sums, torch.full_like(sums, tokens)))
        return losses.sum() / (full_target.shape[0] // 2), chosen_logps, rejected_logps

    return _liger_base(preference_loss)


def _trl_whole_logits(workload: FromHidden) -> Loss:
    """As its CPO, SimPO and ORPO trainers do: the logits of all positions."""
    from trl.trainer.utils import selective_log_softmax

    labels = workload.labels.clamp_min(0)
    return lambda inputs: workload.objective.of_tokens(
        selective_log_softmax(F.linear(inputs["hidden"], inputs["weight"]), labels),
        workload.labels,
    )


def trl_hidden(workload: FromHidden) -> Loss:
    """As the fused head of its DPO trainer calls it: scored positions only on a GPU, all
    elsewhere."""
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
        return workload.objective.of_tokens(
            logps.new_zeros(scored.shape).masked_scatter(scored, logps), workload.labels
        )

    return loss


def _cut_cross_entropy(workload: FromHidden) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps drops small gradients to be faster; None computes what everyone else here computes.
    impl = (
        {"impl": "cce", "filter_eps": None}
        if workload.device.type == "cuda"
        else {"impl": "torch_compile"}
    )
    return lambda inputs: workload.objective.of_tokens(
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
    tokens = (workload.labels != -100).sum(1)

    def loss(inputs: Inputs) -> torch.Tensor:
        sums = [
            -F.linear_cross_entropy(
                h, inputs["weight"], y, reduction="sum", ignore_index=-100, options=options
            )
            for h, y in zip(inputs["hidden"], workload.labels, strict=True)
        ]
        return workload.objective.of_sequences(torch.stack(sums), tokens)

    return loss


def ours_from_hidden(workload: FromHidden, chunk_bytes: int | None = None) -> Loss:
    """MPO by its own function, every other loss by the general one."""
    ours = ours_of_mpo if workload.objective is MPO else ours_of_sequences
    return ours(workload, chunk_bytes)


def ours_of_mpo(workload: FromHidden, chunk_bytes: int | None = None) -> Loss:
    """MPO, whose loss is a kernel in the loop over chunks."""
    gap = workload.constants[0]
    return lambda inputs: (
        mpo_kernels.linear_mpo_loss(
            inputs["hidden"], inputs["weight"], workload.labels, gap, chunk_bytes=chunk_bytes
        ).loss
    )


def ours_of_sequences(workload: FromHidden, chunk_bytes: int | None = None) -> Loss:
    """Any objective, as a function of sums."""
    return lambda inputs: (
        mpo_kernels.linear_sequence_loss(
            inputs["hidden"],
            inputs["weight"],
            workload.labels,
            workload.objective.ours,
            *workload.constants,
            chunk_bytes=chunk_bytes,
        ).loss
    )


def ours_of_tokens(workload: FromHidden, chunk_bytes: int | None = None) -> Loss:
    """Any objective, by autograd on log-probabilities."""
    return lambda inputs: workload.objective.of_tokens(
        mpo_kernels.linear_token_logprobs(
            inputs["hidden"], inputs["weight"], workload.labels, chunk_bytes=chunk_bytes
        ),
        workload.labels,
    )


def from_hidden() -> list[Candidate[FromHidden]]:
    """Everything that starts from hidden states."""
    return [
        Candidate("plain PyTorch", plain_hidden),
        Candidate("torch.compile", _compiled_hidden),
        Candidate("plain, scored rows only", plain_on_scored_rows),
        Candidate("Liger fused, chunk 1", functools.partial(liger_hidden, chunk=1)),
        Candidate("Liger fused, chunk 16", functools.partial(liger_hidden, chunk=16)),
        Candidate("TRL whole logits", _trl_whole_logits),
        Candidate("TRL chunked log-probs", trl_hidden),
        Candidate("cut-cross-entropy", _cut_cross_entropy),
        Candidate("torch linear_cross_entropy", _torch_linear_cross_entropy),
        Candidate("mpo_kernels", ours_from_hidden, ours=True),
        Candidate(
            "mpo_kernels, 32 MiB chunks",
            functools.partial(ours_from_hidden, chunk_bytes=32 << 20),
            ours=True,
        ),
        Candidate("mpo_kernels token log-probs", ours_of_tokens, ours=True),
    ]


def _import(name: str):
    import importlib

    return importlib.import_module(name)
