"""Accuracy over dtypes, vocabularies, hidden sizes, pairs, masks, options and regimes, against
float64 and plain autograd.

By default a sample in which every two values of any two axes meet, at sizes that leave it under two
minutes. The `slow` run has every triple of dtype, vocabulary and option, of dtype, vocabulary and
hidden size, of dtype, option and regime, and of pairs, mask and regime.
"""

import itertools
import statistics

import pytest
import torch
from cases import INTERPRETED

from benchmarks.instruments.covering import covering
from benchmarks.instruments.numerics import AXES, EXTREMES, check, ratios

if INTERPRETED:
    pytest.skip(
        "the matrix is of real sizes; the interpreter runs small ones in the other files",
        allow_module_level=True,
    )

LARGEST = 33_000_000  # elements of the weight in the default run
PAIRWISE = [
    case
    for case in covering(AXES, list(itertools.combinations(AXES, 2)))
    if case["vocab"] * case["hidden"] <= LARGEST
]
WHOLE = list(
    covering(
        AXES,
        [
            ("dtype", "vocab", "option"),
            ("dtype", "vocab", "hidden"),
            ("pairs", "mask", "regime"),
            ("option", "regime", "dtype"),
        ],
    )
)


def name(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "_") for value in case.values())


EXTREME = [
    {
        "dtype": dtype,
        "vocab": vocab,
        "hidden": 64,
        "pairs": 2,
        "mask": "prompt",
        "option": option,
        "regime": regime,
    }
    for dtype, vocab in ((torch.float32, 127), (torch.bfloat16, 127), (torch.float16, 32000))
    for option in EXTREMES
    for regime in ("flat", "unlikely", "minus infinity", "equal")
]

RATIOS: list[float] = []


@pytest.mark.parametrize("case", PAIRWISE, ids=name)
def test_sample(case):
    RATIOS.extend(ratios(check(case)))


def test_on_average_no_worse_than_plain_autograd():
    """After the sample: the geometric mean of error over plain autograd's error, where either is
    above fp32 rounding."""
    if len(RATIOS) < 40:
        pytest.skip("needs the sample to have run in this process")
    assert statistics.geometric_mean(RATIOS) < 1.05


@pytest.mark.parametrize("case", EXTREME, ids=name)
def test_options_at_their_extremes(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE, ids=name)
def test_whole(case):
    check(case)


def test_the_sample_covers_all_pairs_of_values_that_fit():
    for first, second in itertools.combinations(AXES, 2):
        if {first, second} == {"vocab", "hidden"}:
            continue
        met = {(case[first], case[second]) for case in covering(AXES, [(first, second)])}
        assert met == set(itertools.product(AXES[first], AXES[second]))
