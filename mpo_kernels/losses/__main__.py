"""The page of all losses from their docstrings: `python -m mpo_kernels.losses >docs/losses.md`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap

from mpo_kernels import losses
from mpo_kernels.losses import SequenceLoss

_BEGINNING = """\
# Losses

This page is made by `python -m mpo_kernels.losses > docs/losses.md` from the docstrings of
`mpo_kernels.losses`.

A loss is a small function of what a model gives to a group of sequences: the sum s of the
log-probabilities of each answer, and the number n of its tokens. m = s / n. With a reference model,
r = s - (the reference's s). Of a pair, w is the chosen answer and l the rejected one, and
D = r_w - r_l. ls is log sigmoid. All sums are over scored tokens, all losses per group.

```python
from mpo_kernels import token_logprobs
from mpo_kernels.losses import DPO, Scores

logps = token_logprobs(logits, labels)  # (2P, T), chosen first
sums, tokens = logps.sum(-1).view(2, -1), (labels != -100).sum(-1).view(2, -1)
loss = DPO(beta=0.1)(Scores(sums, tokens.to(sums.dtype)), reference_logps).mean()
```

A function of your own is a loss too, and `Custom(function, sequences=1)` says of which groups:
[what is asked of it](kernels.md#a-loss-of-your-own).

## Three things called MPO

- **This one**: Multilingual reward gaP Optimization, arXiv 2505.16869, `MPO` below. It pulls the
  reward gap of a target language to the constant that the reference model has in the dominant one,
  by a squared error. There is no sigmoid, and no reference value of the target language.
- **Mixed** Preference Optimization, arXiv 2411.10442, TRL's "MPO":
  `Sum((0.8, DPO()), (0.2, BCO()), (1.0, SFT()))`.
- **Maximum a posteriori** Policy Optimization, arXiv 1806.06920: reinforcement learning, not of
  this family.

## Two things called rDPO

`RobustDPO` is for labels that are wrong now and then. `LengthDPO` (R-DPO) is for answers that were
chosen for their length. Neither is named rdpo here.
"""


def page() -> str:
    """The page as Markdown."""
    kinds = [getattr(losses, name) for name in losses.__all__]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, SequenceLoss)]
    kinds = [kind for kind in kinds if kind.__call__ is not SequenceLoss.__call__]
    kinds.remove(losses.Custom)  # which says nothing of a formula
    kinds.sort(key=lambda kind: (kind.__module__, inspect.getsourcelines(kind)[1]))
    return _BEGINNING + "".join(map(_section, kinds))


def _section(kind: type[SequenceLoss]) -> str:
    formula, _, text = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    text, _, _ = text.partition("\n\nRaises:")
    lines = [f"\n## {kind.__name__}\n", textwrap.indent(formula, "    "), f"\n{text}\n"]
    fields = dataclasses.fields(kind)
    constants = kind().constants if kind is not losses.Sum else ()
    if constants:
        names = ", ".join(f"`{name}`" for name in constants)
        lines.append(f"Constants, in this order: {names}.\n")
    if fields:
        lines += ["| field | default | takes |", "|---|---|---|"]
    for field in fields:
        lines.append(f"| `{field.name}` | {field.default} | {field.metadata['allowed'].words} |")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
