"""The public losses. Shapes: P pairs, S = 2P sequences (the P chosen first, then the P rejected), T
positions, N rows, V tokens, D hidden.

Layouts: dense `[2P, T, ...]`, or packed `[N, ...]` with `cu_seqlens`, int32 (2P + 1,), the offsets
of the sequences. `labels[t]` is the token that position t predicts (already shifted); positions
whose label is `ignore_index` are not scored. Equations are numbered in docs/mathematics.md and in
`mpo_kernels.oracle`.

Under autocast the linear functions run their GEMMs in autocast's dtype; hidden states and weight
may then differ in dtype, and the weight's gradient comes in its own. Everything else computes in
float32 (float64 for float64 input) and returns that, autocast or not.

This is the door: what is wrong with a call is said here, its options become one `LogitOptions`, and
whatever the caller ignores becomes one label.
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
from mpo_kernels.labels import IGNORED, with_one_ignored
from mpo_kernels.layouts import offsets_of
from mpo_kernels.ops.chunks import Targets
from mpo_kernels.ops.linear_pairs import linear_pair_loss_op
from mpo_kernels.ops.linear_tokens import LinearTokenResults
from mpo_kernels.ops.once import has_data
from mpo_kernels.ops.pairs import PairConstants, pair_loss_op
from mpo_kernels.ops.projection import Head
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions, Number, Wanted, statistics_dtype, stored
from mpo_kernels.parallel import Parallel, refused_together, whole_vocab


class MPOLossOutput(NamedTuple):
    """The loss and what it was computed from.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.int64)
        >>> out = mpo_loss(logits, labels, torch.tensor([0.5]))
        >>> out.chosen_logps, out.rejected_logps, out.reward_gap
        (tensor([-2.0794]), tensor([-2.0794]), tensor([0.]))
    """

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

    Example:
        >>> logits, labels = torch.zeros(2, 3, 8), torch.tensor([[1, 2, -100], [3, 4, 5]])
        >>> token_logprobs(logits, labels)  # log(1 / 8), and 0 where nothing is scored
        tensor([[-2.0794, -2.0794,  0.0000],
                [-2.0794, -2.0794, -2.0794]])
    """
    checks.check_tensors(logits=logits, labels=labels)
    options = LogitOptions.checked(logits, logit_scale, softcap, parallel)
    return from_logits(
        logits,
        labels,
        options,
        ignore_index=ignore_index,
        wanted=Wanted(False),
        inplace_backward=inplace_backward,
        validate=validate,
    ).logp.view(labels.shape)


def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    moments: bool = False,
    entropy_grad: bool = False,
    inplace_backward: bool = False,
    parallel: Parallel | None = None,
    validate: bool | None = None,
) -> TokenStatistics:
    """`token_logprobs` with each position's entropy and whether its label is the arg-max, in the
    same single read of the logits.

    Args:
        moments: the log of the sum of squared probabilities and the mean final logit too (equation
            11), in the same read.
        entropy_grad: the entropy is differentiable like the log-probabilities, with any upstream
            gradient of each; the gradient of both is written in one pass (equation 12).
        others: see `token_logprobs`, for errors too.

    Example:
        >>> found = token_statistics(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([1]))
        >>> found.is_argmax, bool(found.entropy < 0.01)
        (tensor([True]), True)
        >>> flat, labels = torch.zeros(1, 4, requires_grad=True), torch.tensor([2])
        >>> found = token_statistics(flat, labels, moments=True, entropy_grad=True)
        >>> found.log_sum_squares.exp(), found.mean_logit
        (tensor([0.2500]), tensor([0.]))
        >>> (found.logprobs + 0.1 * found.entropy).sum().backward()
    """
    checks.check_tensors(logits=logits, labels=labels)
    options = LogitOptions.checked(logits, logit_scale, softcap, parallel)
    found = from_logits(
        logits,
        labels,
        options,
        ignore_index=ignore_index,
        wanted=Wanted(True, moments, entropy_grad),
        inplace_backward=inplace_backward,
        validate=validate,
    )
    return token_statistics_of(found, labels.shape, moments=moments)


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
        pair_weights: (P,) float, multiplies each pair's squared error; 0 makes a filler pair,
            which counts 0 even where its error is not finite.
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

    Example:
        >>> logits = torch.zeros(2, 3, 8, requires_grad=True)  # one pair: chosen, then rejected
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = mpo_loss(logits, labels, reference_gap=torch.tensor([0.5]))
        >>> out.loss  # (1 * 0 - 0.5)^2
        tensor(0.2500, grad_fn=<MeanBackward0>)
        >>> out.loss.backward()
    """
    checks.check_tensors(
        logits=logits,
        labels=labels,
        reference_gap=reference_gap,
        pair_weights=pair_weights,
        cu_seqlens=cu_seqlens,
    )
    options = LogitOptions.checked(logits, logit_scale, softcap, parallel)
    checks.check_reduction(reduction)
    checks.check_integers(ignore_index)
    checks.check_rows("logits", logits, labels)
    sequences = checks.check_layout(logits, cu_seqlens, "logits", pairs=True)
    constants = _pair_constants(logits, reference_gap, pair_weights, beta, sequences // 2)
    offsets = offsets_of(cu_seqlens, sequences, labels.numel(), labels)
    if reads_data(validate, logits, labels, reference_gap, pair_weights, cu_seqlens):
        vocab = whole_vocab(logits.shape[-1], parallel)
        check_sequences(labels, offsets, ignore_index, vocab, parallel, pairs=True)
        _check_pair_values(reference_gap, pair_weights)
    labels = with_one_ignored(labels.long(), ignore_index)
    found = from_logits(
        logits,
        labels,
        options,
        ignore_index=IGNORED,
        wanted=Wanted(token_outputs),
        inplace_backward=inplace_backward,
        validate=False,
    )
    losses = pair_loss_op(found.logp, labels.reshape(-1), offsets, constants, parallel)
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    chosen, rejected = losses.means.chunk(2)
    return MPOLossOutput(reduced(losses.losses, reduction), chosen, rejected, losses.gaps, tokens)


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    parallel: Parallel | None = None,
) -> torch.Tensor:
    """`token_logprobs` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at
    a time.

    Only scored rows reach the head. Work on them: one GEMM where no gradient is needed, which keeps
    nothing but the result; two with a frozen head (the rows of G W are kept and scaled in
    backward); else one forward and two backward where the logits fit `chunk_bytes` and are kept
    until then; else, and under torch.compile, three backward, which computes them again. The
    weight's gradient is written once, in its own dtype, where the rows are one chunk; else it is
    summed over chunks in fp32.

    Args:
        hidden: (..., D) float. weight: (V, D), bias: (V,), of the same dtype and device.
        labels: (...) int64, on the device of `hidden` or on the CPU. CPU labels need no host sync;
            labels on a GPU are read back once.
        rows: (M,) int64 on the device of `hidden` or on the CPU, with hidden (N, D): labels (M,)
            are those of hidden[rows], which is gathered only where it is used. A row may come
            several times; its gradient is the sum.
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows. With
            a trainable head so many may be kept until backward.
        logits_dtype: torch.float32 leaves the logits of half-precision products in the precision of
            their sums, 4 bytes each; their gradient is rounded to half precision, once, for the two
            products of backward. None is the dtype of the products.
        parallel: where weight and bias hold a slice of the vocabulary. The gradient of `hidden` is
            then summed over its ranks here. With sequence_parallel hidden is (N / ranks, D), this
            rank's own rows of all those that labels are of, and so is its gradient.
    Returns:
        (...) float32, 0 at ignored positions.
    Raises:
        ValueError: shapes, dtypes, devices or label values do not fit.

    Example:
        >>> hidden, weight = torch.zeros(4, 16), torch.randn(8, 16)
        >>> linear_token_logprobs(hidden, weight, torch.tensor([1, 2, 3, -100]))
        tensor([-2.0794, -2.0794, -2.0794,  0.0000])
    """
    checks.check_tensors(hidden=hidden, weight=weight, labels=labels, bias=bias, rows=rows)
    options = LogitOptions.checked(hidden, logit_scale, softcap, parallel)
    hidden = of_all_ranks(hidden, labels, rows, parallel)
    head = Head(weight, bias, None, chunk_bytes, logits_dtype)
    targets = Targets(labels, rows, ignore_index)
    found = _from_hidden(hidden, head, targets, options, Wanted(False))
    return found.logp.view(labels.shape)


def linear_token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    moments: bool = False,
    entropy_grad: bool = False,
    parallel: Parallel | None = None,
) -> TokenStatistics:
    """`linear_token_logprobs` with each position's entropy and whether its label is the arg-max, in
    the same read of the logits.

    Args:
        moments, entropy_grad: see `token_statistics`. A differentiable entropy takes no GEMM more
            but where the head is frozen and the logits do not fit `chunk_bytes`, or under
            torch.compile: three in all instead of two.
        others: see `linear_token_logprobs`, for errors too.

    Example:
        >>> hidden, weight = torch.zeros(4, 16), torch.randn(8, 16)
        >>> linear_token_statistics(hidden, weight, torch.tensor([1, 2, 3, -100])).entropy
        tensor([2.0794, 2.0794, 2.0794, 0.0000])
    """
    checks.check_tensors(hidden=hidden, weight=weight, labels=labels, bias=bias, rows=rows)
    options = LogitOptions.checked(hidden, logit_scale, softcap, parallel)
    hidden = of_all_ranks(hidden, labels, rows, parallel)
    head = Head(weight, bias, None, chunk_bytes, logits_dtype)
    targets = Targets(labels, rows, ignore_index)
    wanted = Wanted(True, moments, entropy_grad)
    found = _from_hidden(hidden, head, targets, options, wanted)
    return token_statistics_of(found, labels.shape, moments=moments)


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
    rows: torch.Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: Number = 1.0,
    softcap: Number | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
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
        rows: see `linear_token_logprobs`; labels and cu_seqlens then count hidden[rows].
        chunk_bytes: bytes of logits that exist at once, 512 MiB by default; at least 128 rows.
            Pairs that are larger are computed in pieces, at the same cost for the first of them and
            with a fourth GEMM for each further one but for a chunk of it (none if the head is
            frozen).
        logits_dtype: see `linear_token_logprobs`.
        parallel: see `mpo_loss` and `linear_token_logprobs`.
        others: see `mpo_loss`.
    Raises:
        ValueError: shapes, dtypes, devices or values do not fit; a sequence has no scored token.

    Example:
        >>> hidden = torch.zeros(2, 3, 16, requires_grad=True)  # one pair: chosen, then rejected
        >>> head = torch.nn.Linear(16, 8, bias=False)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = linear_mpo_loss(hidden, head.weight, labels, reference_gap=torch.tensor([0.5]))
        >>> out.loss.backward()
        >>> out.loss.item(), hidden.grad.shape
        (0.25, torch.Size([2, 3, 16]))
    """
    checks.check_tensors(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        rows=rows,
        reference_gap=reference_gap,
        pair_weights=pair_weights,
        cu_seqlens=cu_seqlens,
    )
    options = LogitOptions.checked(hidden, logit_scale, softcap, parallel)
    hidden = of_all_ranks(hidden, labels, rows, parallel)
    checks.check_reduction(reduction)
    head = Head(weight, bias, None, chunk_bytes, logits_dtype)
    targets = Targets(labels, rows, ignore_index)
    call = checked_linear(hidden, head, targets, options)
    sequences = checks.check_layout(hidden, cu_seqlens, "hidden", pairs=True)
    constants = _pair_constants(hidden, reference_gap, pair_weights, beta, sequences // 2)
    if reads_data(None, hidden, reference_gap, pair_weights):
        _check_pair_values(reference_gap, pair_weights)
    # Offsets that are not given are wanted on the host.
    place = torch.device("cpu") if cu_seqlens is None else cu_seqlens.device
    offsets = offsets_of(cu_seqlens, sequences, labels.numel(), labels, place)
    if reduction == "none":
        return _linear_pairs_one_by_one(call, options, constants, offsets, labels, token_outputs)
    may_keep_chunk = not torch.compiler.is_compiling() and has_data(hidden)
    found = linear_pair_loss_op(
        call.hidden,
        call.head,
        call.targets,
        offsets,
        constants,
        options,
        call.needs,
        may_keep_chunk,
        token_outputs,
    )
    loss = found.loss / (sequences // 2) if reduction == "mean" else found.loss
    tokens = token_statistics_of(found, labels.shape) if token_outputs else None
    chosen, rejected = found.sequences.chunk(2)
    return MPOLossOutput(loss, chosen, rejected, chosen - rejected, tokens)


def _from_hidden(
    hidden: torch.Tensor,
    head: Head,
    targets: Targets,
    options: LogitOptions,
    wanted: Wanted,
) -> LinearTokenResults:
    """Checks, and what the rows give."""
    return linear_tokens(checked_linear(hidden, head, targets, options), options, wanted)


def _linear_pairs_one_by_one(
    call: LinearCall,
    options: LogitOptions,
    constants: PairConstants,
    offsets: torch.Tensor,
    labels: torch.Tensor,
    token_outputs: bool,
) -> MPOLossOutput:
    """`linear_mpo_loss` with reduction="none", by way of the log-probabilities."""
    parallel, targets = options.parallel, call.targets
    with refused_together(None if torch.compiler.is_compiling() else parallel):
        found = linear_tokens(call, options, Wanted(token_outputs))
    flat = with_one_ignored(targets.labels.long(), targets.ignore_index)
    flat, offsets = (on_device(host, call.hidden.device) for host in (flat, offsets))
    losses = pair_loss_op(found.logp, flat, offsets, constants, parallel)
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    chosen, rejected = losses.means.chunk(2)
    return MPOLossOutput(losses.losses, chosen, rejected, losses.gaps, tokens)


def _pair_constants(
    like: torch.Tensor,
    reference_gap: torch.Tensor,
    pair_weights: torch.Tensor | None,
    beta: Number,
    pairs: int,
) -> PairConstants:
    """Checks, and the constants of the pairs in the dtype of the statistics."""
    checks.check_number("beta", beta, like)
    checks.check_per("reference_gap", reference_gap, pairs, "pair", like.device)
    if pair_weights is not None:
        checks.check_per("pair_weights", pair_weights, pairs, "pair", like.device)
    dtype = statistics_dtype(like)
    gaps = reference_gap.detach().to(dtype).contiguous()
    weights = None if pair_weights is None else pair_weights.detach().to(dtype).contiguous()
    (number,), on_device = stored(like, beta)
    assert number is not None
    return PairConstants(gaps, weights, number, None if on_device is None else on_device[0])


def _check_pair_values(reference_gap: torch.Tensor, pair_weights: torch.Tensor | None) -> None:
    checks.check_finite("reference_gap", reference_gap)
    if pair_weights is not None:
        checks.check_finite("pair_weights", pair_weights)
