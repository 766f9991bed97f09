"""The public functions. Shapes: P pairs, S = 2P sequences (the P chosen first, then the P rejected), T positions, N rows, V tokens, D
hidden.

Layouts: dense `[2P, T, ...]`, or packed `[N, ...]` with `cu_seqlens`, int32 (2P + 1,), the offsets of the sequences. `labels[t]` is the
token that
position t predicts (already shifted); positions whose label is `ignore_index` are not scored. Formulas are numbered in
`mpo_kernels.reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpo_kernels import validation as check
from mpo_kernels.ops.linear import LinearPairLoss, LinearTokenLogprobs
from mpo_kernels.ops.pool import MeanPool
from mpo_kernels.ops.token import HeadOptions, PairLoss, TokenLogprobs


class MPOLossOutput(NamedTuple):
    """The loss and what it was computed from."""

    loss: torch.Tensor
    """() for reduction mean or sum, (P,) for none; float32, differentiable."""
    chosen_logps: torch.Tensor
    """(P,) float32, detached: log-probability of the chosen response divided by its number of scored tokens."""
    rejected_logps: torch.Tensor
    """(P,) float32, detached: the same of the rejected response."""
    reward_gap: torch.Tensor
    """(P,) float32, detached: chosen_logps - rejected_logps, in nats per token."""


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    validate: bool | None = None,
) -> torch.Tensor:
    """Log-probability of each label, log softmax(z)[label] with z = softcap * tanh(logit_scale * logits / softcap).

    No softmax is materialised. Differentiable with any upstream gradient, once (no double backward).

    Args:
        logits: (..., V) float32, bfloat16 or float16; any strides whose last one is 1, so `logits[:, :-1]` is not copied.
        labels: (...) int64.
        inplace_backward: backward overwrites `logits` with their gradient instead of allocating it. A second backward then raises.
        validate: read the data for checks: None only where that costs no host sync (CPU), True always, False never.
    Returns:
        (...) float32, 0 at ignored positions. A label outside [0, V) gives NaN where it was not refused.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    check.check_rows("logits", logits, labels)
    check.check_options(logit_scale, softcap)
    if _reads_data(logits, validate):
        check.check_label_values(labels, logits.shape[-1], ignore_index)
    rows = _three_dimensional(logits, inplace_backward)
    options = HeadOptions(ignore_index, float(logit_scale), softcap)
    logp = TokenLogprobs.apply(rows, labels.reshape(-1).long(), options, inplace_backward)
    return logp.view(labels.shape)


def mpo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    reference_gap: torch.Tensor,
    *,
    beta: float = 1.0,
    pair_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    validate: bool | None = None,
) -> MPOLossOutput:
    """L1 of MPO from logits: mean over pairs of pair_weight * (beta * RG - reference_gap)^2 (equations 1 and 2; arXiv 2505.16869).

    RG is the length-normalised log-probability of the chosen response minus that of the rejected one.

    Args:
        logits: dense (2P, T, V) or packed (N, V); see `token_logprobs`.
        labels: (2P, T) or (N,).
        reference_gap: (P,) float, the gap that the reference model has on the dominant pair; in nats per token.
        beta: scale of the gap.
        pair_weights: (P,) float, multiplies each pair's squared error; 0 makes a filler pair.
        cu_seqlens: int32 (2P + 1,) for the packed layout, on the CPU or the device of `logits`.
        reduction: "mean" (the sum over P, whatever the weights), "sum" or "none".
        inplace_backward, validate: see `token_logprobs`. Validation also refuses a sequence without a scored token, which otherwise gives
        NaN.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    check.check_rows("logits", logits, labels)
    check.check_options(logit_scale, softcap, beta, reduction)
    sequences = check.check_layout(logits, cu_seqlens, "logits", pairs=True)
    _check_pair_vectors(reference_gap, pair_weights, sequences // 2, logits.device)
    if _reads_data(logits, validate):
        check.check_label_values(labels, logits.shape[-1], ignore_index)
        _check_pair_data(labels, cu_seqlens, reference_gap, pair_weights, sequences, ignore_index)
    rows = _three_dimensional(logits, inplace_backward)
    options = HeadOptions(ignore_index, float(logit_scale), softcap)
    flat_labels = labels.reshape(-1).long()
    logp = TokenLogprobs.apply(rows, flat_labels, options, inplace_backward)
    offsets = _offsets(cu_seqlens, sequences, flat_labels.numel(), logits.device)
    return _pair_output(logp, flat_labels, offsets, reference_gap, pair_weights, beta, ignore_index, reduction)


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`token_logprobs` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at a time.

    Only scored rows reach the head. Under no_grad one GEMM and two numbers per token; otherwise backward recomputes the logits (four
    GEMMs).

    Args:
        hidden: (..., D) float. weight: (V, D), bias: (V,), of the same dtype and device.
        labels: (...) int64, on the device of `hidden` or on the CPU. CPU labels need no host sync; labels on a GPU are read back once.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows.
    Returns:
        (...) float32, 0 at ignored positions.
    Raises:
        ValueError: shapes, dtypes, devices or label values do not fit.
    """
    check.check_rows("hidden", hidden, labels, host_labels_ok=True)
    check.check_head(hidden, weight, bias)
    check.check_options(logit_scale, softcap)
    host_labels = labels.reshape(-1).cpu().long()
    check.check_label_values(host_labels, weight.shape[0], ignore_index)
    rows, index = _scored_rows(hidden, host_labels, ignore_index)
    scored_labels = host_labels[host_labels != ignore_index].to(hidden.device, non_blocking=True)
    options = HeadOptions(ignore_index, float(logit_scale), softcap)
    logp = LinearTokenLogprobs.apply(rows, weight, bias, scored_labels, options, chunk_bytes)
    if index is not None:
        logp = logp.new_zeros(host_labels.numel()).index_copy(0, index, logp)
    return logp.view(labels.shape)


def linear_mpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reference_gap: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    beta: float = 1.0,
    pair_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
) -> MPOLossOutput:
    """`mpo_loss` of the logits hidden @ weight^T + bias; the [tokens, vocab] logits never exist as a whole.

    Only scored rows reach the head, in chunks of whole pairs. The gradients of hidden, weight and bias are computed in the forward pass
    with three GEMMs
    per chunk (one under no_grad, two when the weight or the hidden states are frozen) and scaled in backward, which needs neither the
    weight nor
    the hidden states. The weight's gradient is summed over chunks in fp32. reduction="none" goes through `linear_token_logprobs` instead,
    since a sum
    over pairs cannot be taken apart in backward.

    Args:
        hidden: dense (2P, T, D) or packed (N, D). weight: (V, D), bias: (V,), of the same dtype and device.
        labels: (2P, T) or (N,) int64, on the device of `hidden` or on the CPU. CPU labels (and cu_seqlens) need no host sync; labels on a
        GPU are
            read back once, to know which rows are scored.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows. A single pair that is larger is computed in
            pieces, whose logits are then computed twice.
        others: see `mpo_loss`.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; a sequence has no scored token.
    """
    check.check_rows("hidden", hidden, labels, host_labels_ok=True)
    check.check_head(hidden, weight, bias)
    check.check_options(logit_scale, softcap, beta, reduction)
    sequences = check.check_layout(hidden, cu_seqlens, "hidden", pairs=True)
    _check_pair_vectors(reference_gap, pair_weights, sequences // 2, hidden.device)
    host_labels = labels.reshape(-1).cpu().long()
    host_offsets = _offsets(cu_seqlens, sequences, host_labels.numel(), torch.device("cpu"))
    check.check_label_values(host_labels, weight.shape[0], ignore_index)
    check.check_cu_seqlens_values(host_offsets, host_labels.numel())
    counts = _scored_counts(host_labels, host_offsets, ignore_index)
    check.check_no_empty_sequence(counts, pairs=True)
    if hidden.device.type == "cpu":
        _check_pair_values(reference_gap, pair_weights)
    options = HeadOptions(ignore_index, float(logit_scale), softcap)

    rows, _ = _scored_rows(hidden, host_labels, ignore_index)
    scored_labels = host_labels[host_labels != ignore_index].to(hidden.device, non_blocking=True)
    if reduction == "none":
        logp = LinearTokenLogprobs.apply(rows, weight, bias, scored_labels, options, chunk_bytes)
        offsets = torch.cat([counts.new_zeros(1), counts]).cumsum(0).int().to(hidden.device)
        return _pair_output(logp, scored_labels, offsets, reference_gap, pair_weights, beta, ignore_index, reduction)
    grads = torch.is_grad_enabled()
    needs = (grads and hidden.requires_grad, grads and weight.requires_grad, grads and bias is not None and bias.requires_grad)
    loss, means, gap = LinearPairLoss.apply(
        rows, weight, bias, scored_labels, tuple(counts.tolist()), _vector(reference_gap, hidden), _vector(pair_weights, hidden),
        float(beta), options, chunk_bytes, needs,
    )  # fmt: skip
    chosen, rejected = means.chunk(2)
    return MPOLossOutput(loss / (sequences // 2) if reduction == "mean" else loss, chosen, rejected, gap)


def mean_pool(
    hidden: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    validate: bool | None = None,
) -> torch.Tensor:
    """Mean over the pooled positions of each sequence, summed in fp32 whatever the input's dtype. Differentiable.

    Args:
        hidden: dense (S, T, D), or packed (N, D) with cu_seqlens int32 (S + 1,).
        mask: bool (S, T) or (N,), True where a position is pooled; None pools all. Other positions are not read.
        validate: see `token_logprobs`; refuses a sequence without a pooled position, which otherwise gives NaN.
    Returns:
        (S, D) float32.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    check.check_float("hidden", hidden)
    sequences = check.check_layout(hidden, cu_seqlens, "hidden", pairs=False)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:-1] or mask.device != hidden.device):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}; needed is bool {tuple(hidden.shape[:-1])} on {hidden.device}."
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    offsets = _offsets(cu_seqlens, sequences, rows.shape[0], hidden.device)
    if _reads_data(hidden, validate):
        check.check_cu_seqlens_values(offsets, rows.shape[0])
        kept = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device) if mask is None else mask.reshape(-1)
        check.check_no_empty_sequence(_scored_counts(kept.long(), offsets, ignore_index=0), pairs=False)
    flat_mask = None if mask is None else mask.reshape(-1).view(torch.uint8)
    return MeanPool.apply(rows if rows.stride(-1) == 1 else rows.contiguous(), flat_mask, offsets)


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
    """L2 of MPO: mean over sequences and hidden units of (mean_pool(hidden) - reference)^2 (equation 3; arXiv 2505.16869).

    Padding never enters the pool, and the pool is fp32: in bf16 the difference of two means vanishes in rounding.

    Args:
        hidden, mask, cu_seqlens, validate: see `mean_pool`.
        reference: (S, D) float32, the reference model's pooled hidden states.
        sequence_weights: (S,) float, multiplies each sequence's mean squared difference.
        reduction: "mean" (the sum over S, whatever the weights), "sum" or "none" (S,).
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit.
    """
    check.check_options(1.0, None, reduction=reduction)
    pooled = mean_pool(hidden, mask=mask, cu_seqlens=cu_seqlens, validate=validate)
    if reference.shape != pooled.shape or reference.dtype not in (torch.float32, torch.float64) or reference.device != pooled.device:
        raise ValueError(
            f"reference is {reference.dtype} {tuple(reference.shape)} on {reference.device}; needed is float32 {tuple(pooled.shape)} on "
            f"{pooled.device}."
        )
    per_sequence = (pooled - reference).square().mean(-1)  # (S,)
    if sequence_weights is not None:
        check.check_per("sequence_weights", sequence_weights, pooled.shape[0], "sequence", pooled.device)
        per_sequence = per_sequence * sequence_weights
    return _reduced(per_sequence, reduction)


def _reduced(values: torch.Tensor, reduction: str) -> torch.Tensor:
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def _reads_data(tensor: torch.Tensor, validate: bool | None) -> bool:
    return tensor.device.type == "cpu" if validate is None else validate


def _three_dimensional(logits: torch.Tensor, inplace_backward: bool) -> torch.Tensor:
    """(..., V) -> (B, T, V) without a copy where strides allow: a dense pair of outer dimensions keeps its two strides."""
    if inplace_backward and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inplace_backward=True would overwrite logits that are a leaf (a parameter or an input you hold) with their "
            "gradient. Use it on the "
            "output of a head, or pass inplace_backward=False."
        )
    view = logits if logits.ndim == 3 else logits.unsqueeze(0) if logits.ndim == 2 else logits.flatten(0, -2).unsqueeze(0)
    if view.stride(-1) != 1 and view.shape[-1] > 1:
        if inplace_backward:
            raise ValueError(f"inplace_backward=True needs logits whose last stride is 1; theirs are {logits.stride()}.")
        view = view.contiguous()
    return view


def _offsets(cu_seqlens: torch.Tensor | None, sequences: int, rows: int, device: torch.device) -> torch.Tensor:
    """int32 (S + 1,) offsets of the sequences on `device`."""
    if cu_seqlens is None:
        return torch.arange(sequences + 1, dtype=torch.int32, device=device) * (rows // sequences)
    return cu_seqlens.to(device, non_blocking=True)


def _scored_counts(labels: torch.Tensor, offsets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """int64 (S,) scored rows of each sequence."""
    running = torch.cat([labels.new_zeros(1), (labels != ignore_index).long().cumsum(0)])
    return running[offsets.long()].diff()


def _scored_rows(hidden: torch.Tensor, host_labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scored rows of hidden as (M, D), and their places, or None where all are scored."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    places = torch.nonzero(host_labels != ignore_index)[:, 0]
    if places.numel() == rows.shape[0]:
        return rows, None
    places = places.to(hidden.device, non_blocking=True)
    return rows.index_select(0, places), places


def _vector(values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Per-pair values in the dtype of the statistics."""
    return None if values is None else values.detach().to(torch.promote_types(like.dtype, torch.float32)).contiguous()


def _check_pair_vectors(reference_gap: torch.Tensor, pair_weights: torch.Tensor | None, pairs: int, device: torch.device) -> None:
    check.check_per("reference_gap", reference_gap, pairs, "pair", device)
    if pair_weights is not None:
        check.check_per("pair_weights", pair_weights, pairs, "pair", device)


def _check_pair_values(reference_gap: torch.Tensor, pair_weights: torch.Tensor | None) -> None:
    check.check_finite("reference_gap", reference_gap)
    if pair_weights is not None:
        check.check_finite("pair_weights", pair_weights)


def _check_pair_data(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    sequences: int,
    ignore_index: int,
) -> None:
    """Checks that read data, on whatever device it is."""
    offsets = _offsets(cu_seqlens, sequences, labels.numel(), labels.device)
    check.check_cu_seqlens_values(offsets, labels.numel())
    check.check_no_empty_sequence(_scored_counts(labels.reshape(-1), offsets, ignore_index), pairs=True)
    _check_pair_values(reference_gap, pair_weights)


def _pair_output(
    logp: torch.Tensor,
    labels: torch.Tensor,
    offsets: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    beta: float,
    ignore_index: int,
    reduction: str,
) -> MPOLossOutput:
    loss, means, gap = PairLoss.apply(
        logp, labels, offsets, _vector(reference_gap, logp), _vector(pair_weights, logp), float(beta), ignore_index
    )
    chosen, rejected = means.chunk(2)
    return MPOLossOutput(_reduced(loss, reduction), chosen, rejected, gap)
