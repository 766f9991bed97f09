"""What the public functions share: a call that was found right, in the shapes of the operators, and
what its rows give. Layouts and errors are those of `mpo_kernels.functional`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from mpo_kernels import checks
from mpo_kernels.labels import with_one_ignored
from mpo_kernels.layouts import counts_in, overwritable, three_dimensional
from mpo_kernels.ops.chunks import Targets
from mpo_kernels.ops.divided_rows import gathered_rows_op
from mpo_kernels.ops.flops import tell_counters
from mpo_kernels.ops.linear_groups import LinearLosses
from mpo_kernels.ops.linear_tokens import LinearTokenResults, linear_token_logprobs_op
from mpo_kernels.ops.once import check_mode, has_data, is_wrapped
from mpo_kernels.ops.projection import Head, Needs
from mpo_kernels.ops.tokens import InplaceTokenLogprobs, TokenResults, token_logprobs_op
from mpo_kernels.options import LogitOptions, Wanted
from mpo_kernels.parallel import Parallel, refused_together, whole_vocab


class TokenStatistics(NamedTuple):
    """What one read of a row's logits tells about its label; each of the shape of labels.

    Example:
        >>> from mpo_kernels import token_statistics
        >>> found = token_statistics(torch.zeros(1, 4), torch.tensor([2]))
        >>> (-found.logprobs).exp()  # perplexity
        tensor([4.])
    """

    logprobs: torch.Tensor
    """float32 log-probability of the label, 0 at ignored positions. Differentiable where it is the
    result of a function, detached in `MPOLossOutput`."""
    entropy: torch.Tensor
    """float32: entropy of the softmax in nats (equation 7), 0 at ignored positions. Detached but
    with entropy_grad=True."""
    is_argmax: torch.Tensor
    """bool: no token has a larger logit than the label; False at ignored positions."""
    log_sum_squares: torch.Tensor | None = None
    """float32, detached, with moments=True: log of the sum of squared probabilities (equation 11),
    0 at ignored positions."""
    mean_logit: torch.Tensor | None = None
    """float32, detached, with moments=True: mean of the final logits over the vocabulary (equation
    6), 0 at ignored positions."""


class LinearCall(NamedTuple):
    """A call of a linear function that was found right, as operators take it."""

    hidden: torch.Tensor
    """(N, D)"""
    head: Head
    targets: Targets
    needs: Needs


def from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: LogitOptions,
    *,
    ignore_index: int,
    wanted: Wanted,
    inplace_backward: bool,
    validate: bool | None,
) -> TokenResults:
    """Checks, and what the rows give."""
    checks.check_rows("logits", logits, labels)
    check_mode(logits)
    checks.check_integers(ignore_index)
    checks.check_slice("logits", logits.shape[-1], options.parallel)
    if reads_data(validate, logits, labels):
        vocab = whole_vocab(logits.shape[-1], options.parallel)
        checks.check_label_values(labels, vocab, ignore_index)
    flat = with_one_ignored(labels.reshape(-1).long(), ignore_index)
    if inplace_backward and not torch.compiler.is_compiling():
        if is_wrapped(logits):
            raise ValueError(
                "inplace_backward=True overwrites one tensor, and under vmap there are several."
                " Pass inplace_backward=False."
            )
        memory = overwritable(logits)
        if has_data(logits):
            return TokenResults(*InplaceTokenLogprobs.apply(memory, flat, options, wanted))
    return token_logprobs_op(three_dimensional(logits), flat, options, wanted)


def linear_tokens(call: LinearCall, options: LogitOptions, wanted: Wanted) -> LinearTokenResults:
    # else dlogp/dH is made where the logits are: one factor of each of its rows may come later
    in_backward = call.needs.weight_grad or call.needs.bias_grad
    in_backward |= call.needs.hidden_grad and wanted.entropy_grad
    return linear_token_logprobs_op(
        call.hidden,
        call.head,
        call.targets,
        options,
        keep_stats=in_backward,
        may_keep_logits=in_backward
        and not torch.compiler.is_compiling()
        and has_data(call.hidden)
        and not is_wrapped(call.hidden),
        keep_hidden_grad=call.needs.hidden_grad and not in_backward,
        wanted=wanted,
    )


def of_all_ranks(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor | None,
    parallel: Parallel | None,
) -> torch.Tensor:
    """The hidden states as a linear function wants them: those of a sequence-parallel caller are
    gathered and take the shape of labels, all others are returned."""
    if parallel is None or not parallel.sequence_parallel:
        return hidden
    check_mode(hidden)
    ranks = parallel.vocab_ranks
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; with sequence_parallel it is (N / {ranks},"
            " D), this rank's own of all N rows."
        )
    if rows is None and hidden.shape[0] * ranks != labels.numel():
        raise ValueError(
            f"hidden holds {hidden.shape[0]} rows and labels {labels.numel()}; with"
            f" sequence_parallel each of the {ranks} ranks holds the same number, together one for"
            " each label. Pad hidden states and labels, these with ignore_index."
        )
    # labels then do not tell how many there are
    if rows is not None and not torch.compiler.is_compiling() and has_data(hidden):
        found = parallel.rows_of_ranks(hidden.shape[0])
        if len(set(found)) > 1:
            raise ValueError(
                f"hidden holds {found} rows on the ranks of vocab_group; with sequence_parallel"
                " each holds the same number. Pad the shorter ones: rows need not name the padding."
            )
    whole = gathered_rows_op(hidden, parallel)
    return whole if rows is not None else whole.view(*labels.shape, hidden.shape[1])


def checked_linear(
    hidden: torch.Tensor, head: Head, targets: Targets, options: LogitOptions
) -> LinearCall:
    """Checks of a linear function, in the shapes of operators, and with the dtype that autocast
    sets."""
    checks.check_integers(targets.ignore_index, head.chunk_bytes)
    checks.check_logits_dtype(head.logits_dtype, hidden)
    device = hidden.device.type
    # which there knows no devices but those that compute
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    checks.check_rows("hidden", hidden, targets.labels, gathered=targets.rows, host_labels_ok=True)
    checks.check_head(hidden, head.weight, head.bias, any_dtype=autocast)
    check_mode(hidden, head.weight, head.bias)
    if not torch.compiler.is_compiling():
        tell_counters()
    checks.check_slice("weight", head.weight.shape[0], options.parallel)
    gemm_dtype = None
    if autocast and hidden.dtype != torch.float64:
        gemm_dtype = torch.get_autocast_dtype(device)
    needs = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, head.weight, head.bias)
    )
    labels, rows = targets.labels.reshape(-1), targets.rows
    return LinearCall(
        hidden.reshape(-1, hidden.shape[-1]),
        dataclasses.replace(head, gemm_dtype=gemm_dtype),
        Targets(_on_host(labels), None if rows is None else _on_host(rows), targets.ignore_index),
        Needs(*needs),
    )


def _on_host(integers: torch.Tensor) -> torch.Tensor:
    """Read once, here, and not again where their values are asked for, as in backward."""
    if torch.compiler.is_compiling() or not has_data(integers) or is_wrapped(integers):
        return integers
    return integers.cpu()


def check_sequences(
    labels: torch.Tensor,
    offsets: torch.Tensor,
    ignore_index: int,
    vocab: int,
    parallel: Parallel | None,
    *,
    pairs: bool,
) -> None:
    """Checks that read data, on whatever device it is."""
    with refused_together(parallel):
        checks.check_label_values(labels, vocab, ignore_index)
        checks.check_cu_seqlens_values(offsets, labels.numel())
    counts = counts_in(labels.reshape(-1).long() != ignore_index, offsets)
    checks.check_no_empty_sequence(
        counts if parallel is None else parallel.total(counts.cpu()), pairs=pairs
    )


def reads_data(validate: bool | None, tensor: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the data of the tensors are checked: where they are wanted to be, and there are any
    to read."""
    if validate is None:
        validate = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    return validate and all(
        each is None or (has_data(each) and not is_wrapped(each)) for each in (tensor, *others)
    )


def reduced(values: torch.Tensor, reduction: str) -> torch.Tensor:
    """One value per pair or sequence, or one for all of them."""
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def token_statistics_of(
    found: TokenResults | LinearTokenResults | LinearLosses,
    shape: torch.Size,
    *,
    detached: bool = False,
    moments: bool = False,
) -> TokenStatistics:
    """In the shape of the labels."""
    logp = found.logp.detach().clone() if detached else found.logp
    both: tuple[torch.Tensor, ...] = ()
    if moments and not isinstance(found, LinearLosses):
        both = tuple(moment.view(shape) for moment in found.moments.unbind(1))
    return TokenStatistics(
        logp.view(shape), found.entropy.view(shape), found.is_argmax.view(shape), *both
    )
