"""Heads whose work is divided over ranks: each holds a slice of the vocabulary, of the positions,
or of both.

Vocabulary-parallel: a rank's logits (or head weight) cover consecutive tokens of the vocabulary;
hidden states and labels are the same on all ranks of the group. Each rank emits for each row its
share of the statistics, (peak, total, weighted sum, label logit), one all-gather of [ranks, rows,
4] fp32 brings them together, and every rank combines them in rank order, so all get the same bits.
(Not a log-sum-exp and a label logit, as is usual: a log-sum-exp rounded at logits of 1e4 has lost
three digits, and p_y -> 1 would cancel.)

Sequence-parallel beside that: hidden states, too, are divided over the ranks of the vocabulary, and
labels are not. Forward gathers the rows, backward scatters the sums of their gradients.

Context-parallel: a rank holds some positions of every sequence. Its 2P sums and counts are gathered
and added in rank order before equation (1).

Any group of torch.distributed serves (gloo, nccl). All ranks of a group must make the same calls in
the same order.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mpo_kernels.labels import IGNORED, UNKNOWN

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Parallel:
    """How a call's work is divided: pass it as `parallel` to the functions of `mpo_kernels`. Make
    it once, on all ranks of its groups.

    Args:
        vocab_group: the ranks that hold slices of the vocabulary, in rank order; None where each
            holds all of it.
        vocab_slice: the tokens that this rank holds, the last dimension of its logits or the first
            of its weight. Slices may be uneven; their places are found by one all-gather here.
        context_group: the ranks that hold parts of the sequences; None where each holds them whole.
        sequence_parallel: to the linear functions hidden is (N / ranks, D), the rank's own of N
            consecutive rows, in rank order of vocab_group; labels, rows and cu_seqlens are still of
            all N. They are gathered, and their gradient is this rank's rows of the sum, by one
            reduce-scatter in the dtype of hidden. All ranks hold the same number: pad N with rows
            whose label is ignored. Logits are whole rows either way.
    Raises:
        ValueError: a group without its slice, a slice without its group, or sequence_parallel
            without either.

    Example:
        >>> import mpo_kernels, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> parallel = Parallel(vocab_group=dist.group.WORLD, vocab_slice=8)
        >>> parallel
        Parallel(tokens 0 to 8 of 8, whole context)
        >>> mpo_kernels.token_logprobs(torch.zeros(1, 8), torch.tensor([3]), parallel=parallel)
        tensor([-2.0794])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        vocab_group: ProcessGroup | None = None,
        vocab_slice: int | None = None,
        context_group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        if (vocab_group is None) != (vocab_slice is None):
            raise ValueError(
                "vocab_group and vocab_slice (the number of tokens that this rank holds) go"
                " together; give both or neither."
            )
        if vocab_group is None and context_group is None:
            raise ValueError("Parallel needs a vocab_group, a context_group or both.")
        if sequence_parallel and vocab_group is None:
            raise ValueError(
                "sequence_parallel divides hidden states over the ranks of vocab_group; give one,"
                " or context_group alone where sequences are divided and the vocabulary is not."
            )
        self.vocab_group, self.context_group = vocab_group, context_group
        self.sequence_parallel = sequence_parallel
        self.vocab_start = self.vocab = self.vocab_slice = self._largest_slice = 0
        if vocab_group is not None and vocab_slice is not None:
            rank = torch.distributed.get_rank(vocab_group)
            size = torch.tensor([vocab_slice], dtype=torch.int64, device=_device_of(vocab_group))
            sizes = _gathered(size, vocab_group).flatten().tolist()
            if min(sizes) < 1:  # refused by all ranks, or the others would wait for this one
                raise ValueError(
                    f"vocab_slice is {sizes} on the ranks of vocab_group; each of them needs at"
                    " least one token."
                )
            self.vocab_start, self.vocab, self.vocab_slice = (
                sum(sizes[:rank]),
                sum(sizes),
                vocab_slice,
            )
            self._largest_slice = max(sizes)
        self.handle = next(_HANDLES)
        _KNOWN[self.handle] = self

    def local_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels counted from this rank's slice: UNKNOWN where another slice has them."""
        if self.vocab_group is None:
            return labels
        local = labels - self.vocab_start
        local = torch.where((local >= 0) & (local < self.vocab_slice), local, UNKNOWN)
        return local.masked_fill(labels == IGNORED, IGNORED)

    def gather_partials(self, partials: torch.Tensor) -> torch.Tensor:
        """(N, 4) of each rank, or (N, 6) -> (ranks, N, 4) or (ranks, N, 6)."""
        assert self.vocab_group is not None
        return _gathered(partials, self.vocab_group)

    def add_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """(2P, 2) of each rank of the context -> their sum, the same bits on every rank."""
        return sums if self.context_group is None else _gathered(sums, self.context_group).sum(0)

    def longest(self, lengths: torch.Tensor) -> torch.Tensor:
        """Host (2P,) rows of each sequence here -> the most that any rank of the context has, so
        that all plan the same chunks."""
        if self.context_group is None:
            return lengths
        device = _device_of(self.context_group)
        return _gathered(lengths.to(device), self.context_group).amax(0).cpu()

    def total(self, lengths: torch.Tensor) -> torch.Tensor:
        """Host (2P,) rows of each sequence here -> in all ranks of the context together."""
        if self.context_group is None:
            return lengths
        device = _device_of(self.context_group)
        return _gathered(lengths.to(device), self.context_group).sum(0).cpu()

    def refused_elsewhere(self, refused: bool) -> list[int]:
        """The other ranks of the context that refused their part of the data. All of them have to
        ask."""
        if self.context_group is None:
            return []
        here = torch.distributed.get_rank(self.context_group)
        flags = _gathered(
            torch.tensor([refused], dtype=torch.uint8, device=_device_of(self.context_group)),
            self.context_group,
        )
        return [rank for rank, (flag,) in enumerate(flags.tolist()) if flag and rank != here]

    def add_hidden_grads(self, grad: torch.Tensor) -> None:
        """Adds up, in place, the shares of dL/dhidden that the slices of the vocabulary contribute;
        leaves them to `scatter_hidden_grads` where the rows are divided too."""
        if self.vocab_group is not None and not self.sequence_parallel:
            torch.distributed.all_reduce(grad, group=self.vocab_group)

    @property
    def vocab_ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return torch.distributed.get_world_size(self.vocab_group) if self.vocab_group else 1

    def gather_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) of each rank of the vocabulary -> (ranks * n, D)."""
        whole = hidden.new_empty(self.vocab_ranks * hidden.shape[0], *hidden.shape[1:])
        _collective("all_gather_single", "all_gather_into_tensor")(
            whole, hidden, group=self.vocab_group
        )
        return whole

    def scatter_hidden_grads(self, grad: torch.Tensor) -> torch.Tensor:
        """Shares (ranks * n, D) of each rank of the vocabulary -> (n, D), their sum on this rank's
        rows."""
        own = grad.new_empty(grad.shape[0] // self.vocab_ranks, *grad.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(
            own, grad, group=self.vocab_group
        )
        return own

    def rows_of_ranks(self, count: int) -> list[int]:
        """`count` of each rank of the vocabulary. All of them have to ask."""
        assert self.vocab_group is not None
        here = torch.tensor([count], dtype=torch.int64, device=_device_of(self.vocab_group))
        return _gathered(here, self.vocab_group).flatten().tolist()

    def __repr__(self) -> str:
        vocab = (
            f"tokens {self.vocab_start} to {self.vocab_start + self.vocab_slice} of {self.vocab}"
            if self.vocab_group
            else "whole vocabulary"
        )
        rows = ", divided rows" if self.sequence_parallel else ""
        context = "part of the" if self.context_group else "whole"
        return f"Parallel({vocab}{rows}, {context} context)"


def whole_vocab(columns: int, parallel: Parallel | None) -> int:
    """Tokens of the whole vocabulary, of which `columns` are here."""
    return columns if parallel is None or parallel.vocab_group is None else parallel.vocab


def widest_slice(columns: int, parallel: Parallel | None) -> int:
    """Columns that the chunks of rows are planned for, of which `columns` are here: the most that a
    rank has, so that all ranks plan the same."""
    return columns if parallel is None or parallel.vocab_group is None else parallel._largest_slice


@contextmanager
def refused_together(parallel: Parallel | None) -> Iterator[None]:
    """Round checks of data of which each rank of a context has its own part: a rank that raised
    alone would leave the others waiting."""
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    others = [] if parallel is None else parallel.refused_elsewhere(refusal is not None)
    if refusal is not None:
        raise refusal
    if others:
        raise ValueError(
            f"The labels, cu_seqlens or row_weights of rank(s) {others} of context_group were"
            " refused; their own errors say why."
        )


_HANDLES = itertools.count(1)
_KNOWN: weakref.WeakValueDictionary[int, Parallel] = weakref.WeakValueDictionary()


def handle_of(parallel: Parallel | None) -> int:
    """A number for registered operators, whose arguments cannot be process groups; 0 is None. It
    keeps nothing alive."""
    return 0 if parallel is None else parallel.handle


def from_handle(handle: int) -> Parallel | None:
    """The inverse of `handle_of`.

    Raises:
        RuntimeError: the object is gone.
    """
    if handle == 0:
        return None
    parallel = _KNOWN.get(int(handle))
    if parallel is None:
        raise RuntimeError(
            "The Parallel of this call is gone. Make it once and keep it for as long as calls and"
            " their backward run."
        )
    return parallel


def _device_of(group: ProcessGroup) -> torch.device:
    on_host = {"gloo", "mpi"} & set(
        str(torch.distributed.get_backend(group)).replace(":", ",").split(",")
    )
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())


def _gathered(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """(ranks, *tensor.shape) in rank order."""
    out = tensor.new_empty(torch.distributed.get_world_size(group), *tensor.shape)
    torch.distributed.all_gather(list(out.unbind(0)), tensor.contiguous(), group=group)
    return out


def _collective(name: str, older: str) -> Callable[..., Any]:
    """A function of torch.distributed, by its name before torch 2.13 where it has no other."""
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, older)
