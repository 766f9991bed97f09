"""Any loss that is a small function of the sums of a group's sequences, from logits or from hidden
states. `mpo_kernels.losses` has the family; a function of your own will do.

Layouts are those of `mpo_kernels.functional`, with k sequences of each of P groups: the first ones
of all groups come first, then the second ones in the same order. Of pairs: chosen, then rejected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpo_kernels import checks
from mpo_kernels.calls import (
    LinearCall,
    TokenStatistics,
    check_sequences,
    checked_linear,
    from_logits,
    linear_tokens,
    of_all_ranks,
    reads_data,
    reduced,
    token_statistics_of,
)
from mpo_kernels.fillers import weighted
from mpo_kernels.labels import with_one_ignored
from mpo_kernels.layouts import offsets_of
from mpo_kernels.losses.base import Scores, SequenceLoss, is_called_at_run_time
from mpo_kernels.losses.contract import Loss, name_of, size_of
from mpo_kernels.ops.chunks import Targets
from mpo_kernels.ops.groups import GroupLoss, group_losses_op
from mpo_kernels.ops.linear_sequences import linear_sequence_loss_op
from mpo_kernels.ops.once import has_data, is_wrapped
from mpo_kernels.ops.projection import Head
from mpo_kernels.ops.sequences import sequence_sums_op
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions, Number, Wanted, statistics_dtype
from mpo_kernels.parallel import Parallel, refused_together, whole_vocab


class SequenceLossOutput(NamedTuple):
    """The loss and what it was computed from.

    Example:
        >>> scores = Scores(torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2.0], [2.0]]))
        >>> SequenceLossOutput(torch.tensor(0.5), scores).scores.means()
        tensor([[-2.],
                [-3.]])
    """

    loss: torch.Tensor
    """() for reduction mean or sum, (P,) for none; float32, differentiable."""
    scores: Scores
    """(k, P) sums and numbers of scored tokens; float32, detached."""
    tokens: TokenStatistics | None = None
    """Detached per-token results, with token_outputs=True."""


def sequence_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss: Loss,
    *constants: torch.Tensor,
    weights: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    token_outputs: bool = False,
    parallel: Parallel | None = None,
    validate: bool | None = None,
) -> SequenceLossOutput:
    """The mean over P groups of weight * loss(scores, *constants), from logits.

    Args:
        logits: dense (kP, T, V) or packed (N, V); see `mpo_kernels.token_logprobs`.
        labels: (kP, T) or (N,).
        loss: a loss of `mpo_kernels.losses`, one of your own that extends its `SequenceLoss`, or
            any function `loss(scores, *constants) -> (P,)` of pairs (of other groups: `Custom`). A
            group's loss may depend on that group alone, and reads nothing on the host.
        constants: what the loss takes beside the scores, (P,) or (k, P) each; they get no gradient.
        weights: (P,) float, multiplies each group's loss; 0 makes a filler, which counts 0 even
            where its loss is not finite.
        row_weights: like labels, float; multiplies the log-probability of each token before the
            sums. The numbers of tokens stay those of scored ones.
        cu_seqlens: int32 (kP + 1,) for the packed layout, on the CPU or the device of `logits`.
        reduction: "mean" (the sum over P, whatever the weights), "sum" or "none".
        token_outputs, inplace_backward, parallel, validate: see `mpo_kernels.mpo_loss`. Validation
            also refuses a loss whose groups depend on each other, that reads the host, or that is
            not finite where the scores are; with None it does so in a loss's first call on a GPU
            too, and under torch.compile.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit, or the loss is none.

    Example:
        >>> from mpo_kernels.losses import DPO
        >>> logits = torch.zeros(2, 3, 8, requires_grad=True)  # one pair: chosen, rejected
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> reference_logps = torch.tensor([[-5.0], [-4.0]])
        >>> out = sequence_loss(logits, labels, DPO(beta=0.1), reference_logps)
        >>> round(out.loss.item(), 4), out.scores.logps
        (0.6444, tensor([[-4.1589],
                [-4.1589]]))
    """
    checks.check_tensors(
        logits=logits,
        labels=labels,
        weights=weights,
        row_weights=row_weights,
        cu_seqlens=cu_seqlens,
    )
    options = LogitOptions.checked(logits, logit_scale, softcap, parallel)
    checks.check_reduction(reduction)
    checks.check_integers(ignore_index)
    checks.check_rows("logits", logits, labels)
    sequences = checks.check_layout(logits, cu_seqlens, "logits", pairs=False)
    named = _named(loss, constants)
    groups = _groups_of(loss, named, weights, sequences, logits, validate)
    row_weights = _of_rows(row_weights, labels, logits)
    offsets = offsets_of(cu_seqlens, sequences, labels.numel(), labels)
    if reads_data(validate, logits, labels, cu_seqlens, weights, row_weights, *constants):
        vocab = whole_vocab(logits.shape[-1], parallel)
        check_sequences(labels, offsets, ignore_index, vocab, parallel, pairs=False)
        _check_values(named, weights, row_weights, labels.shape, parallel)
    found = from_logits(
        logits,
        labels,
        options,
        ignore_index=ignore_index,
        wanted=Wanted(token_outputs),
        inplace_backward=inplace_backward,
        validate=False,
    )
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    flat = with_one_ignored(labels.reshape(-1).long(), ignore_index)
    return _from_logprobs(
        found.logp, flat, offsets, row_weights, groups, reduction, tokens, parallel
    )


def linear_sequence_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss: Loss,
    *constants: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    token_outputs: bool = False,
    parallel: Parallel | None = None,
) -> SequenceLossOutput:
    """`sequence_loss` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at a
    time.

    Only scored rows reach the head, with three GEMMs in all (one where no gradient is needed, two
    when the weight or the hidden states are frozen). Logits of up to one chunk are kept until
    backward. Of more rows, and under torch.compile, the loss is called for chunk after chunk of
    whole groups, and its gradients are made in the forward pass: c_i = dL/dS_i of each sequence,
    then dH = diag(c) G W and dW = (diag(c) G)^T H (equation 10). reduction="none" goes through
    `mpo_kernels.linear_token_logprobs`, with its work.

    Args:
        hidden: dense (kP, T, D) or packed (N, D). weight: (V, D), bias: (V,).
        labels, rows, logits_dtype: see `mpo_kernels.linear_mpo_loss`.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows.
            Groups that are larger are computed in pieces, and rows of them may take a fourth GEMM:
            docs/kernels.md. None if the head is frozen.
        others: see `sequence_loss`. Where data are on the CPU, or a loss is called for the first
            time with several groups, it is called again to see that no group depends on another.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit, or the loss is none.

    Example:
        >>> from mpo_kernels.losses import SimPO
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(8, 4)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> linear_sequence_loss(hidden, weight, labels, SimPO(beta=2.0, gamma=0.0)).loss.detach()
        tensor(0.6931)
    """
    checks.check_tensors(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        weights=weights,
        row_weights=row_weights,
        rows=rows,
        cu_seqlens=cu_seqlens,
    )
    options = LogitOptions.checked(hidden, logit_scale, softcap, parallel)
    hidden = of_all_ranks(hidden, labels, rows, parallel)
    checks.check_reduction(reduction)
    head = Head(weight, bias, None, chunk_bytes, logits_dtype)
    targets = Targets(labels, rows, ignore_index)
    call = checked_linear(hidden, head, targets, options)
    sequences = checks.check_layout(hidden, cu_seqlens, "hidden", pairs=False)
    named = _named(loss, constants)
    groups = _groups_of(loss, named, weights, sequences, hidden, None)
    row_weights = _of_rows(row_weights, labels, hidden)
    if reads_data(None, hidden, weights, row_weights, *constants):
        _check_values(named, weights, row_weights, labels.shape, parallel)
    place = torch.device("cpu") if cu_seqlens is None else cu_seqlens.device
    offsets = offsets_of(cu_seqlens, sequences, labels.numel(), labels, place)
    if not torch.compiler.is_compiling() and has_data(hidden) and not is_wrapped(hidden):
        groups.rehearse(hidden)
    if reduction != "none" and _is_told_in_the_loop(call, groups, options):
        return _in_the_loop(
            call, offsets, row_weights, groups, options, reduction, token_outputs, labels.shape
        )
    if reads_data(None, call.targets.labels):
        vocab = whole_vocab(weight.shape[0], parallel)
        check_sequences(
            call.targets.labels, offsets.cpu(), ignore_index, vocab, parallel, pairs=False
        )
    with refused_together(None if torch.compiler.is_compiling() else parallel):
        found = linear_tokens(call, options, Wanted(token_outputs))
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    flat, offsets = (
        on_device(each, hidden.device)
        for each in (with_one_ignored(labels.reshape(-1).long(), ignore_index), offsets)
    )
    return _from_logprobs(
        found.logp,
        flat,
        offsets,
        row_weights,
        groups,
        reduction,
        tokens,
        parallel,
    )


def _is_told_in_the_loop(call: LinearCall, groups: GroupLoss, options: LogitOptions) -> bool:
    """Whether the head's loop over chunks is told the gradients, or autograd, which finds the
    logits of a single chunk where they were kept. All ranks decide alike."""
    if torch.compiler.is_compiling():
        return is_called_at_run_time(groups.loss)
    labels = call.targets.labels
    if not has_data(call.hidden) or is_wrapped(call.hidden) or is_wrapped(labels):
        return False
    scored, parallel = (labels != call.targets.ignore_index).sum(), options.parallel
    rows = scored if parallel is None else parallel.longest(scored)
    return int(rows) > call.head.rows_per_chunk(call.hidden, parallel)


def _in_the_loop(
    call: LinearCall,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None,
    groups: GroupLoss,
    options: LogitOptions,
    reduction: str,
    token_outputs: bool,
    shape: torch.Size,
) -> SequenceLossOutput:
    """The gradients are made with the loss."""
    found = linear_sequence_loss_op(
        call.hidden,
        call.head,
        call.targets,
        offsets,
        row_weights,
        groups,
        options,
        call.needs,
        token_outputs,
    )
    scores = groups.scores(*found.sequences.T.contiguous())
    loss = found.loss / scores.logps.shape[1] if reduction == "mean" else found.loss
    tokens = token_statistics_of(found, shape) if token_outputs else None
    return SequenceLossOutput(loss, scores, tokens)


def _from_logprobs(
    logp: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None,
    groups: GroupLoss,
    reduction: str,
    tokens: TokenStatistics | None,
    parallel: Parallel | None,
) -> SequenceLossOutput:
    """logp (N,), differentiable; autograd makes the gradients."""
    logp = weighted(logp, row_weights)
    sums, counts = sequence_sums_op(logp, labels, offsets, parallel)
    scores = groups.scores(sums, counts)
    if torch.compiler.is_compiling() and is_called_at_run_time(groups.loss):
        needs_grad = torch.is_grad_enabled() and sums.requires_grad
        values = group_losses_op(sums, counts, groups, needs_grad).losses
    else:
        values = groups.losses(scores)
        if not torch.compiler.is_compiling() and has_data(sums) and not is_wrapped(sums):
            groups.probe(values.detach(), scores)
        values = groups.weighted(values)
    # of their own, for the caller to edit: autograd has kept the others
    detached = Scores(scores.logps.detach().clone(), scores.tokens.clone())
    return SequenceLossOutput(reduced(values, reduction), detached, tokens)


def _named(loss: Loss, constants: tuple[torch.Tensor, ...]) -> list[tuple[str, torch.Tensor]]:
    """The constants of a loss with their names. Refuses what is no loss, and other constants than
    it needs."""
    if not callable(loss) or isinstance(loss, type):
        raise ValueError(
            f"loss is {loss!r}; needed is one of mpo_kernels.losses, or a function loss(scores,"
            " *constants) -> (P,)."
        )
    names: tuple[str, ...] = tuple(f"constant {i + 1}" for i in range(len(constants)))
    if isinstance(loss, SequenceLoss):
        names = loss.constants
    if len(names) != len(constants):
        wanted = ", ".join(names) or "no constants"
        raise ValueError(
            f"{name_of(loss)} takes {wanted} behind the loss, and {len(constants)} were given."
        )
    named = list(zip(names, constants, strict=True))
    checks.check_tensors(**dict(named))
    return named


def _groups_of(
    loss: Loss,
    named: list[tuple[str, torch.Tensor]],
    weights: torch.Tensor | None,
    sequences: int,
    like: torch.Tensor,
    validate: bool | None,
) -> GroupLoss:
    """Checks, and the loss as operators take it, in the dtype of the statistics."""
    size, dtype = size_of(loss), statistics_dtype(like)
    if sequences % size:
        raise ValueError(
            f"{sequences} sequences cannot be groups of {size}, which {name_of(loss)} takes; needed"
            f" are {size}P sequences, the first ones of all groups first."
        )
    count = sequences // size
    for name, constant in named:
        shapes = ((count,), (size, count))
        if constant.shape not in shapes or constant.is_complex():
            raise ValueError(
                f"{name} is {constant.dtype} {tuple(constant.shape)}; needed are numbers of shape"
                f" {shapes[0]} or {shapes[1]}, one per group or sequence."
            )
        if constant.device != like.device:
            raise ValueError(f"{name} is on {constant.device}; move it to {like.device}.")
    if weights is not None:
        checks.check_per("weights", weights, count, "group", like.device)
        weights = weights.detach().to(dtype)
    parts = [constant.detach().to(dtype).reshape(-1, count) for _, constant in named]
    packed = torch.cat(parts) if parts else like.new_empty(0, count, dtype=dtype)
    rows = [size if constant.ndim == 2 else 0 for _, constant in named]
    return GroupLoss(loss, size, packed, rows, weights, validate)


def _of_rows(
    row_weights: torch.Tensor | None, labels: torch.Tensor, like: torch.Tensor
) -> torch.Tensor | None:
    """(N,) checked, in the dtype and on the device of the statistics."""
    if row_weights is None:
        return None
    if row_weights.shape != labels.shape or not row_weights.is_floating_point():
        raise ValueError(
            f"row_weights is {row_weights.dtype} {tuple(row_weights.shape)}; needed are floats of"
            f" the shape of labels, {tuple(labels.shape)}."
        )
    return on_device(row_weights.detach().reshape(-1), like.device).to(statistics_dtype(like))


def _check_values(
    named: list[tuple[str, torch.Tensor]],
    weights: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    shape: torch.Size,
    parallel: Parallel | None,
) -> None:
    """Refuses constants and weights that are not finite; row weights are of labels (shape)."""
    for name, values in (*named, ("weights", weights)):
        if values is not None:
            checks.check_finite(name, values)
    if row_weights is not None:
        with refused_together(parallel):
            checks.check_finite("row_weights", row_weights.view(shape))
