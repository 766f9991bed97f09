"""Covering arrays: few cases that meet every combination of some axes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence


def covering(
    axes: Mapping[str, Sequence], together: Sequence[tuple[str, ...]], seed: int = 0
) -> Iterator[dict]:
    """Cases that hold every combination of values of each group of axes in `together`, greedily
    few, always the same."""
    rng = random.Random(seed)
    open_sets = {
        group: set(itertools.product(*(range(len(axes[name])) for name in group)))
        for group in together
    }
    while any(open_sets.values()):
        group, values = max(
            ((g, v) for g, v in open_sets.items() if v), key=lambda item: len(item[1])
        )
        fixed = dict(zip(group, min(values), strict=True))
        tries = [{n: fixed.get(n, rng.randrange(len(axes[n]))) for n in axes} for _ in range(40)]
        best = max(
            tries, key=lambda t: sum(tuple(t[n] for n in g) in v for g, v in open_sets.items())
        )
        for g, v in open_sets.items():
            v.discard(tuple(best[n] for n in g))
        yield {name: axes[name][index] for name, index in best.items()}
