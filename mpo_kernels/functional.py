"""The public functions. Shapes: P pairs, S = 2P sequences (the P chosen first, then the P
rejected), T positions, N rows, V tokens, D hidden.

Layouts: dense `[2P, T, ...]`, or packed `[N, ...]` with `cu_seqlens`, int32 (2P + 1,), the offsets
of the sequences. `labels[t]` is the token that position t predicts (already shifted); positions
whose label is `ignore_index` are not scored. Equations are numbered in docs/mathematics.md and in
`mpo_kernels.oracle`.

Under autocast the linear functions run their GEMMs in autocast's dtype; hidden states and weight
may then differ in dtype, and the weight's gradient comes in its own. Everything else computes in
float32 (float64 for float64 input) and returns that, autocast or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpo_kernels import checks
from mpo_kernels.ops.flops import tell_counters
from mpo_kernels.ops.linear_pairs import linear_pair_loss_op, linear_token_logprobs_op
from mpo_kernels.ops.once import check_mode, has_data, is_wrapped
from mpo_kernels.ops.pairs import pair_loss_op
from mpo_kernels.ops.pool import mean_pool_op
from mpo_kernels.ops.stats import as_arguments
from mpo_kernels.ops.tokens import InplaceTokenLogprobs, token_logprobs_op
from mpo_kernels.parallel import Parallel, handle_of, refused_together

Number = float | torch.Tensor
"""A Python number, or a tensor of shape () without gradient on the CPU or the device of the others,
where it is not read back. Under torch.compile it may change from call to call without a new
graph."""


class TokenStatistics(NamedTuple):
    """What one read of a row's logits tells about its label; each of the shape of labels."""

    logprobs: torch.Tensor
    """float32 log-probability of the label, 0 at ignored positions. Differentiable where it is the
    result of a function, detached in `MPOLossOutput`."""
    entropy: torch.Tensor
    """float32, detached: entropy of the softmax in nats (equation 7), 0 at ignored positions."""
    is_argmax: torch.Tensor
    """bool: no token has a larger logit than the label; False at ignored positions."""


class MPOLossOutput(NamedTuple):
    """The loss and what it was computed from."""

    loss: torch.Tensor
    """() for reduction mean or sum, (P,) for none; float32, differentiable."""
    chosen_logps: torch.Tensor
    """(P,) float32, detached: log-probability of the chosen response divided by its number of
    scored tokens."""
    rejected_logps: torch.Tensor
    """(P,) float32, detached: the same of the rejected response."""
    reward_gap: torch.Tensor
    """(P,) float32, detached: chosen_logps - rejected_logps, in nats per token."""
    tokens: TokenStatistics | None = None
    """Detached per-token results, with token_outputs=True."""


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    inplace_backward: bool = False,
    parallel: Parallel | None = None,
    validate: bool | None = None,
) -> torch.Tensor:
    """Log-probability of each label, log softmax(z)[label] with z = softcap * tanh(logit_scale *
    logits / softcap) (equations 4 to 6).

    No softmax is materialised. Differentiable with any upstream gradient, once (no double
    backward).

    Args:
        logits: (..., V) float32, bfloat16 or float16; any strides whose last one is 1, so
            `logits[:, :-1]` is not copied.
        labels: (...) int64.
        inplace_backward: backward overwrites `logits` with their gradient instead of allocating it.
            A second backward then raises. Under torch.compile it is ignored: the compiler decides
            about memory there.
        parallel: where logits hold a slice of the vocabulary; labels are still counted over the
            whole of it.
        validate: read the data for checks: None only where that costs no host sync (on the CPU, not
            under torch.compile), True wherever there are any to read (not of meta or fake tensors,
            nor under vmap), False never.
    Returns:
        (...) float32, 0 at ignored positions. A label outside [0, V) gives NaN where it was not
        refused.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    output = _from_logits(
        logits,
        labels,
        False,
        ignore_index,
        logit_scale,
        softcap,
        inplace_backward,
        parallel,
        validate,
    )
    return output[0].view(labels.shape)


def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    inplace_backward: bool = False,
    parallel: Parallel | None = None,
    validate: bool | None = None,
) -> TokenStatistics:
    """`token_logprobs` with each position's entropy and whether its label is the arg-max, in the
    same single read of the logits.

    Arguments and errors are those of `token_logprobs`; only the log-probabilities are
    differentiable.
    """
    output = _from_logits(
        logits,
        labels,
        True,
        ignore_index,
        logit_scale,
        softcap,
        inplace_backward,
        parallel,
        validate,
    )
    return _shaped(labels.shape, output[0], output[2], output[3])


def mpo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    reference_gap: torch.Tensor,
    *,
    beta: Number = 1.0,
    pair_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    token_outputs: bool = False,
    parallel: Parallel | None = None,
    validate: bool | None = None,
) -> MPOLossOutput:
    """L1 of MPO from logits: mean over pairs of pair_weight * (beta * RG - reference_gap)^2
    (equations 1 and 2; arXiv 2505.16869).

    RG is the length-normalised log-probability of the chosen response minus that of the rejected
    one.

    Args:
        logits: dense (2P, T, V) or packed (N, V); see `token_logprobs`.
        labels: (2P, T) or (N,).
        reference_gap: (P,) float, the gap that the reference model has on the dominant pair; in
            nats per token.
        beta: scale of the gap.
        pair_weights: (P,) float, multiplies each pair's squared error; 0 makes a filler pair.
        cu_seqlens: int32 (2P + 1,) for the packed layout, on the CPU or the device of `logits`.
        reduction: "mean" (the sum over P, whatever the weights), "sum" or "none".
        token_outputs: return each token's log-probability, entropy and arg-max too, in the same
            read.
        parallel: where the vocabulary or the positions are divided over ranks. The loss is then
            that of the whole, the same on every rank, and the gradients are this rank's part of its
            gradient.
        inplace_backward, validate: see `token_logprobs`. Validation also refuses a sequence without
            a scored token, which otherwise gives NaN.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    checks.check_options(logit_scale, softcap, beta, reduction, like=logits)
    checks.check_integers(ignore_index)
    checks.check_tensors(
        logits=logits,
        labels=labels,
        reference_gap=reference_gap,
        pair_weights=pair_weights,
        cu_seqlens=cu_seqlens,
    )
    checks.check_parallel(parallel)
    checks.check_rows("logits", logits, labels)
    sequences = checks.check_layout(logits, cu_seqlens, "logits", pairs=True)
    _check_pair_vectors(reference_gap, pair_weights, sequences // 2, logits.device)
    if _reads_data(validate, logits, labels, reference_gap, pair_weights, cu_seqlens):
        _check_pair_data(
            labels,
            cu_seqlens,
            reference_gap,
            pair_weights,
            sequences,
            ignore_index,
            logits.shape[-1],
            parallel,
        )
    logp, _, entropy, is_argmax = _from_logits(
        logits,
        labels,
        token_outputs,
        ignore_index,
        logit_scale,
        softcap,
        inplace_backward,
        parallel,
        validate=False,
    )
    offsets = _offsets(cu_seqlens, sequences, labels.numel(), labels)
    tokens = (
        _shaped(labels.shape, logp.detach().clone(), entropy, is_argmax) if token_outputs else None
    )
    return _pair_output(
        logp,
        labels.reshape(-1).long(),
        offsets,
        reference_gap,
        pair_weights,
        beta,
        ignore_index,
        reduction,
        parallel,
        tokens,
    )


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    chunk_bytes: int | None = None,
    parallel: Parallel | None = None,
) -> torch.Tensor:
    """`token_logprobs` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at
    a time.

    Only scored rows reach the head. Work on them: one GEMM where no gradient is needed, which keeps
    nothing but the result; two with a frozen head (the rows of G W are kept and scaled in
    backward); else one forward and three backward, which computes the logits again.

    Args:
        hidden: (..., D) float. weight: (V, D), bias: (V,), of the same dtype and device.
        labels: (...) int64, on the device of `hidden` or on the CPU. CPU labels need no host sync;
            labels on a GPU are read back once.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows.
        parallel: where weight and bias hold a slice of the vocabulary. The gradient of `hidden` is
            then summed over its ranks here.
    Returns:
        (...) float32, 0 at ignored positions.
    Raises:
        ValueError: shapes, dtypes, devices or label values do not fit.
    """
    output = _from_hidden(
        hidden,
        weight,
        bias,
        labels,
        False,
        ignore_index,
        logit_scale,
        softcap,
        chunk_bytes,
        parallel,
    )
    return output[0].view(labels.shape)


def linear_token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    chunk_bytes: int | None = None,
    parallel: Parallel | None = None,
) -> TokenStatistics:
    """`linear_token_logprobs` with each position's entropy and whether its label is the arg-max, in
    the same read of the logits.

    Arguments and errors are those of `linear_token_logprobs`; only the log-probabilities are
    differentiable.
    """
    output = _from_hidden(
        hidden,
        weight,
        bias,
        labels,
        True,
        ignore_index,
        logit_scale,
        softcap,
        chunk_bytes,
        parallel,
    )
    return _shaped(labels.shape, *output[:3])


def linear_mpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reference_gap: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    beta: Number = 1.0,
    pair_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    token_outputs: bool = False,
    parallel: Parallel | None = None,
) -> MPOLossOutput:
    """`mpo_loss` of the logits hidden @ weight^T + bias; the [tokens, vocab] logits never exist as
    a whole.

    Only scored rows reach the head, in chunks of whole pairs. The gradients of hidden, weight and
    bias are computed in the forward pass with three GEMMs per chunk (one where no gradient is
    needed, two when the weight or the hidden states are frozen) and scaled in backward, which needs
    neither the weight nor the hidden states. The weight's gradient is summed over chunks in fp32;
    where there is one chunk that is smaller than it, in fp32 or fp64, the third GEMM waits for
    backward. reduction="none" goes through `linear_token_logprobs` instead, since a sum over pairs
    cannot be taken apart in backward.

    Args:
        hidden: dense (2P, T, D) or packed (N, D). weight: (V, D), bias: (V,), of the same dtype and
            device.
        labels: (2P, T) or (N,) int64, on the device of `hidden` or on the CPU. CPU labels (and
            cu_seqlens) need no host sync; labels on a GPU are read back once, to know which rows
            are scored.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows.
            Pairs that are larger are computed in pieces, at the same cost for the first of them and
            with a fourth GEMM for each further one (none if the head is frozen).
        parallel: see `mpo_loss` and `linear_token_logprobs`.
        others: see `mpo_loss`.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; a sequence has no scored token.
    """
    checks.check_options(logit_scale, softcap, beta, reduction, like=hidden)
    checks.check_integers(ignore_index, chunk_bytes)
    gemm_dtype = _check_head(hidden, weight, bias, labels, parallel)
    checks.check_tensors(
        reference_gap=reference_gap, pair_weights=pair_weights, cu_seqlens=cu_seqlens
    )
    sequences = checks.check_layout(hidden, cu_seqlens, "hidden", pairs=True)
    _check_pair_vectors(reference_gap, pair_weights, sequences // 2, hidden.device)
    if _reads_data(None, hidden, reference_gap, pair_weights):
        _check_pair_values(reference_gap, pair_weights)
    flat_labels = labels.reshape(-1)
    host = torch.device("cpu")  # where offsets that are not given are wanted
    offsets = _offsets(
        cu_seqlens,
        sequences,
        labels.numel(),
        labels,
        host if cu_seqlens is None else cu_seqlens.device,
    )
    if reduction == "none":
        with refused_together(None if torch.compiler.is_compiling() else parallel):
            logp, entropy, is_argmax, *_ = _from_hidden(
                hidden,
                weight,
                bias,
                labels,
                token_outputs,
                ignore_index,
                logit_scale,
                softcap,
                chunk_bytes,
                parallel,
            )
        tokens = (
            _shaped(labels.shape, logp.detach().clone(), entropy, is_argmax)
            if token_outputs
            else None
        )
        device = hidden.device
        return _pair_output(
            logp,
            flat_labels.long().to(device),
            offsets.to(device),
            reference_gap,
            pair_weights,
            beta,
            ignore_index,
            reduction,
            parallel,
            tokens,
        )
    rows, gaps, weights = (
        hidden.reshape(-1, hidden.shape[-1]),
        _vector(reference_gap, hidden),
        _vector(pair_weights, hidden),
    )
    loss, means, gap, *token_results = linear_pair_loss_op(
        rows, weight, bias, flat_labels, offsets, gaps, weights, *_beta(hidden, beta), *_needs(hidden, weight, bias),
        not torch.compiler.is_compiling() and has_data(hidden),
        ignore_index, *as_arguments(hidden, logit_scale, softcap), chunk_bytes, gemm_dtype, token_outputs, handle_of(parallel),
    )[:6]  # fmt: skip
    chosen, rejected = means.chunk(2)
    tokens = _shaped(labels.shape, *token_results) if token_outputs else None
    return MPOLossOutput(
        loss / (sequences // 2) if reduction == "mean" else loss, chosen, rejected, gap, tokens
    )


def mean_pool(
    hidden: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    validate: bool | None = None,
) -> torch.Tensor:
    """Mean over the pooled positions of each sequence, summed in fp32 whatever the input's dtype.
    Differentiable.

    Args:
        hidden: dense (S, T, D), or packed (N, D) with cu_seqlens int32 (S + 1,).
        mask: bool (S, T) or (N,), True where a position is pooled; None pools all. Other positions
            are not read.
        validate: see `token_logprobs`; refuses a sequence without a pooled position, which
            otherwise gives NaN.
    Returns:
        (S, D) float32.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    checks.check_tensors(hidden=hidden, mask=mask, cu_seqlens=cu_seqlens)
    checks.check_float("hidden", hidden)
    check_mode(hidden)
    sequences = checks.check_layout(hidden, cu_seqlens, "hidden", pairs=False)
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != hidden.shape[:-1] or mask.device != hidden.device
    ):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; needed is bool"
            f" {tuple(hidden.shape[:-1])} on {hidden.device}."
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    offsets = _offsets(cu_seqlens, sequences, rows.shape[0], hidden)
    if _reads_data(validate, hidden, mask, cu_seqlens):
        checks.check_cu_seqlens_values(offsets, rows.shape[0])
        kept = (
            torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
            if mask is None
            else mask.reshape(-1)
        )
        checks.check_no_empty_sequence(_counts(kept, offsets), pairs=False)
    return mean_pool_op(rows, None if mask is None else mask.reshape(-1), offsets)[0]


def retention_loss(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sequence_weights: torch.Tensor | None = None,
    reduction: str = "mean",
    validate: bool | None = None,
) -> torch.Tensor:
    """L2 of MPO: mean over sequences and hidden units of (mean_pool(hidden) - reference)^2
    (equations 3 and 9; arXiv 2505.16869).

    Padding never enters the pool, and the pool is fp32: in bf16 the difference of two means
    vanishes in rounding.

    Args:
        hidden, mask, cu_seqlens, validate: see `mean_pool`.
        reference: (S, D) float32, the reference model's pooled hidden states.
        sequence_weights: (S,) float, multiplies each sequence's mean squared difference.
        reduction: "mean" (the sum over S, whatever the weights), "sum" or "none" (S,).
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    checks.check_options(1.0, None, reduction=reduction)
    checks.check_tensors(hidden=hidden, reference=reference, sequence_weights=sequence_weights)
    pooled = mean_pool(hidden, mask=mask, cu_seqlens=cu_seqlens, validate=validate)
    if (
        reference.shape != pooled.shape
        or reference.dtype not in (torch.float32, torch.float64)
        or reference.device != pooled.device
    ):
        raise ValueError(
            f"reference is {reference.dtype} {tuple(reference.shape)} on {reference.device}; needed"
            f" is float32 {tuple(pooled.shape)} on {pooled.device}."
        )
    per_sequence = (pooled - reference.to(pooled.dtype)).square().mean(-1)  # (S,)
    if sequence_weights is not None:
        checks.check_per(
            "sequence_weights", sequence_weights, pooled.shape[0], "sequence", pooled.device
        )
        per_sequence = per_sequence * sequence_weights.to(pooled.dtype)
    return _reduced(per_sequence, reduction)


def _reduced(values: torch.Tensor, reduction: str) -> torch.Tensor:
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def _reads_data(validate: bool | None, rows: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the data of the tensors are checked: where they are wanted to be, and there are any
    to read."""
    wanted = (
        rows.device.type == "cpu" and not torch.compiler.is_compiling()
        if validate is None
        else validate
    )
    return wanted and all(
        tensor is None or (has_data(tensor) and not is_wrapped(tensor))
        for tensor in (rows, *others)
    )


def _from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_outputs: bool,
    ignore_index: int,
    logit_scale: Number,
    softcap: Number | None,
    inplace_backward: bool,
    parallel: Parallel | None,
    validate: bool | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks, and logp (N,), normalizer, entropy and is_argmax (N,) or (0,)."""
    checks.check_tensors(logits=logits, labels=labels)
    checks.check_parallel(parallel)
    checks.check_rows("logits", logits, labels)
    check_mode(logits)
    checks.check_options(logit_scale, softcap, like=logits)
    checks.check_integers(ignore_index)
    checks.check_slice("logits", logits.shape[-1], parallel)
    if _reads_data(validate, logits, labels):
        checks.check_label_values(labels, _vocab(logits.shape[-1], parallel), ignore_index)
    head = as_arguments(logits, logit_scale, softcap)
    arguments = labels.reshape(-1).long(), token_outputs, ignore_index, *head, handle_of(parallel)
    if inplace_backward and not torch.compiler.is_compiling():
        if is_wrapped(logits):
            raise ValueError(
                "inplace_backward=True overwrites one tensor, and under vmap there are several."
                " Pass inplace_backward=False."
            )
        overwritable = _overwritable(logits)
        if has_data(logits):
            return InplaceTokenLogprobs.apply(overwritable, *arguments)
    return token_logprobs_op(_three_dimensional(logits), *arguments)


def _from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    token_outputs: bool,
    ignore_index: int,
    logit_scale: Number,
    softcap: Number | None,
    chunk_bytes: int | None,
    parallel: Parallel | None,
) -> tuple[torch.Tensor, ...]:
    """Checks, and logp (N,), entropy and is_argmax (N,) or (0,), and what backward keeps."""
    checks.check_options(logit_scale, softcap, like=hidden)
    checks.check_integers(ignore_index, chunk_bytes)
    gemm_dtype = _check_head(hidden, weight, bias, labels, parallel)
    hidden_grad, *head_grads = _needs(hidden, weight, bias)
    return linear_token_logprobs_op(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), any(head_grads), hidden_grad and not any(head_grads),
        ignore_index, *as_arguments(hidden, logit_scale, softcap), chunk_bytes, gemm_dtype, token_outputs, handle_of(parallel),
    )  # fmt: skip


def _check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    parallel: Parallel | None,
) -> torch.dtype | None:
    """Checks, and the dtype of the GEMMs where autocast sets it."""
    checks.check_tensors(hidden=hidden, weight=weight, labels=labels, bias=bias)
    checks.check_parallel(parallel)
    device = hidden.device.type
    # which there knows no devices but those that compute
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    checks.check_rows("hidden", hidden, labels, host_labels_ok=True)
    checks.check_head(hidden, weight, bias, any_dtype=autocast)
    check_mode(hidden, weight, bias)
    if not torch.compiler.is_compiling():
        tell_counters()
    checks.check_slice("weight", weight.shape[0], parallel)
    return torch.get_autocast_dtype(device) if autocast and hidden.dtype != torch.float64 else None


def _needs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[bool, bool, bool]:
    """Which of them need a gradient here and now."""
    grads = torch.is_grad_enabled()
    return (
        grads and hidden.requires_grad,
        grads and weight.requires_grad,
        grads and bias is not None and bias.requires_grad,
    )


def _vocab(local: int, parallel: Parallel | None) -> int:
    return local if parallel is None or parallel.vocab_group is None else parallel.vocab


def _three_dimensional(logits: torch.Tensor) -> torch.Tensor:
    """(..., V) -> (B, T, V) without a copy where strides allow: a dense pair of outer dimensions
    keeps its two strides."""
    view = (
        logits
        if logits.ndim == 3
        else logits.unsqueeze(0)
        if logits.ndim == 2
        else logits.flatten(0, -2).unsqueeze(0)
    )
    return view if view.stride(-1) == 1 or view.shape[-1] == 1 else view.contiguous()


def _overwritable(logits: torch.Tensor) -> torch.Tensor:
    """`_three_dimensional` of logits whose memory backward may overwrite: no leaf's, and none that
    several logits share."""
    memory = logits if logits._base is None else logits._base
    if memory.is_leaf and memory.requires_grad and torch.is_grad_enabled():
        given = "are a leaf" if memory is logits else "are a view of a leaf"
        raise ValueError(
            f"inplace_backward=True would overwrite logits that {given} (a parameter or an input"
            " you hold) with their gradient. Use it on the output of a head, or pass"
            " inplace_backward=False."
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "inplace_backward=True needs logits whose last stride is 1; theirs are"
            f" {logits.stride()}."
        )
    if _may_overlap(logits):
        raise ValueError(
            "inplace_backward=True needs memory of its own for each logit; these have shape"
            f" {tuple(logits.shape)} and strides {logits.stride()}, so that several share one"
            " (expand, as_strided). Pass inplace_backward=False."
        )
    return _three_dimensional(logits)


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements may share their memory: some stride is no larger than what the smaller
    ones reach together."""
    reach = 0
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _offsets(
    cu_seqlens: torch.Tensor | None,
    sequences: int,
    rows: int,
    like: torch.Tensor,
    device: torch.device | None = None,
) -> torch.Tensor:
    """int32 (S + 1,) offsets of the sequences on `device`, by default that of `like`; of the kind
    of `like` where that has no data."""
    device = device or like.device
    if cu_seqlens is None and not has_data(like):
        return (
            like.new_ones(sequences + 1, dtype=torch.int32).cumsum(0, dtype=torch.int32) - 1
        ) * (rows // sequences)
    if cu_seqlens is None:
        return torch.arange(sequences + 1, dtype=torch.int32, device=device) * (rows // sequences)
    return cu_seqlens.to(device, non_blocking=True)


def _counts(counted: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """bool (N,) -> int64 (S,), how many in each sequence."""
    running = torch.cat([offsets.new_zeros(1, dtype=torch.int64), counted.long().cumsum(0)])
    return running[offsets.long()].diff()


def _beta(like: torch.Tensor, beta: Number) -> tuple[float, torch.Tensor | None]:
    """As operators take it: a number, or () on the device in its place."""
    number, stored = as_arguments(like, beta)
    return number, None if stored is None else stored[0]


def _vector(values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Per-pair values in the dtype of the statistics."""
    return (
        None
        if values is None
        else values.detach().to(torch.promote_types(like.dtype, torch.float32)).contiguous()
    )


def _shaped(
    shape: torch.Size, logp: torch.Tensor, entropy: torch.Tensor, is_argmax: torch.Tensor
) -> TokenStatistics:
    return TokenStatistics(logp.view(shape), entropy.view(shape), is_argmax.view(shape))


def _check_pair_vectors(
    reference_gap: torch.Tensor, pair_weights: torch.Tensor | None, pairs: int, device: torch.device
) -> None:
    checks.check_per("reference_gap", reference_gap, pairs, "pair", device)
    if pair_weights is not None:
        checks.check_per("pair_weights", pair_weights, pairs, "pair", device)


def _check_pair_values(reference_gap: torch.Tensor, pair_weights: torch.Tensor | None) -> None:
    checks.check_finite("reference_gap", reference_gap)
    if pair_weights is not None:
        checks.check_finite("pair_weights", pair_weights)


def _check_pair_data(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    sequences: int,
    ignore_index: int,
    vocab: int,
    parallel: Parallel | None,
) -> None:
    """Checks that read data, on whatever device it is; `vocab` tokens are here."""
    offsets = _offsets(cu_seqlens, sequences, labels.numel(), labels)
    with refused_together(parallel):
        checks.check_label_values(labels, _vocab(vocab, parallel), ignore_index)
        checks.check_cu_seqlens_values(offsets, labels.numel())
    counts = _counts(labels.reshape(-1).long() != ignore_index, offsets)
    checks.check_no_empty_sequence(
        counts if parallel is None else parallel.total(counts.cpu()), pairs=True
    )
    _check_pair_values(reference_gap, pair_weights)


def _pair_output(
    logp: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    beta: Number,
    ignore_index: int,
    reduction: str,
    parallel: Parallel | None,
    tokens: TokenStatistics | None,
) -> MPOLossOutput:
    gaps, weights = _vector(reference_gap, logp), _vector(pair_weights, logp)
    loss, means, gap, *_ = pair_loss_op(
        logp, labels, offsets, gaps, weights, *_beta(logp, beta), ignore_index, handle_of(parallel)
    )
    chosen, rejected = means.chunk(2)
    return MPOLossOutput(_reduced(loss, reduction), chosen, rejected, gap, tokens)
