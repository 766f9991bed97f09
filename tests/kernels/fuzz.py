"""Random problems against the float64 oracle: every function and argument, any memory layout,
sizes, values and options at their edges.

    python tests/kernels/fuzz.py --seconds 600 --seed 0
    TRITON_INTERPRET=1 MPO_KERNELS_BACKEND=triton python tests/kernels/fuzz.py --problems 2000

Each problem follows from its number alone, so a failure is repeated with `--seed N --problems 1`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
import traceback
from unittest import mock

import torch
from cases import INTERPRETED, LAYOUTS, REGIMES, OtherStrides, laid_out, regime
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, pad
from torch.utils._pytree import tree_leaves

import mpo_kernels
from mpo_kernels import oracle

FROM_LOGITS = ("token_logprobs", "token_statistics", "mpo_loss")
FROM_HIDDEN = ("linear_token_logprobs", "linear_token_statistics", "linear_mpo_loss")
POOLS = ("mean_pool", "retention_loss")
TRAINABLE = ("logits", "hidden", "weight", "bias")

HALF = {torch.bfloat16: 2.0**-8 if INTERPRETED else 2.0**-9, torch.float16: 2.0**-11}
"""What rounding to half precision may cost; Triton's interpreter cuts bfloat16 off."""

DTYPES = [
    torch.float32,
    torch.float32,
    *HALF,
    *([torch.float64] if os.environ.get("MPO_KERNELS_BACKEND") != "triton" else []),
]
LARGEST = {
    "pairs": 3,
    "tokens": 8 if INTERPRETED else 20,
    "vocab": 300 if INTERPRETED else 3000,
    "hidden": 48,
}
FURTHEST = {
    "softcap": [1e-3, 2.0, 30.0, 1e4],
    "logit_scale": [0.0, 1e-6, 0.1, -1.0, 3.0, 260.0],
    "beta": [0.0, 1e-6, 0.3, -2.5, 1e3],
}


class Problem:
    """Tensors by the names of the arguments they are, and options; `run` compares one function with
    the oracle."""

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = self.rng.choice(FROM_LOGITS + FROM_HIDDEN + POOLS)
        self.dtype = self.rng.choice(DTYPES)
        self.is_loss, self.is_linear, self.is_pool = (
            self.kind.endswith("loss"),
            self.kind in FROM_HIDDEN,
            self.kind in POOLS,
        )
        self.pairs, self.vocab, self.hidden, tokens = (
            self.size(LARGEST[n]) for n in ("pairs", "vocab", "hidden", "tokens")
        )
        self.packed = self.maybe(0.5)
        self.lengths = (
            [self.size(LARGEST["tokens"]) for _ in range(2 * self.pairs)]
            if self.packed
            else [tokens] * (2 * self.pairs)
        )
        shape = (sum(self.lengths),) if self.packed else (2 * self.pairs, tokens)
        if self.kind in ("token_logprobs", "token_statistics") and not self.packed:
            shape = self.rng.choice([shape, (1, *shape), (shape[0], 1, shape[1]), (0, 3)])
        self.tensors: dict[str, torch.Tensor] = {}
        self.options: dict = {}  # of the oracle too
        self.only_ours: dict = {}
        self.autocast = self.is_linear and self.dtype == torch.bfloat16 and self.maybe(0.3)
        if self.is_pool:
            self.draw_pool(shape)
        else:
            self.draw_head(shape)
        self.upstream = self.rng.choice([1.0, -0.37, 100.0, 1e-6, 65536.0])
        self.stored = [name for name in FURTHEST if self.maybe(0.2)]
        self.trained = [name for name in TRAINABLE if name in self.tensors and self.maybe(0.8)]
        for name in list(self.tensors):
            self.tensors[name] = self.placed(name, self.tensors[name])

    def __repr__(self) -> str:
        shapes = {name: (tuple(t.shape), t.stride()) for name, t in self.tensors.items()}
        return (
            f"{self.kind} {self.dtype} {self.options} {self.only_ours} trained {self.trained}"
            f" {shapes}"
        )

    # Draws.

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def size(self, most: int) -> int:
        """1 to most: ones, multiples of 16 and what is one more often."""
        sixteen = 16 * self.rng.randint(1, max(1, most // 16))
        return min(
            most,
            self.rng.choice(
                [1, 2, sixteen, sixteen + 1, self.rng.randint(1, most), self.rng.randint(1, most)]
            ),
        )

    def draw_head(self, shape: tuple[int, ...]) -> None:
        ignored = [
            -100,
            -1,
            -2,
            0,
            self.vocab - 1,
            self.rng.randrange(self.vocab),
            self.vocab,
            2**31,
            2**40,
            -(2**63),
            2**63 - 1,
        ]
        ignore = self.options["ignore_index"] = self.rng.choice(ignored) if self.vocab > 1 else -100
        self.tensors["labels"] = self.some_labels(shape, ignore)
        for name in ("softcap", "logit_scale"):
            if self.maybe(0.3):
                self.options[name] = self.rng.choice(FURTHEST[name])
        if self.is_linear:
            scale = self.rng.choice([0.1, 1.0, 1.0, 6.0])
            self.tensors["hidden"] = self.normal(*shape, self.hidden).to(self.dtype)
            wide = torch.float32 if self.autocast else self.dtype
            self.tensors["weight"] = self.normal(
                self.vocab, self.hidden, scale=scale * self.hidden**-0.5
            ).to(wide)
            if self.maybe(0.5):
                self.tensors["bias"] = self.normal(self.vocab).to(wide)
                if self.maybe(0.2):  # tokens that are never to be
                    self.tensors["bias"][self.rng.randrange(self.vocab)] = float("-inf")
            rows = max(1, self.tensors["labels"].numel())
            # the last piece often has one row
            budget = self.rng.choice([1, 4, max(1, rows - 1), max(1, rows // 2), 10_000])
            self.only_ours["chunk_bytes"] = budget * self.vocab * self.dtype.itemsize
            if self.dtype != torch.float64 and self.maybe(0.3):
                self.only_ours["logits_dtype"] = torch.float32
        else:
            name = self.rng.choice(REGIMES)
            labels = self.tensors["labels"].long().clamp(0, self.vocab - 1)
            logits = regime(name, (*shape, self.vocab), labels, self.rng.randrange(99))
            self.tensors["logits"] = self.with_infinities(logits).to(self.dtype)
            self.only_ours |= {
                "validate": self.rng.choice([None, True, False]),
                "inplace_backward": self.maybe(0.2),
            }
        if self.kind.endswith("statistics"):
            self.only_ours |= {"moments": self.maybe(0.5), "entropy_grad": self.maybe(0.5)}
        if self.is_loss:
            float_of = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
            self.tensors["reference_gap"] = self.normal(self.pairs).to(self.rng.choice(float_of))
            if self.maybe(0.4):
                weights = torch.rand(self.pairs, generator=self.generator) * (
                    torch.rand(self.pairs, generator=self.generator) < 0.8
                )
                self.tensors["pair_weights"] = weights.to(self.rng.choice(float_of))
            self.options |= {
                "beta": self.rng.choice([1.0, *FURTHEST["beta"]]),
                "reduction": self.rng.choice(["mean", "sum", "none"]),
            }
            self.only_ours["token_outputs"] = self.maybe(0.4)
            self.draw_offsets()

    def some_labels(self, shape: tuple[int, ...], ignore: int) -> torch.Tensor:
        """At least one scored position per sequence of a loss."""
        labels = torch.randint(0, self.vocab, shape, generator=self.generator)
        labels[labels == ignore] = 0 if ignore else 1
        ignored = torch.rand(shape, generator=self.generator) < self.rng.choice([0, 0, 0.3, 0.9])
        if self.is_loss:
            self.keep_one_each(ignored, False)
        labels[ignored] = ignore
        fits = not ignored.any() or -(2**31) <= ignore < 2**31
        return labels.to(self.rng.choice([torch.int64, torch.int32])) if fits else labels

    def keep_one_each(self, mask: torch.Tensor, value: bool) -> None:
        flat, start = mask.view(-1), 0
        for length in self.lengths:
            flat[start + self.rng.randrange(length)] = value
            start += length

    def with_infinities(self, logits: torch.Tensor) -> torch.Tensor:
        """Sometimes: at the label, at another token, at all others or at all of some rows."""
        if not self.maybe(0.25) or not logits.numel():
            return logits
        rows, labels = logits.view(-1, self.vocab), self.tensors["labels"].view(-1).long()
        for row in self.rng.sample(range(rows.shape[0]), min(3, rows.shape[0])):
            value = self.rng.choice([float("inf"), float("-inf"), float("-inf"), float("nan")])
            label = min(max(int(labels[row]), 0), self.vocab - 1)
            at_label = float(rows[row, label])
            place = self.rng.choice(["label", "other", "others", "all"])
            if place == "other":
                rows[row, self.rng.randrange(self.vocab)] = value
            elif place == "label":
                rows[row, label] = value
            else:
                rows[row] = value
            if place == "others":
                rows[row, label] = at_label
        return logits

    def draw_offsets(self) -> None:
        if self.packed:
            self.tensors["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0).int()

    def draw_pool(self, shape: tuple[int, ...]) -> None:
        self.tensors["hidden"] = self.normal(*shape, self.hidden).to(self.dtype)
        if self.maybe(0.7):
            mask = torch.rand(shape, generator=self.generator) < self.rng.choice([0.1, 0.6, 1.0])
            self.keep_one_each(mask, True)
            self.tensors["mask"] = mask
        self.draw_offsets()
        self.only_ours["validate"] = self.rng.choice([None, True, False])
        if self.is_loss:
            side = [torch.float32, torch.float64]
            self.tensors["reference"] = self.normal(2 * self.pairs, self.hidden).to(
                self.rng.choice(side)
            )
            if self.maybe(0.4):
                self.tensors["sequence_weights"] = torch.rand(
                    2 * self.pairs, generator=self.generator
                ).to(self.rng.choice(side))
            self.options["reduction"] = self.rng.choice(["mean", "sum", "none"])

    def placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Sometimes as a view of other memory: with gaps, transposed, off its alignment, part of
        wider rows, or expanded."""
        layout = self.rng.choice([None, None, None, "rows", *LAYOUTS])
        if layout is None or not tensor.numel():
            return tensor
        if layout == "rows":  # the last stride stays 1
            wider = pad(
                tensor.float() if tensor.dtype == torch.bool else tensor,
                (self.rng.choice([0, 1, 3]), self.rng.choice([0, 1, 16])),
            )
            start = self.rng.choice([0, min(1, wider.shape[-1] - tensor.shape[-1])])
            return wider.to(tensor.dtype)[..., start : start + tensor.shape[-1]].copy_(tensor)
        may_expand = name not in ("cu_seqlens", "mask", "labels") or (
            name == "labels" and not self.is_loss
        )
        return laid_out(tensor, layout) if layout != "expanded" or may_expand else tensor

    # What is compared.

    def ours(self, tensors: dict[str, torch.Tensor], *, stored: bool = False) -> list[torch.Tensor]:
        """The function's results, the differentiable one first; some options are tensors where
        `stored`."""
        given = dict(tensors)
        if self.only_ours.get("inplace_backward"):  # the output of something, with wider rows
            given["logits"] = (
                pad(given["logits"], (0, 3))[..., : self.vocab]
                if self.vocab > 1
                else given["logits"] * 1
            )
        numbers = {
            n: torch.tensor(v, dtype=torch.float64)
            for n, v in self.options.items()
            if n in self.stored and stored
        }
        out = getattr(mpo_kernels, self.kind)(**given, **self.options | numbers, **self.only_ours)
        if self.only_ours.get("entropy_grad"):
            out = [out.logprobs + 0.7 * out.entropy, *out[1:]]
        leaves = [out] if isinstance(out, torch.Tensor) else tree_leaves(tuple(out))
        return [leaf for leaf in leaves if leaf is not None]

    def oracle(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(logits, results) in float64; half-precision logits of a head are rounded as its GEMM
        rounds them."""
        wide = dict(tensors)
        if self.is_pool:
            return wide["hidden"], [getattr(oracle, self.kind)(**wide, **self.options)]
        labels = wide.pop("labels").long()
        if self.is_linear:
            if self.autocast:
                wide |= {
                    name: _rounded(wide[name], self.dtype)
                    for name in ("weight", "bias")
                    if name in wide
                }
            wide["logits"] = linear(wide.pop("hidden"), wide.pop("weight"), wide.pop("bias", None))
            if "logits_dtype" not in self.only_ours:
                wide["logits"] = _rounded(wide["logits"], self.dtype)
        logits = wide.pop("logits")
        # Rows that are not scored are not read: autograd would multiply their NaN by 0.
        read = logits.where((labels != self.options["ignore_index"])[..., None], 0)
        head = {
            name: self.options[name]
            for name in ("ignore_index", "softcap", "logit_scale")
            if name in self.options
        }
        tokens = [
            f(read, labels, **head)
            for f in (oracle.token_logprobs, oracle.token_entropy, oracle.token_is_argmax)
        ]
        if self.is_loss:
            results = list(oracle.mpo_loss(read, labels, **wide, **self.options))
            return logits, results + (tokens if self.only_ours["token_outputs"] else [])
        if not self.kind.endswith("statistics"):
            return logits, tokens[:1]
        if self.only_ours["entropy_grad"]:
            tokens[0] = tokens[0] + 0.7 * tokens[1]
        moments = oracle.token_moments(read, labels, **head) if self.only_ours["moments"] else ()
        return logits, [*tokens, *moments]

    def run(self) -> str:
        """Compares; returns what it was about."""
        mine = {n: t.detach().requires_grad_(n in self.trained) for n, t in self.tensors.items()}
        wide = {
            n: (
                (t.detach().double() if t.is_floating_point() else t).requires_grad_(
                    n in self.trained
                )
            )
            for n, t in self.tensors.items()
        }
        before = {n: t.detach().clone() for n, t in mine.items()}
        with self.circumstances():
            got = self.ours(mine, stored=True)
        logits, want = self.oracle(wide)
        upstream = self.some_upstream(got[0])
        if self.trained and got[0].numel():
            if logits.requires_grad:
                logits.retain_grad()
            with self.circumstances():
                self.backward(got[0], upstream, mine)
            want[0].backward(upstream.double())
        self.compare(got, want, mine, wide, logits)
        for name, tensor in mine.items():
            torch.testing.assert_close(
                tensor.detach(),
                before[name],
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=f"{name} was changed",
            )
        if self.maybe(0.2):
            self.compare_without_data(got)
        return self.kind

    def some_upstream(self, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 0:
            return value.new_tensor(self.upstream)
        upstream = self.normal(*value.shape).to(value.dtype) * self.upstream
        return (
            laid_out(upstream, self.rng.choice(LAYOUTS))
            if value.numel() and self.maybe(0.5)
            else upstream
        )

    def backward(
        self, value: torch.Tensor, upstream: torch.Tensor, mine: dict[str, torch.Tensor]
    ) -> None:
        """Once, or once before: what is left for a second time is the same."""
        leaves = [mine[name] for name in self.trained]
        if self.maybe(0.2) and not self.only_ours.get("inplace_backward"):
            first = torch.autograd.grad(value, leaves, upstream, retain_graph=True)
            value.backward(upstream)
            if self.is_linear and self.other_strides:
                return  # the last pass is no operator, and its GEMM takes the weight as it is
            for name, leaf, grad in zip(self.trained, leaves, first, strict=True):
                torch.testing.assert_close(
                    leaf.grad,
                    grad,
                    rtol=0,
                    atol=0,
                    equal_nan=True,
                    msg=f"second gradient of {name}",
                )
        else:
            value.backward(upstream)

    @contextlib.contextmanager
    def circumstances(self):
        """Small blocks and pieces, so that small problems have several; other strides inside;
        autocast."""
        small = random.Random(self.vocab)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("mpo_kernels.ops.chunks.ROW_MULTIPLE", 1))
            stack.enter_context(
                mock.patch(
                    "mpo_kernels.backends.eager.ROWS_BYTES",
                    small.choice([1, 3 * 4 * self.vocab, 2 << 20]),
                )
            )
            stack.enter_context(
                mock.patch(
                    "mpo_kernels.ops.gradients.PRODUCT_COLUMNS",
                    small.choice([1 + self.vocab // 3, 8192]),
                )
            )
            stack.enter_context(
                mock.patch(
                    "mpo_kernels.ops.projection.PRODUCT_COLUMNS",
                    small.choice([1 + self.vocab // 3, 8192]),
                )
            )
            if INTERPRETED:
                from mpo_kernels.backends.triton.tiles import Tile, use_tiles

                stack.enter_context(
                    use_tiles(
                        stats=Tile(small.choice([64, 256]), 1),
                        grad=Tile(small.choice([64, 512]), 1),
                    )
                )
            self.other_strides = small.random() < 0.3
            if self.other_strides:
                stack.enter_context(OtherStrides(small.choice(["gaps", "transposed", "offset"])))
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", self.dtype))
            yield

    # How close.

    def compare(self, got: list, want: list, mine: dict, wide: dict, logits: torch.Tensor) -> None:
        assert len(got) == len(want), f"{len(got)} results for {len(want)}"
        precision = 2.0**-50 if self.dtype == torch.float64 else 2.0**-22
        scale = abs(self.options.get("logit_scale", 1.0))
        sizes = logits.detach().abs()
        if self.is_linear:
            sizes = linear(wide["hidden"].detach().abs(), wide["weight"].detach().abs())
        largest = _largest(sizes)
        moved = precision * largest * scale  # a final logit may be off by this
        if self.is_linear and self.dtype in HALF:
            moved += HALF[self.dtype] * _largest(logits.detach()) * scale
        tolerance = (
            1e-10 if self.dtype == torch.float64 else 2e-5
        ) + 4 * precision * largest * scale
        if "softcap" in self.options:  # the slope of a saturated cap falls with exp
            tolerance += 4 * moved / self.options["softcap"]
        lost = self.lost(want, moved) if self.kind.endswith("mpo_loss") else 0.0

        for place, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            what = f"result {place}"
            assert ours.shape == theirs.shape, f"{what}: {ours.shape} for {theirs.shape}"
            if ours.dtype == torch.bool:
                # to its rounding caps up to 32 are exact, not to that of small logits
                cap = min(self.options.get("softcap", 0.0), 32.0)
                self.compare_argmax(
                    what,
                    ours,
                    logits.detach(),
                    wide["labels"].long(),
                    4 * moved + 4 * precision * cap,
                )
            else:
                expected = torch.float64 if self.dtype == torch.float64 else torch.float32
                assert ours.dtype == expected, f"{what} is {ours.dtype}"
                is_pair_loss = place == 0 and self.kind.endswith("mpo_loss")
                floor = 4 * moved + (1e-5 if self.dtype != torch.float64 else 1e-9)
                _agree(
                    what,
                    ours,
                    theirs.detach(),
                    tolerance + (lost if is_pair_loss else 4 * moved),
                    0.0 if is_pair_loss else floor,
                )

        if self.is_loss and not all(w.isfinite().all() for w in want if w.dtype != torch.bool):
            return  # a loss that is no number has no gradient worth a comparison
        rounding = {**HALF, torch.float64: 0.0, torch.float32: 0.0}
        for name in self.trained:
            theirs, ours = wide[name].grad, mine[name].grad
            if theirs is None:
                continue
            assert ours.dtype == mine[name].dtype and ours.shape == mine[name].shape
            size = (
                theirs if not self.is_linear else self.without_cancellation(name, logits.grad, wide)
            )
            steps = rounding[self.dtype] * (4 if self.is_linear else 2)
            # its least number
            underflow = 6e-8 * ours.numel() ** 0.5 if ours.dtype == torch.float16 else 0.0
            finite = size[size.isfinite()]
            allowed = (tolerance + steps + lost + (8 * moved if not self.is_pool else 0.0)) * float(
                finite.norm()
            )
            _agree(
                f"gradient of {name}",
                ours,
                theirs,
                0.0,
                allowed + underflow + 1e-12 * abs(self.upstream),
            )

    @staticmethod
    def without_cancellation(name: str, logits_grad: torch.Tensor, wide: dict) -> torch.Tensor:
        """The same sums of products with all terms positive: what their rounding errors are
        relative to."""
        rows = logits_grad.abs().flatten(0, -2)
        if name == "hidden":
            return rows @ wide["weight"].detach().abs()
        return (
            rows.T @ wide["hidden"].detach().abs().flatten(0, -2)
            if name == "weight"
            else rows.sum(0)
        )

    def lost(self, want: list, moved: float) -> float:
        """Relative error of a loss whose gap is nearly right: its means are off by some rounding
        and by what the logits are."""
        _, chosen, rejected, gap = (w.detach() for w in want[:4])
        reference_gap, beta = self.tensors["reference_gap"].double(), abs(self.options["beta"])
        error = (self.options["beta"] * gap - reference_gap).abs().clamp_min(1e-30)
        precision = 1e-15 if self.dtype == torch.float64 else 3e-7
        off = (
            precision * (beta * (chosen.abs() + rejected.abs()) + reference_gap.abs())
            + 4 * beta * moved
        )
        relative = (off / error).nan_to_num(0.0, 0.0)
        return float((2 * relative + relative**2).max())

    def compare_argmax(
        self, what: str, got: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, moved: float
    ) -> None:
        """Exact, but where final logits are closer than rounding can tell."""
        head = {
            name: self.options[name] for name in ("softcap", "logit_scale") if name in self.options
        }
        z, scored = oracle.final_logits(logits, **head), labels != self.options["ignore_index"]
        at_label = z.gather(-1, labels.where(scored, 0)[..., None])[..., 0]
        best = z.amax(-1)
        want = (at_label >= best) & scored
        certain = ~scored | ((best - at_label) > moved + 1e-6 * best.abs()) | best.isnan()
        if not self.is_linear:  # equal logits are so after any option
            certain |= logits.gather(-1, labels.where(scored, 0)[..., None])[..., 0] == logits.amax(
                -1
            )
        if self.options.get("logit_scale", 1.0) <= 0 or (self.is_linear and self.dtype in HALF):
            certain &= ~scored
        assert torch.equal(got[certain], want[certain]), f"{what}: arg-max"

    def compare_without_data(self, got: list[torch.Tensor]) -> None:
        """Fake and meta tensors: the same shapes and dtypes, of values and gradients."""
        fake = FakeTensorMode()
        places = [(fake, fake.from_tensor)] + (
            [] if self.autocast else [(contextlib.nullcontext(), lambda t: t.to("meta"))]
        )
        for mode, emptied in places:
            tensors = {
                n: emptied(t.detach()).requires_grad_(n in self.trained)
                for n, t in self.tensors.items()
            }
            with (
                mode,
                torch.autocast("cpu", self.dtype, enabled=self.autocast),
                mock.patch.dict(self.only_ours),
            ):
                self.only_ours.pop("validate", None)
                out = self.ours(tensors)
                if self.trained and out[0].numel():
                    out[0].backward(torch.ones_like(out[0]))
            for ours, real in zip(out, got, strict=True):
                assert (ours.shape, ours.dtype) == (
                    real.shape,
                    real.dtype,
                ), f"{mode}: {ours} for {real.shape} {real.dtype}"
            for name in self.trained:
                grad = tensors[name].grad
                assert grad is None or (grad.shape, grad.dtype) == (
                    tensors[name].shape,
                    tensors[name].dtype,
                ), f"{mode}: gradient of {name}"


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`exact` rounded to half precision, whose derivative is 1."""
    if dtype not in HALF:
        return exact
    error = (exact.to(dtype).double() - exact).detach()
    return exact + error.where(error.isfinite(), 0)


def _agree(
    what: str, got: torch.Tensor, want: torch.Tensor, relative: float, absolute: float
) -> None:
    """NaN and infinities at the same places; all else within the L2 tolerance. What overflows
    float16 is left to a GradScaler."""
    got, want, most = got.detach().double(), want.double(), torch.finfo(got.dtype).max
    allowed = relative * float(want[want.isfinite()].norm()) + absolute
    fits = ~want.isfinite() | (want.abs() + allowed < most)
    assert torch.equal(got.isnan()[fits], want.isnan()[fits]), (
        f"{what}: NaN at {got.isnan().nonzero().tolist()[:4]}, should be at "
        + str(want.isnan().nonzero().tolist()[:4])
    )
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), (
        f"{what}: {got[infinite][:4].tolist()} for {want[infinite][:4].tolist()}"
    )
    finite = want.isfinite() & fits
    error = float((got - want)[finite].norm())
    assert error <= allowed, (
        f"{what} is off by {error:.2e} of {float(want[finite].norm()):.2e};"
        f" allowed is {allowed:.2e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--problems", type=int, default=10**9, help="stop after these")
    parser.add_argument("--seed", type=int, default=0, help="number of the first problem")
    parser.add_argument(
        "--all", action="store_true", help="go on after a failure and list them all"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, seed, failed = time.monotonic() + arguments.seconds, arguments.seed, 0
    while seed - arguments.seed < arguments.problems and time.monotonic() < end:
        problem = None
        try:
            problem = Problem(seed)
            problem.run()
        except Exception as error:
            failed += 1
            print(f"problem {seed} failed (repeat it with --seed {seed} --problems 1): {problem}")
            place = traceback.extract_tb(error.__traceback__)[-1]
            print(f"  {error!r} at {place.filename}:{place.lineno}", flush=True)
            if not arguments.all:
                raise
        seed += 1
    if failed:
        raise SystemExit(f"{failed} of {seed - arguments.seed} problems failed")
    print(
        f"{seed - arguments.seed} problems, numbers {arguments.seed} to {seed - 1}: all agree with"
        " the oracle"
    )


if __name__ == "__main__":
    main()
