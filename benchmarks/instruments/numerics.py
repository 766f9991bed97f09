"""The cases of the numerics matrix, and what one of them is compared with; and what float32 logits
change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle

AXES: dict[str, tuple] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "vocab": (1, 127, 32000, 50257, 128256, 151936, 256000, 262144),
    "hidden": (64, 896, 2048, 33),
    "pairs": (1, 2, 7),
    "mask": ("none", "prompt", "all but one"),
    "option": (
        "softcap",
        "bias",
        "scale",
        "frozen weight",
        "frozen hidden",
        "tied",
        "strided",
        "packed",
        "left-padded",
        "right-padded",
    ),
    "regime": ("flat", "certain", "unlikely", "huge", "minus infinity", "equal", "error near 0"),
}
EXTREMES: dict[str, dict] = {
    "wide softcap": {"softcap": 1e4},
    "tight softcap": {"softcap": 0.5},
    "large scale": {"logit_scale": 250.0},
    "small scale": {"logit_scale": 1e-3},
}
"""More values of `option`, beside those that models have."""
TOKENS = 4
FP32_BAR = 1e-5
HALF_BAR = 1.25  # times the error of plain autograd in the same dtype


@dataclass
class Problem:
    """Inputs in the case's dtype, and the options of the loss."""

    hidden: torch.Tensor  # (2P, T, D), leaf
    weight: torch.Tensor  # (V, D), leaf
    bias: torch.Tensor | None
    labels: torch.Tensor  # (2P, T)
    gap: torch.Tensor  # (P,)
    options: dict


def problem(case: Mapping) -> Problem:
    """A problem of the case's regime, as far as its options allow the regime."""
    generator = torch.Generator().manual_seed(_seed(case))
    dtype, option = case["dtype"], case["option"]
    V, D, S = case["vocab"], case["hidden"], 2 * case["pairs"]
    labels = torch.randint(0, V, (S, TOKENS), generator=generator)
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5)
    hidden = torch.randn(S, TOKENS, D, generator=generator)
    has_bias = option == "bias" or case["regime"] == "minus infinity"
    bias = torch.randn(V, generator=generator) if has_bias else None
    # moves the label's logit by 1 each
    toward = weight[labels] / weight[labels].square().sum(-1, keepdim=True)
    match case["regime"]:
        case "flat":
            hidden.mul_(1e-2)
        case "certain":
            hidden.mul_(0.3).add_(toward * 18)
        case "unlikely":
            hidden.mul_(0.3).sub_(toward * 55)
        case "huge":
            hidden.mul_(2500)
        case "minus infinity" if bias is not None and V > 2:
            bias[torch.arange(V) % 3 == 2] = float("-inf")
            labels[labels % 3 == 2] -= 1
        case "equal":
            weight.zero_()
    if case["mask"] == "prompt":
        labels[:, : TOKENS // 2] = -100
    elif case["mask"] == "all but one":
        labels[:, :-1] = -100
    if option == "left-padded":
        labels[::2, 0] = -100
        hidden[::2, 0] = 3e4
    elif option == "right-padded" and case["mask"] != "all but one":
        labels[::2, -1] = -100
        hidden[::2, -1] = 3e4
    options = {
        "beta": 1.3,
        **{"softcap": {"softcap": 30.0}, "scale": {"logit_scale": 0.5}, **EXTREMES}.get(option, {}),
    }
    rounded: list[Any] = [None if t is None else t.to(dtype) for t in (hidden, weight, bias)]
    gap = torch.randn(case["pairs"], generator=generator)
    if case["regime"] == "error near 0":
        with torch.no_grad():
            wide = [None if t is None else t.float() for t in rounded]
            gap = _plain(wide[0], wide[1], wide[2], labels, gap, options).reward_gap * 1.3 + 1e-3
    return Problem(rounded[0], rounded[1], rounded[2], labels, gap, options)


def _seed(case: Mapping) -> int:
    """The same in every process, unlike hash()."""
    axes = {**AXES, "option": (*AXES["option"], *EXTREMES)}
    return (
        sum((i + 1) * 7919 * axis.index(case[name]) for i, (name, axis) in enumerate(axes.items()))
        % 100_003
    )


def _plain(hidden, weight, bias, labels, gap, options):
    """What one would write: the head in its dtype, an fp32 log-softmax, autograd for the rest."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return mpo_kernels.MPOLossOutput(*oracle.mpo_loss(logits, labels, gap, **options))


def _ours(hidden, weight, bias, labels, gap, options):
    return mpo_kernels.linear_mpo_loss(hidden, weight, labels, gap, bias=bias, **options)


def _oracle(hidden, weight, bias, labels, gap, options):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return mpo_kernels.MPOLossOutput(*oracle.mpo_loss(logits, labels, gap.double(), **options))


def results(function, given: Problem, option: str, wide: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gaps and gradients of one way to compute."""

    def leaf(tensor: torch.Tensor | None, trained: bool) -> Any:
        return (
            None
            if tensor is None
            else tensor.detach().to(torch.float64 if wide else tensor.dtype).requires_grad_(trained)
        )

    hidden = leaf(given.hidden, option != "frozen hidden")
    weight = leaf(given.weight, option != "frozen weight")
    bias = leaf(given.bias, False)
    labels, options, shown = given.labels, dict(given.options), hidden
    # the embedding of some tokens is added, so the weight gets gradients from both ends
    if option == "tied":
        shown = hidden + weight[given.labels.clamp_min(0)]
    elif option == "strided":
        shown = torch.cat([hidden, hidden.detach()], 1)[:, :TOKENS]
    elif option == "packed" and function is _ours:
        sequences = labels.shape[0]
        shown, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        options["cu_seqlens"] = torch.arange(0, sequences * TOKENS + 1, TOKENS, dtype=torch.int32)
    elif option in ("left-padded", "right-padded") and function is _plain:
        # where it would overflow float16 and become NaN
        shown = hidden.masked_fill((labels == -100)[..., None], 0)
    out = function(shown, weight, bias, labels, given.gap, options)
    (out.loss * 1.7).backward()
    found = {"loss": out.loss, "reward_gap": out.reward_gap, "dH": hidden.grad, "dW": weight.grad}
    found |= {"chosen": out.chosen_logps, "rejected": out.rejected_logps}
    return {name: value.detach() for name, value in found.items() if value is not None}


def check(case: Mapping) -> dict[str, tuple[float, float]]:
    """The error of each result and that of plain autograd, and an AssertionError where one misses
    its bar."""
    given, option = problem(case), case["option"]
    ours, plain = results(_ours, given, option), results(_plain, given, option)
    exact = results(_oracle, given, option, wide=True)
    beta = given.options["beta"]
    wrong_by = (beta * exact["reward_gap"] - given.gap).abs().clamp_min(1e-12)
    # Where the gap is nearly right, the last digits of the two means are all that is left of the
    # error, and of what is proportional to it.
    means = exact["chosen"].abs() + exact["rejected"].abs()
    lost = {"reward_gap": float((means / exact["reward_gap"].abs().clamp_min(1e-12)).max()) * 2e-7}
    lost |= dict.fromkeys(
        ("loss", "dH", "dW"), float(((beta * means + given.gap.abs()) / wrong_by).max()) * 2e-7
    )
    rounding = torch.finfo(case["dtype"]).eps / 2
    errors = {}
    for name in exact.keys() - {"chosen", "rejected"}:
        want = exact[name]
        if float(want.abs().max()) > torch.finfo(ours[name].dtype).max:
            continue  # float16 cannot hold it
        assert torch.isfinite(ours[name]).all(), name
        error, theirs = relative_error(ours[name], want), relative_error(plain[name], want)
        # float16 under a large scale: no yardstick but rounding, times the scale
        overflowed = not torch.isfinite(plain[name]).all()
        bar = max(FP32_BAR, lost.get(name, 0.0), 10 * rounding if overflowed else HALF_BAR * theirs)
        # so few rows that their luck in rounding decides
        if int((given.labels != -100).sum()) < 16:
            if case["dtype"] != torch.float32:
                bar = max(bar, 2 * rounding)
            elif name == "dH":  # BLAS adds the V terms of such a thin product one after another
                bar = max(bar, rounding * case["vocab"] ** 0.5)
        # one or two logits carry a row's whole gradient: its luck in two roundings, of the logits'
        # and of its own
        elif case["regime"] == "huge":
            bar = max(bar, 2 * rounding)
        assert error <= bar, f"{name}: {error:.2e}, plain autograd {theirs:.2e}, bar {bar:.2e}"
        errors[name] = error, theirs
    return errors


def ratios(errors: Mapping[str, tuple[float, float]]) -> list[float]:
    """Error over plain autograd's error, where both are above fp32 rounding."""
    return [ours / theirs for ours, theirs in errors.values() if min(ours, theirs) > FP32_BAR]


@dataclass
class LogprobErrors:
    """Of log-probabilities from half-precision hidden states, against float64."""

    logprob: float
    """Mean absolute error, nats."""
    gradient: float
    """The larger relative error of dH and dW."""


def logprob_errors(
    dtype: torch.dtype, logits_dtype: torch.dtype | None, *, rows: int, hidden: int, vocab: int
) -> LogprobErrors:
    """Random logits of standard deviation 3; the upstream gradients are random too."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).mul_(3 * hidden**-0.5).to(dtype)
    weight.requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    wide = [t.detach().double().requires_grad_() for t in (states, weight)]
    got = mpo_kernels.linear_token_logprobs(states, weight, labels, logits_dtype=logits_dtype)
    want = oracle.linear_token_logprobs(wide[0], wide[1], labels)
    got.backward(upstream)
    want.backward(upstream.double())
    return LogprobErrors(
        float((got.detach() - want.detach()).abs().mean()),
        max(
            relative_error(one.grad, of.grad)
            for one, of in zip((states, weight), wide, strict=True)
        ),
    )
