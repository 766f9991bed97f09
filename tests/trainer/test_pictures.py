"""Pictures of runs: every curve can be seen and told from the others, every name is there as it is,
and nothing lies on anything else."""

import io
import itertools
import json
import math
import random
import warnings

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib import pyplot as plt

from mpo.runtime.errors import UserError
from mpo.training import curves, drawing
from mpo.training.curves import Run

SIX = ("ar", "bn", "ja", "ko", "sw", "zh")
MANY = tuple(f"l{i:02}" for i in range(34))
CODES = (
    "zho_Hans",
    "zho_Hant",
    "arb_Arab",
    "ben_Beng",
    "swh_Latn",
    "kor_Hang",
    "jpn_Jpan",
    "hin_Deva",
    "tam_Taml",
    "a-code-of-" + "x" * 40,
)
SIGNS = ("_sw", "$a$ and $b$", "50%", "x_1^2", r"\alpha", "[/x]", "{y}", "العربية", "кириллица")
NO_FONT = ("中文", "日本", "हिन्दी", "sw")
LONG = [
    f"runs/2026-11-25_llama-3.1-8b-instruct_beta-1_lr-6e-7_seed-{i}_{'with-all-that-changed-' * 4}"
    for i in range(6)
]


def rows(steps, languages, seed=0):
    """Metrics as a run writes them. At the first step the policy is the reference, so that L2 is
    0."""
    draw = random.Random(seed)
    made = []
    for step in range(1, steps + 1):
        l1, l2 = draw.random() + 0.1, draw.random() * (step - 1)
        gaps = {language: draw.random() + i for i, language in enumerate(languages)}
        made.append({"step": step, "loss": l1 + l2, "l1": l1, "l2": l2, "gap": gaps})
    return made


def result(languages, seed=0):
    draw = random.Random(seed)

    def row():
        return {
            key: {"before": draw.random() - 0.3, "after": draw.random()}
            for key in ("target_gap", "distance", "dominant_gap")
        }

    return {"languages": {language: row() for language in languages}, "all": row()}


def sometimes(made, language, steps):
    """The language is in the rows of these steps only."""
    return [
        {
            **row,
            "gap": {k: v for k, v in row["gap"].items() if k != language or row["step"] in steps},
        }
        for row in made
    ]


NOTHING = [{"step": 1, "loss": None, "l1": 0.0, "l2": 0.0, "gap": {"sw": None}}]
NULLS = {
    "languages": {
        "sw": {key: {"before": None, "after": 1.0} for key in ("target_gap", "distance")}
    },
    "all": {"dominant_gap": {"before": None, "after": None}},
}
CASES = {
    "a run": [Run("demo", rows(30, SIX), result(SIX))],
    "one step": [Run("demo", rows(1, SIX), result(SIX))],
    "a language of one step": [Run("demo", sometimes(rows(20, SIX), "sw", (7,)), None)],
    "one language": [Run("demo", rows(20, ("sw",)), result(("sw",)))],
    "two runs": [
        Run(f"{name}/run", rows(10, SIX, i), result(SIX, i)) for i, name in enumerate("ab")
    ],
    "a run of one step beside another": [
        Run("a", rows(1, SIX), None),
        Run("b", rows(50, SIX), None),
    ],
    "ten runs": [Run(f"r{i}", rows(10, SIX[:2], i), None) for i in range(10)],
    "many languages": [Run("demo", rows(60, MANY), result(MANY))],
    "many languages of one step": [Run("demo", rows(1, MANY), result(MANY))],
    "long codes": [Run("demo", rows(20, CODES), result(CODES))],
    "signs": [
        Run("_name", rows(10, SIGNS), result(SIGNS)),
        Run("$5 and $6", rows(10, SIGNS, 1), None),
    ],
    "no font": [
        Run("实验一", rows(10, NO_FONT), result(NO_FONT)),
        Run("实验二", rows(10, NO_FONT, 1), None),
    ],
    "long names": [
        Run(name, rows(10, SIX, i), result(SIX, i) if i < 2 else None)
        for i, name in enumerate(LONG)
    ],
    "a run that is called as a language is": [
        Run("sw", rows(5, ("sw", "zh")), result(("sw", "zh"))),
        Run("zh", rows(5, ("sw",), 1), None),
    ],
    "no metrics left": [Run("demo", [], result(SIX))],
    "no number": [Run("demo", NOTHING, NULLS)],
}


def drawn(runs):
    """The figure, laid out. A letter without a glyph is an error."""
    languages = sorted(
        {language for run in runs for row in run.rows for language in row["gap"]}
        | curves._measured(runs)
    )
    letters = drawing.Letters([*(run.name for run in runs), *languages])
    with (
        warnings.catch_warnings(),
        plt.style.context("default"),
        matplotlib.rc_context({"font.family": letters.fonts}),
    ):
        warnings.simplefilter("error")
        figure = curves._figure(runs, languages, letters)
        figure.canvas.draw()
    return figure, languages, letters


def look(line):
    dashes = None if line.get_linestyle() == "None" else str(line._unscaled_dash_pattern)
    return line.get_color(), line.get_marker(), dashes, line.get_linewidth()


def texts_of(legend):
    return [text.get_text() for text in legend.get_texts()]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    figure, languages, letters = drawn(CASES[request.param])
    yield CASES[request.param], figure, languages, letters
    plt.close(figure)


def test_every_curve_is_seen_and_told_from_the_others(case):
    runs, figure, languages, _ = case
    curves, gaps = figure.subfigs[0].axes
    points = {}
    for run, language in itertools.product(range(len(runs)), languages):
        found = [
            (row["step"], row["gap"][language])
            for row in runs[run].rows
            if row["gap"].get(language) is not None
        ]
        if found:
            points[run, language] = found
    lines = gaps.get_lines()
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == list(points.values())
    assert len({look(line) for line in lines}) == len(lines)
    for line in (*lines, *curves.get_lines()):
        count = len(line.get_xdata())
        assert count > 3 or (line.get_marker() not in (None, "None") and line.get_markevery() == 1)
    for axis in (curves, gaps):
        assert all(
            float(tick).is_integer()
            for tick in axis.get_xticks()
            if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]
        )
    legend = dict(
        zip(
            (look(h) for h in gaps.get_legend().legend_handles),
            texts_of(gaps.get_legend()),
            strict=True,
        )
    )
    assert len(legend) == len(languages)
    losses = [line.get_ydata() for line in curves.get_lines()]
    assert all((values > 0).all() for values in losses)
    expected = [
        [row[key] for row in run.rows if row[key]] for run in runs for key in ("loss", "l1", "l2")
    ]
    assert [list(values) for values in losses] == [values for values in expected if values]
    for label, key in (("loss", "loss"), ("L1 (gap)", "l1"), ("L2 (retention)", "l2")):
        any_seen = any(row[key] for run in runs for row in run.rows)
        assert (label if any_seen else f"{label}: never above 0") in texts_of(curves.get_legend())


def test_every_name_is_there(case):
    """As it is, or with question marks for letters that no font has, and different names in
    different words."""
    runs, figure, languages, letters = case
    top = figure.subfigs[0]
    of_languages = texts_of(top.axes[1].get_legend())
    of_runs = texts_of(top.legends[0]) if len(runs) > 1 else []
    finished = [run for run in runs if run.result is not None]
    assert [part.get_suptitle() for part in figure.subfigs[1:]] == [
        letters.of(run.name) if len(runs) > 1 else "" for run in finished
    ]
    for part, run in zip(figure.subfigs[1:], finished, strict=True):
        for axis in part.axes:
            assert [text.get_text() for text in axis.get_xticklabels()] == [
                letters.of(language, drawing.CODE) for language in run.result["languages"]
            ]
    for shown, names in (
        (of_languages, languages),
        (of_runs, [run.name for run in runs] if len(runs) > 1 else []),
    ):
        assert len(set(shown)) == len(shown) == len(names)
        for text, name in zip(shown, names, strict=True):
            text = text.replace("\n", "")
            assert text == name or text.startswith(f"{name} [") or ("?" in text and letters.note)
    for text in figure.findobj(matplotlib.text.Text):
        # matplotlib's own powers of ten are in mathdefault
        assert (
            not text.get_parse_math()
            or "$" not in text.get_text()
            or "mathdefault" in text.get_text()
        )


def test_nothing_lies_on_anything_else(case):
    _, figure, _, _ = case
    renderer = figure.canvas.get_renderer()
    axes = [axis for part in figure.subfigs for axis in part.axes]
    legends = [
        legend
        for part in figure.subfigs
        for legend in (*part.legends, *(axis.get_legend() for axis in part.axes))
        if legend
    ]
    outside = [
        thing.get_window_extent(renderer)
        for thing in (
            *legends,
            *(axis.title for axis in axes),
            *(axis.xaxis.label for axis in axes),
        )
    ]
    outside += [
        part._suptitle.get_window_extent(renderer) for part in figure.subfigs if part.get_suptitle()
    ]
    codes = [
        text for part in figure.subfigs[1:] for axis in part.axes for text in axis.get_xticklabels()
    ]
    outside += [text.get_window_extent(renderer) for text in codes if not text.get_rotation()]
    for one, two in itertools.combinations([box for box in outside if box.width], 2):
        assert not one.overlaps(two), (one, two)
    for box, axis in itertools.product(outside, axes):
        assert not box.overlaps(axis.patch.get_window_extent(renderer).padded(-1)), box
    for axis in axes:
        assert axis.patch.get_window_extent(renderer).height > 200
        assert axis.patch.get_window_extent(renderer).width > 200
        slanted = [text for text in axis.get_xticklabels() if text.get_rotation()]
        places = [text.get_window_extent(renderer).x1 for text in slanted]
        assert all(b - a > 12 for a, b in itertools.pairwise(places))
    whole = figure.bbox.padded(1)
    for box in (*outside, *(axis.get_tightbbox(renderer) for axis in axes)):
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1


def test_letters_come_from_whichever_font_has_them(tmp_path, monkeypatch):
    name = "实验一"
    assert drawing.Letters([name]).of(name) == "???"
    builder = FontBuilder(1000, isTTF=True)
    pen = TTGlyphPen(None)
    for move, point in ((pen.moveTo, (0, 0)), (pen.lineTo, (500, 0)), (pen.lineTo, (500, 700))):
        move(point)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "shape"])
    builder.setupCharacterMap({ord(character): "shape" for character in name})
    builder.setupGlyf(dict.fromkeys((".notdef", "shape"), pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "shape"), (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Three Letters", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "three.ttf")
    monkeypatch.setattr(
        font_manager.fontManager,
        "ttflist",
        [*font_manager.fontManager.ttflist, font_manager.FontEntry(str(tmp_path / "gone.ttf"))],
    )
    font_manager.fontManager.addfont(str(tmp_path / "three.ttf"))
    letters = drawing.Letters([name, "plain"])
    assert letters.of(name) == name
    assert letters.fonts == ["DejaVu Sans", "Three Letters"]
    assert not letters.note
    figure, _, _ = drawn([Run(name, rows(3, ("sw",)), None), Run("plain", rows(3, ("sw",)), None)])
    plt.close(figure)


def run_folder(place, made, finished=None):
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    if finished is not None:
        (place / "result.json").write_text(
            finished if isinstance(finished, str) else json.dumps(finished)
        )
    return place


def test_runs_are_drawn_once_each_under_names_of_their_own(tmp_path, monkeypatch):
    one, two = (
        run_folder(tmp_path / name / "run", rows(3, ("sw",), i), result(("sw",), i))
        for i, name in enumerate("ab")
    )
    seen = []
    monkeypatch.setattr(curves, "draw", lambda runs, path: seen.extend(runs))
    curves.plot_runs([one, two, tmp_path / "b" / ".." / "a" / "run"], tmp_path / "x.png")
    assert [(run.name, run.rows, run.result) for run in seen] == [
        ("a/run", rows(3, ("sw",), 0), result(("sw",), 0)),
        ("b/run", rows(3, ("sw",), 1), result(("sw",), 1)),
    ]


def of_loss(name, made, **changes):
    return [{**row, "loss_name": name, **changes} for row in made]


def test_a_picture_says_which_losses_it_shows(tmp_path, monkeypatch):
    """One number where L2 is none of it; below 0 no logarithm; runs of several losses by name."""
    dpo = [Run("dpo", of_loss("dpo", rows(5, ("sw",)), l2=None), None)]
    kept = [Run("kept", of_loss("own:$x$", rows(5, ("sw",))), None)]
    below = [Run("simper", of_loss("simper", rows(5, ()), l2=None, loss=-0.5), None)]
    mixed = [*dpo, Run("mpo", rows(5, ("sw",)), None)]
    found = {}
    for name, runs in {"dpo": dpo, "kept": kept, "below": below, "mixed": mixed}.items():
        figure, _, _ = drawn(runs)
        axis = figure.subfigs[0].axes[0]
        texts = texts_of(axis.get_legend())
        found[name] = axis.get_title(), axis.get_yscale(), texts, len(axis.get_lines())
        plt.close(figure)
    assert found == {
        "dpo": ("Training loss: dpo", "log", ["loss"], 1),
        "kept": ("Training loss: own:$x$", "log", ["loss", "own:$x$", "L2 (retention)"], 3),
        "below": ("Training loss: simper", "linear", ["loss"], 1),
        "mixed": (
            "Training loss: dpo, mpo",
            "log",
            ["loss", "dpo, L1 (gap)", "L2 (retention)"],
            5,
        ),
    }
    folders = [
        run_folder(tmp_path / name, of_loss(name, rows(2, ("sw",)))) for name in ("ipo", "orpo")
    ]
    seen = []
    monkeypatch.setattr(curves, "draw", lambda runs, path: seen.extend(runs))
    curves.plot_runs(folders, tmp_path / "x.png")
    assert [run.name for run in seen] == ["ipo (ipo)", "orpo (orpo)"]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "PNG"])
def test_a_picture_is_written_whole_in_the_format_of_its_name(tmp_path, ending):
    path = tmp_path / "new" / f"picture.{ending}"
    curves.plot_run(
        run_folder(tmp_path / "$run_", rows(3, ("sw",))) / "metrics.jsonl", result(("sw",)), path
    )
    beginning = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending.lower()]
    assert path.read_bytes().startswith(beginning) and list(path.parent.iterdir()) == [path]


def test_a_finished_run_that_lost_its_metrics_has_a_picture_of_its_result(tmp_path):
    curves.plot_run(tmp_path / "metrics.jsonl", result(("sw",)), tmp_path / "result.png")
    assert (tmp_path / "result.png").is_file()


def test_a_users_own_style_changes_nothing(tmp_path):
    """A matplotlibrc may ask for TeX, which no machine here has, or for a font that does not
    exist."""
    folder = run_folder(tmp_path / "run_1", rows(3, ("sw",)))
    with matplotlib.rc_context(
        {
            "text.usetex": True,
            "font.family": ["No Such Font"],
            "axes.prop_cycle": plt.cycler(color=["white"]),
        }
    ):
        curves.plot_runs([folder], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


DAMAGED = [
    (
        "empty",
        "",
        None,
        "has no metrics.jsonl: it is no run's folder, or its first step is not done",
    ),
    ("no result", None, "7", "holds int, not an object"),
    (
        "half a result",
        None,
        '{"languages": {"sw": {"target_gap": {"before": 1}}}}',
        "holds no result of a run",
    ),
    (
        "words",
        None,
        json.dumps({**NULLS, "all": {"dominant_gap": {"before": "a", "after": 1}}}),
        "holds no result of a run",
    ),
]


@pytest.mark.parametrize(
    ("name", "metrics", "finished", "message"), DAMAGED, ids=[name for name, *_ in DAMAGED]
)
def test_damaged_runs_are_refused(tmp_path, name, metrics, finished, message):
    folder = run_folder(tmp_path / "run", rows(2, ("sw",)), finished)
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    with pytest.raises(UserError, match=message):
        curves.plot_runs([folder], tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_a_name_without_a_format_is_refused_before_anything_is_read(tmp_path):
    for name in ("picture.foo", "picture", "picture."):
        with pytest.raises(
            UserError, match=r"names no format that can be drawn.*\.png, \.svg or \.pdf"
        ):
            curves.plot_runs([tmp_path / "nowhere"], tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        curves.plot_runs(
            [run_folder(tmp_path / "run", rows(2, ("sw",)))], tmp_path / "file" / "picture.png"
        )


def test_numbers_that_are_none_are_not_drawn():
    assert math.isnan(drawing.as_number(None))
    assert math.isnan(drawing.as_number("1"))
    assert drawing.as_number(2) == 2.0
    buffer = io.BytesIO()
    figure, _, _ = drawn(CASES["no number"])
    figure.savefig(buffer)
    plt.close(figure)
    assert buffer.getvalue().startswith(b"\x89PNG")
