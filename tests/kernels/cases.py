"""Inputs of the kernel tests."""

from __future__ import annotations

import contextlib
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mpo_kernels
from mpo_kernels import oracle
from mpo_kernels.losses import Scores

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

REGIMES = ("normal", "flat", "peaked", "unlikely", "huge", "equal", "columns_of_minus_inf")


def regime(name: str, shape: tuple[int, ...], labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """float32 logits (..., V) of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator)
    at_label = labels.clamp_min(0)[..., None]
    if name == "flat":
        return z * 1e-3
    if name == "peaked":  # the label takes nearly all of the probability
        # 1 - p of about 1e-6: fp32 would lose it, float64 does not
        return z.scatter(-1, at_label, 20.0)
    if name == "unlikely":  # probability about e^-60
        return z.scatter(-1, at_label, -60.0)
    if name == "huge":
        return torch.where(z > 0, 1e4, -1e4) + z
    if name == "equal":
        return torch.full(shape, 3.25)
    if name == "columns_of_minus_inf" and shape[-1] > 2:
        return z.masked_fill(torch.arange(shape[-1]) % 3 == 2, float("-inf")).scatter(
            -1, at_label, 0.5
        )
    return z * 3


def infinities(vocab: int) -> dict[str, tuple[torch.Tensor, int]]:
    """By name: logits (V,) with infinities or NaN somewhere, and a label. Names tell what stands
    where; `others` are all but the label."""
    plain = torch.linspace(-2, 3, vocab).roll(vocab // 3)
    columns, label = torch.arange(vocab), vocab // 2
    places = {
        "at the label": columns == label,
        "at the first": columns == 0,
        "at the last": columns == vocab - 1,
        "in the first third": columns < vocab // 3,
        "in the last third": columns >= vocab - vocab // 3,
        "in every third": columns % 3 == (label + 1) % 3,
        "in every third, the label's too": columns % 3 == label % 3,
        "in all others": columns != label,
        "in all but one other": (columns != label) & (columns != 1),
        "in all but one, the label too": columns != 1,
        "everywhere": columns >= 0,
    }
    found = {
        f"{value} {place}": (plain.masked_fill(where, value), label)
        for place, where in places.items()
        for value in (float("inf"), float("-inf"), float("nan"))
    }
    both = plain.masked_fill(columns % 3 == 0, float("-inf"))
    found["inf at the label, -inf elsewhere"] = (
        both.masked_fill(columns == label, float("inf")),
        label,
    )
    found["inf at the first, -inf elsewhere"] = both.masked_fill(columns == 0, float("inf")), label
    found["inf at the first, -inf at the label"] = (
        plain.masked_fill(columns == 0, float("inf")).masked_fill(columns == label, -float("inf")),
        label,
    )
    return found


SOFTCAPS = (1e-6, 0.05, 1.0, 5.0, 30.0, 32.0, 33.0, 50.0, 1e3, 1e4, 1e6, 1e30)


def check_softcap(
    softcap: float, logit_scale: float, size: float, run: contextlib.AbstractContextManager
) -> None:
    """Log-probabilities and gradients of final logits of about `size` before the cap, inside `run`,
    are the oracle's to a few roundings of the final logits. Up to 32 the cap's own rounding may
    show instead of theirs."""
    labels = labels_of((1, 6), 60, mask="none")
    u = (torch.linspace(-1.5, 1.5, 360).view(1, 6, 60).roll(7, -1) * (size / logit_scale)).float()
    ours, theirs = u.clone().requires_grad_(), u.double().requires_grad_()
    options = {"softcap": softcap, "logit_scale": logit_scale}
    with run:
        got = mpo_kernels.token_logprobs(ours, labels, **options)
        got.sum().backward()
    want = oracle.token_logprobs(theirs, labels, **options)
    want.sum().backward()
    got, want = got.detach(), want.detach()
    z = oracle.final_logits(theirs.detach(), **options)
    rounding = 2.0**-23 * (1 + 3 * max(float(z.abs().max()), min(softcap, 32.0)))
    at = f"softcap {softcap:g}, logit_scale {logit_scale:g}, size {size:g}"
    assert float((got.double() - want).abs().max()) <= rounding + 2.0**-22 * float(
        want.abs().max()
    ), at
    # Far out the slope has the error of exp(2x), and the oracle's 1 - tanh^2 only rounding.
    assert torch.isfinite(ours.grad).all(), at
    if rounding < 0.1:
        torch.testing.assert_close(
            ours.grad.double(),
            theirs.grad,
            rtol=2e-5 + 2 * rounding,
            atol=1e-14 * logit_scale,
            msg=lambda text: f"{at}: {text}",
        )


def labels_of(
    shape: tuple[int, ...], vocab: int, seed: int = 0, mask: str = "some"
) -> torch.Tensor:
    """int64 labels; mask: none, some positions ignored, or all but one of each sequence."""
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, vocab, shape, generator=generator)
    if mask == "some":
        ignored = torch.rand(shape, generator=generator) < 0.4
        ignored[..., -1] = False
        labels[ignored] = -100
    elif mask == "all_but_one":
        labels[..., :-1] = -100
    return labels


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` as the best computation in fp32 would store it. Triton's interpreter cuts bf16 off
    where compiled code rounds."""
    single = exact.float()
    if INTERPRETED and dtype == torch.bfloat16:
        return (single.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return single.to(dtype)


LAYOUTS = ("gaps", "transposed", "offset", "expanded")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers as a view of other memory, which holds as plausible numbers elsewhere.
    `expanded` has other numbers: the last slice of the first dimension, over and over."""
    if layout == "transposed":
        backwards = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "expanded":
        long = next((d for d, n in enumerate(tensor.shape) if n > 1), None)
        return tensor if long is None else tensor.narrow(long, -1, 1).clone().expand_as(tensor)
    step = 2 if layout == "gaps" else 1  # `offset`: contiguous, but off any alignment
    memory = (
        tensor.roll(1).flatten()[:1].repeat(1 + step * tensor.numel() or 1)
        if tensor.numel()
        else tensor.new_zeros(1)
    )
    strides = [step * n for n in torch.empty(tensor.shape, device="meta").stride()]
    return memory.as_strided(tensor.shape, strides, min(1, memory.numel() - 1)).copy_(tensor)


class OtherStrides(TorchDispatchMode):
    """Hands every tensor to every operator of the package as a view with gaps, as a compiler may;
    `seen` are the operators' names."""

    def __init__(self, layout: str = "gaps") -> None:
        super().__init__()
        self.layout, self.seen = layout, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mpo_kernels":
            self.seen.add(func.name())
            args = [laid_out(a, self.layout) if isinstance(a, torch.Tensor) else a for a in args]
        return func(*args, **(kwargs or {}))


def drawn(seed, loss, groups, spread=1.0):
    """Scores of P groups and the loss's constants, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low, high):
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    k = loss.sequences
    tokens = torch.randint(1, 40, (k, groups), generator=generator).double()
    sums = tokens * uniform(k, groups, low=-3.0, high=-1e-3) * spread
    constants = {
        "reference_logps": sums + uniform(k, groups, low=-6.0, high=6.0) * spread,
        "reference_gap": uniform(groups, low=-2.0, high=2.0),
        "mean_tokens": torch.full((groups,), 17.25, dtype=torch.float64),
        "is_desirable": (uniform(groups, low=0.0, high=1.0) > 0.5).double(),
        "kl": torch.full((groups,), 0.375, dtype=torch.float64),
    }
    return Scores(sums, tokens), [constants[name] for name in loss.constants]
