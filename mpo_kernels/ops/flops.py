"""What torch.utils.flop_counter counts for the linear operators, into which it cannot look: 2 x
rows x D x V for each of their products.

Rows are the scored ones; of tensors without data, all.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mpo_kernels.ops.chunks import rows_per_chunk
from mpo_kernels.parallel import from_handle


def tell_counters() -> None:
    """Tells torch's counter the formulas: for counters to come, and those that count this call and
    took their copy before.

    Not on import, which would import triton with the counter, and warn where there is none.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:  # nobody counts
        return
    operators = torch.ops.mpo_kernels
    formulas = {
        operators.linear_pair_loss: _pair_loss,
        operators.linear_token_logprobs: _token_logprobs,
        operators.linear_token_logprobs_grad: _token_logprobs_grad,
    }
    module.flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            mode.counter.flop_registry.update(formulas)


def _pair_loss(
    hidden, weight, bias, labels, cu_seqlens, reference_gap, pair_weights, beta, beta_number, hidden_grad, weight_grad, bias_grad,
    may_keep_chunk, ignore_index, logit_scale, softcap, numbers, chunk_bytes, gemm_dtype, token_outputs, parallel, out_val,
):  # fmt: skip
    *_, kept_logits, _ = out_val
    if not _has_data(labels):
        return _products(labels.numel(), weight, 1 + hidden_grad + weight_grad)
    counted = torch.cat([labels.new_zeros(1), (labels != ignore_index).cumsum(0)]).cpu()
    chosen, rejected = counted[cu_seqlens.cpu().long()].diff().chunk(2)
    waits = kept_logits.shape[0] > 0  # the weight's product is made in backward, where it is seen
    ranks, columns = from_handle(parallel), weight.shape[0]
    budget = rows_per_chunk(
        columns if ranks is None else ranks.chunk_vocab(columns),
        (gemm_dtype or hidden.dtype).itemsize,
        chunk_bytes,
    )
    large = (chosen + rejected)[chosen + rejected > budget]
    computed_again = int(large[1:].sum()) if weight_grad else 0
    rows = int(counted[-1])
    return _products(rows, weight, 1 + hidden_grad + (weight_grad and not waits)) + _products(
        computed_again, weight, 1
    )


def _token_logprobs(
    hidden, weight, bias, labels, keep_stats, keep_hidden_grad, ignore_index, *_, out_val
):
    return _products(_scored(labels, ignore_index), weight, 1 + keep_hidden_grad)


def _token_logprobs_grad(
    grad_logp,
    logp,
    normalizer,
    hidden,
    weight,
    bias,
    labels,
    hidden_grad,
    weight_grad,
    bias_grad,
    ignore_index,
    *_,
    out_val,
):
    return _products(_scored(labels, ignore_index), weight, 1 + hidden_grad + weight_grad)


def _products(rows: int, weight: torch.Tensor, count: int) -> int:
    return 2 * rows * weight.numel() * count


def _scored(labels: torch.Tensor, ignore_index: int) -> int:
    return int((labels != ignore_index).sum()) if _has_data(labels) else labels.numel()


def _has_data(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type != "meta"
