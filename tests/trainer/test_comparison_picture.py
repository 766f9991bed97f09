"""The picture of a comparison: a mark for each language of each loss at its value, every name
there, and nothing outside or on top of anything else."""

import itertools
import math
import warnings

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from test_pictures import CODES, MANY, NO_FONT, SIX
from tiny import example_of

from mpo.data.examples import TokenizedResponse
from mpo.evaluation.gaps import GapTable
from mpo.models.scoring import Measurement
from mpo.training import comparison_picture as picture
from mpo.training.comparison import Comparison, Training
from mpo.training.drawing import CODE, Letters

ANY = TokenizedResponse((1, 2), 1)
LONG = "simpo,beta=10,gamma=5,train.learning_rate=1e-6,train.schedule=constant"


def compared(languages, losses, failed=(), nothing=()):
    """A comparison of made-up numbers: two rows a language."""
    examples = [example_of("rows", language, ANY, ANY, ANY, ANY) for language in languages * 2]
    draw = torch.Generator().manual_seed(0)

    def measurement(name):
        gaps = torch.randn(2, len(examples), generator=draw)
        if name in nothing:
            gaps[:] = math.nan
        return Measurement(gaps[0], gaps[1], torch.zeros(len(examples), 2, 3))

    done = [name for name in losses if name not in failed]
    measured = {name: measurement(name) for name in ("before", *done)}
    trainings = {
        name: Training("x", {}, 4, *([math.nan] * 2 if name in nothing else (10.0 + i, 1.0 + i)))
        for i, name in enumerate(done)
    }
    table = GapTable.of(examples, measured, 1.0) if done else None
    return Comparison(tuple(losses), table, trainings, dict.fromkeys(failed, "why"))


CASES = {
    "ten": compared(SIX, [f"loss_{i}" for i in range(10)]),
    "one": compared(("sw",), ["mpo"]),
    "failed": compared(SIX, ["mpo", "dpo", "ipo"], failed=["dpo"]),
    "all failed": compared(SIX, ["mpo", "dpo"], failed=["mpo", "dpo"]),
    "long names": compared(SIX, ["mpo", LONG, "my.module:loss"]),
    "many languages": compared(MANY, ["mpo", "dpo"]),
    "long codes": compared(CODES, ["mpo", "dpo"]),
    "no font": compared(NO_FONT, ["mpo", "dpo"]),
    "no numbers": compared(SIX, ["mpo", "dpo"], nothing=["dpo"]),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    comparison = CASES[request.param]
    letters = Letters([*comparison.names, *comparison.languages])
    with (
        warnings.catch_warnings(),
        plt.style.context("default"),
        matplotlib.rc_context({"font.family": letters.fonts}),
    ):
        warnings.simplefilter("error")
        figure = picture._figure(comparison, letters)
        figure.canvas.draw()
    yield comparison, figure, letters
    plt.close(figure)


def test_every_value_is_drawn_in_its_line(case):
    comparison, figure, _ = case
    for axis, field in zip(figure.axes, ("target_gap", "distance", "sign_accuracy"), strict=False):
        scale = 100 if field == "sign_accuracy" else 1
        points = [line.get_xydata()[0] for line in axis.get_lines() if len(line.get_xdata()) == 1]
        expected = [
            (scale * getattr(comparison.row(name, language), field), place)
            for place, name in enumerate(comparison.names)
            for language in comparison.languages
            if comparison.row(name) is not None
        ]
        expected = [point for point in expected if math.isfinite(point[0])]
        assert len(points) == len(expected)
        for (x, y), (value, place) in zip(points, expected, strict=True):
            assert x == pytest.approx(value) and round(y) == place
        if len(comparison.languages) > 2:  # one language is all rows
            assert len({tuple(point) for point in points}) == len(points)
    for axis, field in zip(figure.axes[4:], ("seconds", "peak_memory_gib"), strict=True):
        lengths = [bar.get_width() for bar in axis.patches]
        costs = [getattr(training, field) for training in comparison.trainings.values()]
        assert lengths == [cost for cost in costs if math.isfinite(cost)]


def test_languages_are_told_apart_and_named(case):
    comparison, figure, letters = case
    (names,) = figure.legends
    languages = comparison.languages[:-1]
    shown = [text.get_text() for text in names.get_texts()]
    assert shown[: len(languages)] == [letters.of(language, CODE) for language in languages]
    looks = [(h.get_color(), h.get_marker()) for h in names.legend_handles[: len(languages)]]
    assert len(set(looks)) == len(languages)


def test_every_loss_is_named_and_failures_too(case):
    comparison, figure, _ = case
    for axis in figure.axes:
        failed = [text.get_text() for text in axis.texts].count("failed")
        assert failed == len(comparison.failures)
    labels = [text.get_text().replace("\n", "") for text in figure.axes[0].get_yticklabels()]
    assert labels == comparison.names


def test_nothing_lies_on_anything_else(case):
    _, figure, _ = case
    renderer = figure.canvas.get_renderer()
    axes = figure.axes
    boxes = [axis.get_tightbbox(renderer) for axis in axes]
    boxes += [part.get_window_extent(renderer) for part in figure.legends]
    for one, two in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(two.padded(-1)), (one, two)
    whole = figure.bbox.padded(1)
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1
    for axis in axes[::2]:
        labels = [text.get_window_extent(renderer) for text in axis.get_yticklabels()]
        for one, two in itertools.pairwise(labels):
            assert not one.overlaps(two)
    for axis in axes:
        box = axis.patch.get_window_extent(renderer)
        assert box.width > 200
        for text in axis.texts:
            assert text.get_window_extent(renderer).x1 <= box.x1 + 1


def test_a_picture_is_written(tmp_path):
    picture.draw_comparison(CASES["failed"], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
