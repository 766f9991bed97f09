"""The tables that a run and `mpo gaps` print, on numbers made by hand."""

import dataclasses
import io
import math

import numpy
import pytest
import torch
from rich.console import Console
from tiny import example_of

from mpo.data.examples import TokenizedResponse
from mpo.evaluation.gaps import GapTable, bootstrap_interval
from mpo.models.scoring import Measurement
from mpo.training.result import RunResult

BETA = 2.0
ANY = TokenizedResponse((1, 2), 1)
EXAMPLES = [
    example_of(f"rows:{i}", language, ANY, ANY, ANY, ANY)
    for i, language in enumerate(("sw", "zh", "sw", "zh"))
]
BEFORE = Measurement(
    target=torch.tensor([0.5, -0.25, 0.0, 1.0]),  # a gap of exactly 0 is no right order
    dominant=torch.tensor([1.0, 0.5, 0.75, 1.5]),  # |2 * target - dominant| = 0, 1, 0.75, 0.5
    pooled=torch.full((4, 2, 3), 2.0),
)
AFTER = Measurement(
    # against the dominant gap *before*: 1, 0.5, 0.25, 3.5
    target=torch.tensor([1.0, 0.5, 0.5, -1.0]),
    dominant=torch.tensor([1.5, 0.25, 0.5, 2.0]),
    pooled=torch.full((4, 2, 3), 2.5),
)
WORKED_OUT = {
    "sw": {
        "n": 2,
        "target_gap": (0.25, 0.75),
        "dominant_gap": (0.875, 1.0),
        "distance": (0.375, 0.625),
        "sign_accuracy": (0.5, 1.0),
    },
    "zh": {
        "n": 2,
        "target_gap": (0.375, -0.25),
        "dominant_gap": (1.0, 1.125),
        "distance": (0.75, 2.0),
        "sign_accuracy": (0.5, 0.5),
    },
    "all": {
        "n": 4,
        "target_gap": (0.3125, 0.25),
        "dominant_gap": (0.9375, 1.0625),
        "distance": (0.5625, 1.3125),
        "sign_accuracy": (0.5, 0.75),
    },
}
QUANTITIES = ("target_gap", "dominant_gap", "distance", "sign_accuracy")


def printed(show, width=140):
    """Its lines, without the frame of the table."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console)
    lines = (
        line.strip().replace("┃", "│").removeprefix("│").removesuffix("│")
        for line in console.file.getvalue().splitlines()
    )
    return [[cell.strip() for cell in line.split("│")] for line in lines]


def test_the_result_of_a_run():
    made = RunResult.of(EXAMPLES, BEFORE, AFTER, BETA, "mpo")
    result = made.as_dict()
    rows = {**result["languages"], "all": result["all"]}
    assert list(rows) == ["sw", "zh", "all"] and result["gap_scale"] == BETA
    assert result["loss"] == "mpo"
    for language, expected in WORKED_OUT.items():
        assert rows[language]["n"] == expected["n"]
        for quantity in QUANTITIES:
            assert (
                tuple(rows[language][quantity][moment] for moment in ("before", "after"))
                == expected[quantity]
            ), (language, quantity)
    assert result["l2"] == 0.25 and result["l2_relative"] == 0.0625  # 0.5^2, and over 2^2
    lines = printed(made.show)
    assert ["sw", "2", "+0.250 → +0.750", "+0.875 → +1.000", "0.375 → 0.625", "50% → 100%"] in lines
    assert ["all", "4", "+0.312 → +0.250", "+0.938 → +1.062", "0.562 → 1.312", "50% → 75%"] in lines
    assert ["Dominant representation: L2 2.50e-01, 6.25% of its mean square."] in lines


def test_a_gap_that_is_no_number_makes_no_number():
    broken = dataclasses.replace(BEFORE, target=torch.tensor([0.5, math.nan, 0.0, 1.0]))
    row = GapTable.of(EXAMPLES, {"one": broken}, BETA).as_dict()["models"]["one"]
    result = RunResult.of(EXAMPLES, broken, AFTER, BETA, "mpo").as_dict()["languages"]
    for quantity in ("target_gap", "distance", "sign_accuracy"):
        assert math.isnan(row["zh"][quantity])
        assert math.isnan(row["all"][quantity])
        assert math.isfinite(row["sw"][quantity])
        assert math.isnan(result["zh"][quantity]["before"])
        assert math.isfinite(result["zh"][quantity]["after"])


def test_the_report_of_models_side_by_side():
    table = GapTable.of(EXAMPLES, {"one": BEFORE, "two": AFTER}, BETA)
    made = table.as_dict()
    assert made["gap_scale"] == BETA and list(made["models"]) == ["one", "two"]
    for place, rows in enumerate(made["models"].values()):
        assert list(rows) == ["sw", "zh", "all"]
        for language, row in rows.items():
            assert row["n"] == WORKED_OUT[language]["n"]
            assert {quantity: row[quantity] for quantity in QUANTITIES} == {
                q: WORKED_OUT[language][q][place] for q in QUANTITIES
            }
            for quantity in ("target_gap", "distance"):
                low, high = row[f"{quantity}_interval"]
                assert low <= row[quantity] <= high and low < high, (language, quantity)
    lines = printed(table.show)
    row = made["models"]["two"]["sw"]
    intervals = {
        q: "[{:{s}}, {:{s}}]".format(*row[f"{q}_interval"], s=s)
        for q, s in (("target_gap", "+.3f"), ("distance", ".3f"))
    }
    assert [
        "",
        "two",
        "",
        f"+0.750 {intervals['target_gap']}",
        "+1.000",
        f"0.625 {intervals['distance']}",
        "100%",
    ] in lines


def values_of(kind, count=300):
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(count, generator=generator)
    return normal + 3 if kind == "normal" else normal.exp()


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_intervals_are_those_of_95_percent_of_the_resampled_means(kind):
    """Against numpy's resampling, to a fifth of a standard error; a 90 % interval is further
    away."""
    values = values_of(kind)
    error = float(values.std()) / len(values) ** 0.5
    picks = numpy.random.default_rng(1).integers(0, len(values), (20_000, len(values)))
    expected = numpy.percentile(values.numpy()[picks].mean(1), [2.5, 97.5])
    assert bootstrap_interval(values) == pytest.approx(tuple(expected), abs=0.2 * error)
    ninety = numpy.percentile(values.numpy()[picks].mean(1), [5, 95])
    assert (abs(expected - ninety) > 0.25 * error).all()


def test_the_interval_of_one_row_is_that_row_and_does_not_change_from_call_to_call():
    assert bootstrap_interval(torch.tensor([0.25])) == (0.25, 0.25)
    assert bootstrap_interval(values_of("normal")) == bootstrap_interval(values_of("normal"))


def test_each_quantity_has_the_interval_of_its_own_rows():
    """Distances are far from the gaps here, so that no interval can be taken for another."""
    target, anchor = values_of("normal", 40), values_of("normal", 40) * 5
    examples = [EXAMPLES[0]] * 40
    measured = Measurement(target, anchor, torch.zeros(40, 2, 1))
    row = GapTable.of(examples, {"one": measured}, BETA).as_dict()["models"]["one"]["all"]
    assert row["target_gap_interval"] == bootstrap_interval(target)
    assert row["distance_interval"] == bootstrap_interval((BETA * target - anchor).abs())
    assert row["target_gap_interval"][1] < row["distance_interval"][0]


def test_resampling_in_parts_draws_what_it_would_draw_at_once(monkeypatch):
    """Many rows are resampled a few draws at a time, so that memory does not grow with them."""
    values = values_of("skewed")
    whole = bootstrap_interval(values)
    for together in (1, 7 * len(values), 1999 * len(values)):
        monkeypatch.setattr("mpo.evaluation.gaps.DRAWN_AT_ONCE", together)
        assert bootstrap_interval(values) == whole
