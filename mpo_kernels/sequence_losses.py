"""Any loss that is a small function of the sums of a group's sequences, from logits or from hidden
states. `mpo_kernels.losses` has the family; a function of your own will do.

Layouts are those of `mpo_kernels.functional`, with k sequences of each of P groups: the first ones
of all groups come first, then the second ones in the same order. Of pairs: chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mpo_kernels import checks
from mpo_kernels.calls import (
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
from mpo_kernels.labels import with_one_ignored
from mpo_kernels.layouts import offsets_of
from mpo_kernels.losses.base import Scores, SequenceLoss
from mpo_kernels.ops.chunks import Targets
from mpo_kernels.ops.projection import Head
from mpo_kernels.ops.sequences import sequence_sums_op
from mpo_kernels.ops.transfer import on_device
from mpo_kernels.options import LogitOptions, Number, Wanted, statistics_dtype
from mpo_kernels.parallel import Parallel, refused_together, whole_vocab

Loss = SequenceLoss | Callable[..., torch.Tensor]
"""`loss(scores, *constants) -> (P,)`. A bare function is one of pairs."""


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
        loss: a loss of `mpo_kernels.losses`, or any function `loss(scores, *constants) -> (P,)` of
            pairs. A group's loss may depend on that group alone.
        constants: what the loss takes beside the scores, (P,) or (k, P) each; they get no gradient.
        weights: (P,) float, multiplies each group's loss; 0 makes a filler.
        row_weights: like labels, float; multiplies the log-probability of each token before the
            sums. The numbers of tokens stay those of scored ones.
        cu_seqlens: int32 (kP + 1,) for the packed layout, on the CPU or the device of `logits`.
        reduction: "mean" (the sum over P, whatever the weights), "sum" or "none".
        token_outputs, inplace_backward, parallel, validate: see `mpo_kernels.mpo_loss`. Validation
            also refuses a loss whose groups depend on each other, or that is not finite where the
            scores are.
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
    groups = _Groups(loss, constants, weights, sequences, like=logits)
    offsets = offsets_of(cu_seqlens, sequences, labels.numel(), labels)
    reads = reads_data(validate, logits, labels, cu_seqlens, weights, row_weights, *constants)
    if reads:
        vocab = whole_vocab(logits.shape[-1], parallel)
        check_sequences(labels, offsets, ignore_index, vocab, parallel, pairs=False)
        groups.check_values(row_weights)
    found = from_logits(
        logits,
        labels,
        options,
        ignore_index=ignore_index,
        wanted=Wanted(token_outputs),
        inplace_backward=inplace_backward,
        validate=False,
    )
    flat = with_one_ignored(labels.reshape(-1).long(), ignore_index)
    logps = _weighted(found.logp, row_weights, labels)
    scores = groups.scores(*sequence_sums_op(logps, flat, offsets, parallel))
    values = groups.losses(scores, reads)
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    # of their own, for the caller to edit: autograd has kept the others
    detached = Scores(scores.logps.detach().clone(), scores.tokens.clone())
    return SequenceLossOutput(reduced(values, reduction), detached, tokens)


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
    time. Its work is that of `mpo_kernels.linear_token_logprobs`.

    Args:
        hidden: dense (kP, T, D) or packed (N, D). weight: (V, D), bias: (V,).
        labels, rows, chunk_bytes, logits_dtype: see `mpo_kernels.linear_mpo_loss`.
        others: see `sequence_loss`.
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
    groups = _Groups(loss, constants, weights, sequences, like=hidden)
    flat = call.targets.labels
    offsets = offsets_of(cu_seqlens, sequences, flat.numel(), flat)
    reads = reads_data(None, hidden, flat, cu_seqlens, weights, row_weights, *constants)
    if reads:
        vocab = whole_vocab(weight.shape[0], parallel)
        check_sequences(flat, offsets, ignore_index, vocab, parallel, pairs=False)
        groups.check_values(row_weights)
    with refused_together(None if torch.compiler.is_compiling() else parallel):
        found = linear_tokens(call, options, Wanted(token_outputs))
    logps = _weighted(found.logp, row_weights, labels)
    flat, offsets = (
        on_device(host, hidden.device)
        for host in (with_one_ignored(flat.long(), ignore_index), offsets)
    )
    scores = groups.scores(*sequence_sums_op(logps, flat, offsets, parallel))
    values = groups.losses(scores, reads)
    tokens = token_statistics_of(found, labels.shape, detached=True) if token_outputs else None
    # of their own, for the caller to edit: autograd has kept the others
    detached = Scores(scores.logps.detach().clone(), scores.tokens.clone())
    return SequenceLossOutput(reduced(values, reduction), detached, tokens)


class _Groups:
    """The loss of P groups, with its constants: what was found right of a call."""

    def __init__(
        self,
        loss: Loss,
        constants: tuple[torch.Tensor, ...],
        weights: torch.Tensor | None,
        sequences: int,
        like: torch.Tensor,
    ) -> None:
        if not callable(loss):
            raise ValueError(
                f"loss is {loss!r}; needed is one of mpo_kernels.losses, or a function"
                " loss(scores, *constants) -> (P,)."
            )
        self._loss, self._size = loss, loss.sequences if isinstance(loss, SequenceLoss) else 2
        self._name = type(loss).__name__ if isinstance(loss, SequenceLoss) else "the loss"
        if sequences % self._size:
            raise ValueError(
                f"{sequences} sequences cannot be groups of {self._size}, which {self._name} takes;"
                f" needed are {self._size}P sequences, the first ones of all groups first."
            )
        self._count = sequences // self._size
        self._names = self._names_of(constants)
        self._constants = self._constants_of(constants, like)
        if weights is not None:
            checks.check_per("weights", weights, self._count, "group", like.device)
            weights = weights.detach().to(statistics_dtype(like))
        self._weights = weights

    def _names_of(self, constants: tuple[torch.Tensor, ...]) -> tuple[str, ...]:
        names: tuple[str, ...] = tuple(f"constant {i + 1}" for i in range(len(constants)))
        if isinstance(self._loss, SequenceLoss):
            names = self._loss.constants
        if len(names) != len(constants):
            wanted = ", ".join(names) or "no constants"
            raise ValueError(
                f"{self._name} takes {wanted} behind the loss, and {len(constants)} were given."
            )
        return names

    def _constants_of(
        self, constants: tuple[torch.Tensor, ...], like: torch.Tensor
    ) -> list[torch.Tensor]:
        checks.check_tensors(**dict(zip(self._names, constants, strict=True)))
        for name, constant in zip(self._names, constants, strict=True):
            shapes = ((self._count,), (self._size, self._count))
            if constant.shape not in shapes or constant.is_complex():
                raise ValueError(
                    f"{name} is {constant.dtype} {tuple(constant.shape)}; needed are numbers of"
                    f" shape {shapes[0]} or {shapes[1]}, one per group or sequence."
                )
            if constant.device != like.device:
                raise ValueError(f"{name} is on {constant.device}; move it to {like.device}.")
        dtype = statistics_dtype(like)
        return [constant.detach().to(dtype) for constant in constants]

    def check_values(self, row_weights: torch.Tensor | None) -> None:
        """Refuses constants and weights that are not finite."""
        named = dict(zip(self._names, self._constants, strict=True))
        for name, values in (*named.items(), ("weights", self._weights)):
            if values is not None:
                checks.check_finite(name, values)
        if row_weights is not None:
            checks.check_finite("row_weights", row_weights)

    def scores(self, sums: torch.Tensor, counts: torch.Tensor) -> Scores:
        """(kP,) each -> (k, P)."""
        return Scores(sums.view(self._size, -1), counts.view(self._size, -1))

    def losses(self, scores: Scores, reads: bool) -> torch.Tensor:
        """(P,), weighted. `reads`: whether data may be read for checks."""
        values = self._loss(scores, *self._constants)
        if not isinstance(values, torch.Tensor) or values.shape != (self._count,):
            shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values)
            raise ValueError(
                f"{self._name} returned {shape}; needed is one loss per group, ({self._count},)."
                " Leave the mean to reduction."
            )
        if not values.is_floating_point() or (
            scores.logps.requires_grad and not values.requires_grad
        ):
            raise ValueError(
                f"{self._name} returned {values.dtype} without a gradient; needed are floats that"
                " were computed from scores.logps."
            )
        if reads:
            self._probe(values.detach(), scores)
        return values if self._weights is None else values * self._weights

    def _probe(self, values: torch.Tensor, scores: Scores) -> None:
        """Refuses losses that are not finite, or in which groups depend on each other: the first
        and the last one alone have to have the loss that they have among the others."""
        finite = torch.stack([part.isfinite().all() for part in scores]).all()
        if bool(finite) and not bool(values.isfinite().all()):
            place = int(torch.nonzero(~values.isfinite())[0])
            raise ValueError(
                f"{self._name} is {float(values[place])} for group {place}, whose scores and"
                " constants are finite."
            )
        for place in {0, self._count - 1} if self._count > 1 else ():
            with torch.no_grad():
                alone = self._loss(
                    Scores(*(part[:, place : place + 1].detach() for part in scores)),
                    *(constant[..., place : place + 1] for constant in self._constants),
                )
            if not torch.allclose(alone, values[place], rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"{self._name} makes groups depend on each other: group {place} alone has"
                    f" {float(alone):.6g}, and {float(values[place]):.6g} among the others. Is"
                    " there a mean, a sort or a maximum over the groups in it? Compute it"
                    " beforehand and give it as a constant, or compute the whole loss from"
                    " mpo_kernels.linear_token_logprobs."
                )


def _weighted(
    logp: torch.Tensor, row_weights: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """(N,) log-probabilities times their weights."""
    if row_weights is None:
        return logp
    if row_weights.shape != labels.shape or not row_weights.is_floating_point():
        raise ValueError(
            f"row_weights is {row_weights.dtype} {tuple(row_weights.shape)}; needed are floats of"
            f" the shape of labels, {tuple(labels.shape)}."
        )
    return logp * on_device(row_weights.detach().reshape(-1), logp.device).to(logp.dtype)
