"""Reading rows: both formats, every kind of bad row, and files that are none."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import native_rows, write_rows

from mpo.config import DataConfig
from mpo.data import load_rows
from mpo.errors import UserError


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


def published_row(**changes):
    """One row in the published form, about nothing."""
    row = {
        "source_conversations": [{"from": "human", "value": "How do I open the old door without a key?"}],
        "source_chosen": {"from": "gpt", "value": "Ask the owner of the house for a key."},
        "source_rejected": {"from": "gpt", "value": "Just break the window and climb in."},
        "target_conversations": [{"from": "human", "value": "Ninawezaje kufungua mlango wa zamani bila ufunguo wake?"}],
        "target_chosen": {"from": "gpt", "value": "Muombe mwenye nyumba akupe ufunguo."},
        "target_rejected": {"from": "gpt", "value": "Vunja dirisha na uingie ndani."},
    }
    return {**row, **changes}


def test_native_rows(tmp_path):
    rows = native_rows()
    rows[0]["id"] = "kept out of the way"
    path = write_rows(tmp_path / "rows.jsonl", rows)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    loaded, bad = load_rows([str(path)], config())
    assert not bad and len(loaded) == 6
    assert loaded[0].source == "rows.jsonl:1" and loaded[1].source == "rows.jsonl:3"
    assert (loaded[0].language, loaded[1].language) == ("sw", "zh")
    assert loaded[0].dominant == loaded[1].dominant and hash(loaded[0].dominant) == hash(loaded[1].dominant)
    assert loaded[2].target.conversation() == [{"role": "user", "content": "sw question number 1?"}]


def test_published_rows_get_a_language_and_lose_their_entities(tmp_path):
    row = published_row(target_chosen={"from": "gpt", "value": "Sema &quot;hapana&quot; &amp; uende."})
    path = tmp_path / "published.json"
    path.write_text(json.dumps([row, published_row()]), encoding="utf-8")
    loaded, bad = load_rows([str(path)], config())
    assert not bad and [r.language for r in loaded] == ["sw", "sw"]
    assert loaded[0].target.chosen == 'Sema "hapana" & uende.' and loaded[0].source == "published.json[0]"
    assert [m.role for m in loaded[0].dominant.prompt] == ["user"]


def broken(change):
    row = copy.deepcopy(native_rows(1, ("sw",))[0])
    change(row)
    return row


BAD = [
    ("missing_field", "has no 'target'", lambda r: r.pop("target")),
    ("missing_field", "has no 'language'", lambda r: r.pop("language")),
    ("missing_field", "has no 'dominant.chosen'", lambda r: r["dominant"].pop("chosen")),
    ("wrong_type", "target.chosen", lambda r: r["target"].update(chosen=3)),
    ("wrong_type", "target.prompt", lambda r: r["target"].update(prompt="a string")),
    ("wrong_type", "dominant.prompt.0.role", lambda r: r["dominant"]["prompt"][0].update(role="robot")),
    ("empty_language", "language is empty", lambda r: r.update(language=" ")),
    ("empty_prompt", "the target prompt is empty", lambda r: r["target"].update(prompt=[])),
    ("empty_prompt", "the dominant prompt is empty", lambda r: r["dominant"]["prompt"][0].update(content=" \n")),
    (
        "prompt_not_ending_with_user",
        "ends with a assistant message",
        lambda r: r["target"]["prompt"].append({"role": "assistant", "content": "hm"}),
    ),
    ("empty_chosen", "the dominant chosen answer is empty", lambda r: r["dominant"].update(chosen="")),
    ("empty_rejected", "the target rejected answer is empty", lambda r: r["target"].update(rejected="\t ")),
    ("chosen_equals_rejected", "the target pair has no gap", lambda r: r["target"].update(chosen=r["target"]["rejected"] + " ")),
]


@pytest.mark.parametrize(("reason", "detail", "change"), BAD, ids=[f"{r}-{d[:25]}" for r, d, _ in BAD])
def test_bad_rows_are_refused_or_dropped_with_their_place_and_reason(tmp_path, reason, detail, change):
    path = write_rows(tmp_path / "rows.jsonl", [native_rows(1, ("zh",))[0], broken(change)])
    with pytest.raises(UserError) as error:
        load_rows([str(path)], config())
    assert f"rows.jsonl:2: {reason}: " in str(error.value) and detail in str(error.value)
    assert "1 of 2 rows" in str(error.value) and "data.on_bad_row=drop" in str(error.value)
    rows, bad = load_rows([str(path)], config(on_bad_row="drop"))
    assert len(rows) == 1 and [(b.source, b.reason) for b in bad] == [("rows.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (published_row(target_chosen={"from": "gpt"}), "missing_field"),
        ({k: v for k, v in published_row().items() if k != "source_rejected"}, "missing_field"),
        (published_row(target_conversations=[{"from": "ghost", "value": "x"}]), "missing_field"),
        (published_row(target_conversations=[]), "empty_prompt"),
        (published_row(source_chosen={"from": "gpt", "value": None}), "wrong_type"),
        (published_row(**{k.replace("source", "target"): v for k, v in published_row().items() if "source" in k}), "target_untranslated"),
        ("a string", "not_an_object"),
    ],
)
def test_bad_published_rows(tmp_path, row, reason):
    path = tmp_path / "published.json"
    path.write_text(json.dumps([published_row(), row]), encoding="utf-8")
    _, bad = load_rows([str(path)], config(on_bad_row="drop"))
    assert [b.reason for b in bad] == [reason]


def test_many_bad_rows_are_counted_and_the_first_listed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [broken(lambda r: r.pop("target"))] * 15 + native_rows())
    with pytest.raises(UserError, match=r"15 of 21 rows cannot be trained on \(15 missing_field\)") as error:
        load_rows([str(path)], config())
    assert str(error.value).count("missing_field:") == 10 and "and 5 more" in str(error.value)


def test_nothing_left_is_an_error_even_when_dropping(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [broken(lambda r: r.pop("target"))])
    with pytest.raises(UserError, match="No usable row is left"):
        load_rows([str(path)], config(on_bad_row="drop"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"a": 1}\n{"b": \n', "line 2, column 7: no valid JSON"),
        (b"[1, 2", "line 1, column 6: no valid JSON"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows([str(path)], config())
    assert message in str(error.value) and str(path) in str(error.value)


def test_missing_file_and_unknown_language(tmp_path):
    with pytest.raises(UserError, match="No data file at nowhere"):
        load_rows(["nowhere.jsonl"], config())
    path = tmp_path / "published.json"
    path.write_text(json.dumps([published_row()]), encoding="utf-8")
    with pytest.raises(UserError, match="Unknown language code"):
        load_rows([str(path)], config(languages=("klingon",)))


@given(st.text(min_size=1).filter(lambda s: s.strip()), st.sampled_from(["\u2028", "\x85", "\x1c", ""]))
def test_any_text_survives_the_file(tmp_path_factory, text, separator):
    row = native_rows(1, ("sw",))[0]
    row["target"]["chosen"] = text + separator + "x"
    row["target"]["rejected"] = "y"
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    if not any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        loaded, _ = load_rows([str(write_rows(path, [row]))], config())
        assert loaded[0].target.chosen == text + separator + "x"


def test_parquet_and_dataset_folders_hold_the_same_rows(tmp_path):
    import datasets

    rows = native_rows()
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "folder")
    expected, _ = load_rows([str(write_rows(tmp_path / "rows.jsonl", rows))], config())
    for name in ("rows.parquet", "folder"):
        loaded, bad = load_rows([str(tmp_path / name)], config())
        assert not bad and [(r.language, r.dominant, r.target) for r in loaded] == [(r.language, r.dominant, r.target) for r in expected]
        assert loaded[2].source == f"{name}[2]"


def test_sources_that_cannot_be_read_are_named(tmp_path):
    import datasets

    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(native_rows())}).save_to_disk(tmp_path / "splits")
    for name, message in (
        ("bad.parquet", "no readable Parquet file"),
        ("empty", "cannot be read"),
        ("splits", "holds several splits: train"),
        ("gone.parquet", "No data file"),
    ):
        with pytest.raises(UserError, match=message):
            load_rows([str(tmp_path / name)], config())


@pytest.mark.parametrize(("weight", "count"), [(1, 10), (2, 20), (0.5, 5), (1.3, 13), (0.01, 0)])
def test_weights_repeat_or_thin_rows_evenly(tmp_path, weight, count):
    rows = native_rows(dominants=5)
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    other = str(write_rows(tmp_path / "other.jsonl", rows))
    loaded, _ = load_rows([path, other], config(), (weight, 1))
    assert [r.source.split(":")[0] for r in loaded] == ["rows.jsonl"] * count + ["other.jsonl"] * 10
    counts = [sum(r.source == f"rows.jsonl:{i + 1}" for r in loaded) for i in range(10)]
    assert max(counts) - min(counts) <= 1


def test_weights_fit_the_sources():
    with pytest.raises(ValueError, match="2 numbers for 1 sources"):
        config(weights=(1, 2))
    with pytest.raises(ValueError, match="above 0"):
        config(weights=(0,))
