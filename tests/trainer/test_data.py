"""Reading rows: both formats, every kind of bad row, and files that are none."""

import bz2
import copy
import gzip
import json
import lzma
import os

import pytest
from anything import VALUES, changed, places
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import native_rows, write_rows

from mpo.config import DataConfig
from mpo.data.sources import COLUMNS, labels_of, load_rows, objects
from mpo.runtime.errors import UserError


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


def published_row(**changes):
    """One row in the published form, about nothing."""
    row = {
        "source_conversations": [
            {"from": "human", "value": "How do I open the old door without a key?"}
        ],
        "source_chosen": {"from": "gpt", "value": "Ask the owner of the house for a key."},
        "source_rejected": {"from": "gpt", "value": "Just break the window and climb in."},
        "target_conversations": [
            {"from": "human", "value": "Ninawezaje kufungua mlango wa zamani bila ufunguo wake?"}
        ],
        "target_chosen": {"from": "gpt", "value": "Muombe mwenye nyumba akupe ufunguo."},
        "target_rejected": {"from": "gpt", "value": "Vunja dirisha na uingie ndani."},
    }
    return {**row, **changes}


def test_native_rows(tmp_path):
    rows = native_rows()
    rows[0]["id"] = "kept out of the way"
    path = write_rows(tmp_path / "rows.jsonl", rows)
    path.write_text(
        "\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8"
    )
    loaded, bad = load_rows([str(path)], config())
    assert not bad and len(loaded) == 6
    assert loaded[0].source == "rows.jsonl:1" and loaded[1].source == "rows.jsonl:3"
    assert (loaded[0].language, loaded[1].language) == ("sw", "zh")
    assert loaded[0].dominant == loaded[1].dominant
    assert hash(loaded[0].dominant) == hash(loaded[1].dominant)
    assert loaded[2].target.conversation() == [{"role": "user", "content": "sw question number 1?"}]


def test_published_rows_get_a_language_and_lose_their_entities(tmp_path):
    row = published_row(
        target_chosen={"from": "gpt", "value": "Sema &quot;hapana&quot; &amp; uende."}
    )
    path = tmp_path / "published.json"
    path.write_text(json.dumps([row, published_row()]), encoding="utf-8")
    loaded, bad = load_rows([str(path)], config())
    assert not bad and [r.language for r in loaded] == ["sw", "sw"]
    assert loaded[0].target.chosen == 'Sema "hapana" & uende.'
    assert loaded[0].source == "published.json[0]"
    assert [m.role for m in loaded[0].dominant.prompt] == ["user"]


def test_entities_are_put_right_in_every_text_of_a_published_row(tmp_path):
    """Each text holds a mark of its own, so that none is passed over."""
    row = published_row()
    places = [(row[f"{side}_conversations"][0], f"{side} prompt") for side in ("source", "target")]
    places += [
        (row[f"{side}_{kind}"], f"{side} {kind}")
        for side in ("source", "target")
        for kind in ("chosen", "rejected")
    ]
    for turn, mark in places:
        turn["value"] += f" &lt;{mark}&gt; &quot;&amp;&#39;"
    path = tmp_path / "published.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (loaded,), _ = load_rows([str(path)], config())
    read = [*loaded.dominant.texts(), *loaded.target.texts()]
    wanted = [
        f"{side} {part}"
        for side in ("source", "target")
        for part in ("prompt", "chosen", "rejected")
    ]
    assert [text.endswith(f" <{mark}> \"&'") for text, mark in zip(read, wanted, strict=True)] == [
        True
    ] * 6


def broken(change):
    row = copy.deepcopy(native_rows(1, ("sw",))[0])
    change(row)
    return row


def in_chinese(side):
    def change(row):
        row[side] = {
            "prompt": [{"role": "user", "content": "没有钥匙怎么开门？"}],
            "chosen": "请问房主。",
            "rejected": "打破窗户。",
        }

    return change


BAD = [
    ("missing_field", "has no 'target'", lambda r: r.pop("target")),
    ("missing_field", "has no 'language'", lambda r: r.pop("language")),
    ("missing_field", "has no 'dominant.chosen'", lambda r: r["dominant"].pop("chosen")),
    ("wrong_type", "target.chosen", lambda r: r["target"].update(chosen=3)),
    ("wrong_type", "target.prompt", lambda r: r["target"].update(prompt="a string")),
    (
        "wrong_type",
        "dominant.prompt.0.role",
        lambda r: r["dominant"]["prompt"][0].update(role="robot"),
    ),
    ("empty_language", "language is empty", lambda r: r.update(language=" ")),
    ("empty_prompt", "the target prompt is empty", lambda r: r["target"].update(prompt=[])),
    (
        "empty_prompt",
        "the dominant prompt is empty",
        lambda r: r["dominant"]["prompt"][0].update(content=" \n"),
    ),
    (
        "prompt_not_ending_with_user",
        "ends with a assistant message",
        lambda r: r["target"]["prompt"].append({"role": "assistant", "content": "hm"}),
    ),
    (
        "empty_chosen",
        "the dominant chosen answer is empty",
        lambda r: r["dominant"].update(chosen=""),
    ),
    (
        "empty_rejected",
        "the target rejected answer is empty",
        lambda r: r["target"].update(rejected="\t "),
    ),
    (
        "not_unicode",
        "the target pair holds half of a surrogate pair",
        lambda r: r["target"].update(chosen="no \ud83d"),
    ),
    (
        "not_unicode",
        "the dominant pair holds half of a surrogate pair",
        lambda r: r["dominant"]["prompt"][0].update(content="\udc00"),
    ),
    (
        "not_unicode",
        "language holds half of a surrogate pair",
        lambda r: r.update(language="s\ud800"),
    ),
    ("target_untranslated", "the dominant language, en", lambda r: r.update(language="eng_Latn")),
    (
        "wrong_dominant_language",
        "0% of the letters of the dominant texts are of the script of en",
        in_chinese("dominant"),
    ),
    ("wrong_type", "dominant: ", lambda r: r.update(dominant=None)),
    ("wrong_type", "target: ", lambda r: r.update(target=["prompt", "chosen", "rejected"])),
    ("wrong_type", "language: ", lambda r: r.update(language=False)),
    (
        "chosen_equals_rejected",
        "the target pair has no gap",
        lambda r: r["target"].update(chosen=r["target"]["rejected"] + " "),
    ),
]


@pytest.mark.parametrize(
    ("reason", "detail", "change"), BAD, ids=[f"{r}-{d[:25]}" for r, d, _ in BAD]
)
def test_bad_rows_are_refused_or_dropped_with_their_place_and_reason(
    tmp_path, reason, detail, change
):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [native_rows(1, ("zh",))[0], broken(change)])
    )
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
        (
            published_row(
                **{
                    k.replace("source", "target"): v
                    for k, v in published_row().items()
                    if "source" in k
                }
            ),
            "target_untranslated",
        ),
        ("a string", "not_an_object"),
        (
            published_row(target_rejected={"from": "gpt", "value": "Vunja \ud83d dirisha."}),
            "not_unicode",
        ),
        (published_row(target_conversations=[{"from": "human", "value": " "}]), "empty_prompt"),
    ],
)
def test_bad_published_rows(tmp_path, row, reason):
    path = tmp_path / "published.json"
    path.write_text(json.dumps([published_row(), row]), encoding="utf-8")
    _, bad = load_rows([str(path)], config(on_bad_row="drop"))
    assert [b.reason for b in bad] == [reason]


def test_many_bad_rows_are_counted_and_the_first_listed(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [broken(lambda r: r.pop("target"))] * 15 + native_rows()
    )
    with pytest.raises(
        UserError, match=r"15 of 21 rows cannot be trained on \(15 missing_field\)"
    ) as error:
        load_rows([str(path)], config())
    assert str(error.value).count("missing_field:") == 10 and "and 5 more" in str(error.value)


def test_nothing_left_is_an_error_even_when_dropping(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [broken(lambda r: r.pop("target"))])
    with pytest.raises(UserError, match="No usable row is left"):
        load_rows([str(path)], config(on_bad_row="drop"))


ROW = json.dumps(native_rows(1, ("sw",))[0]).encode()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows", "rows.JSON.gz", "rows.parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b'{"a": 1}\n{"b": \n', "line 2, column 7: no valid JSON"),
        (b"[1, 2", "line 1, column 6: no valid JSON"),
        (b"[1,\n 2 3]", "line 2, column 4: no valid JSON"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"<html><body>404</body></html>", "line 1, column 1: no valid JSON"),
        (b"[" * 100_000, "no valid JSON of rows (it is nested too deeply)"),
        (
            ROW + b"\n" + b'{"a":' * 100_000,
            "line 2: no valid JSON of rows (it is nested too deeply)",
        ),
        (ROW + b'\n{"id": ' + b"9" * 5000 + b"}", "line 2: no valid JSON (Exceeds the limit"),
        (b"[{}, " + b"9" * 5000 + b"]", "no valid JSON (Exceeds the limit"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a pointer of Git LFS, not the file itself",
        ),
        (gzip.compress(ROW)[:-9], "cannot be read: "),
        (gzip.compress(ROW)[:20] + b"\0" * 20, "cannot be read: "),
        (gzip.compress(b""), "is empty"),
        (bz2.compress(ROW)[:-4], "cannot be read: "),
        (lzma.compress(ROW)[:-4], "cannot be read: "),
        (b"PK\x03\x04 and so on", "is packed (zip). Unpack it"),
        (b"\x28\xb5\x2f\xfd and so on", "is packed (zstd). Unpack it"),
        (b"PAR1 and so on", "is no readable Parquet file"),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_unreadable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows([str(path)], config())
    if name == "rows.parquet" and content[:1] in (b"\xff", b"<"):
        message = "is no readable Parquet file"
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl",
        "rows.jsonl.gz",
        "ROWS.JSONL.GZ",
        "rows.bz2",
        "rows.PARQUET",
        "rows.Parquet",
        "rows",
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "list", "parquet", "gzip", "bzip2", "xz"])
def test_a_file_is_what_it_holds_whatever_it_is_called(tmp_path, name, kind):
    import pyarrow
    import pyarrow.parquet

    rows = native_rows()
    path = tmp_path / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        packers = {
            "gzip": gzip.compress,
            "bzip2": bz2.compress,
            "xz": lzma.compress,
            "list": lambda _: json.dumps(rows).encode(),
        }
        path.write_bytes(packers.get(kind, bytes)(lines))
    loaded, bad = load_rows([str(path)], config())
    assert not bad and [row.language for row in loaded] == [row["language"] for row in rows]
    assert [row.target.chosen for row in loaded] == [row["target"]["chosen"] for row in rows]


def test_missing_file_and_unknown_language(tmp_path):
    with pytest.raises(UserError, match="No data file at nowhere"):
        load_rows(["nowhere.jsonl"], config())
    path = tmp_path / "published.json"
    path.write_text(json.dumps([published_row()]), encoding="utf-8")
    with pytest.raises(UserError, match="Unknown language code"):
        load_rows([str(path)], config(languages=("klingon",)))


@given(
    st.text(min_size=1).filter(lambda s: s.strip()), st.sampled_from(["\u2028", "\x85", "\x1c", ""])
)
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
        assert not bad
        assert [(r.language, r.dominant, r.target) for r in loaded] == [
            (r.language, r.dominant, r.target) for r in expected
        ]
        assert loaded[2].source == f"{name}[2]"


def test_sources_that_cannot_be_read_are_named(tmp_path):
    import datasets

    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(native_rows())}).save_to_disk(
        tmp_path / "splits"
    )
    for name, message in (
        ("bad.parquet", "no readable Parquet file"),
        ("empty", "cannot be read"),
        ("splits", "holds several splits: train"),
        ("gone.parquet", "No data file"),
    ):
        with pytest.raises(UserError, match=message):
            load_rows([str(tmp_path / name)], config())


@pytest.mark.parametrize(
    ("weight", "count"),
    [(1, 10), (2, 20), (0.5, 5), (1.3, 13), (0.01, 0), (2.15, 22), (0.35, 4), (0.25, 2)],
)
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


# Which file a row is from


@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_a_label_is_the_shortest_end_of_a_path_that_no_other_file_has(paths, absolute):
    names = [os.path.abspath(f"/{path}.jsonl") if absolute else f"{path}.jsonl" for path in paths]
    labels = labels_of([*names, *(f"./{name}" for name in names if not absolute)])
    for name in names:
        mine = os.path.abspath(name)
        others = {os.path.abspath(other) for other in names} - {mine}
        assert f"/{mine}".endswith(f"/{labels[name]}")
        assert not any(other.endswith(f"/{labels[name]}") for other in others)
        shorter = labels[name].partition("/")[2]
        assert not shorter or any(other.endswith(f"/{shorter}") for other in others)
        assert absolute or labels[f"./{name}"] == labels[name]


def test_rows_of_files_of_one_name_keep_their_places(tmp_path):
    """Files and folders, in training and in evaluation; what is repeated across them is seen."""
    rows = native_rows()
    for name in ("a", "b", "b/c"):
        (tmp_path / name).mkdir(exist_ok=True)
    a, b = (str(write_rows(tmp_path / name / "rows.jsonl", rows)) for name in "ab")
    c = str(write_rows(tmp_path / "b/c/rows.jsonl", [broken(lambda r: r.pop("target")), *rows]))
    loaded, _ = load_rows([a, b], DataConfig(train=(a, b), eval=(c,)))
    assert [row.source for row in loaded] == [
        f"{name}/rows.jsonl:{i + 1}" for name in "ab" for i in range(6)
    ]
    with pytest.raises(UserError, match=r"\n  c/rows.jsonl:1: missing_field"):
        load_rows([c], DataConfig(train=(a, b), eval=(c,)))
    assert labels_of(["hf:one/set:train[:10]", "hf:two/set:train[:10]", "hf:two/set:test"]) == {
        "hf:one/set:train[:10]": "hf:one/set:train[:10]",
        "hf:two/set:train[:10]": "hf:two/set:train[:10]",
        "hf:two/set:test": "set:test",
    }


# Tables and their other columns


def side_columns(count):
    """Columns that rows are not made of, each of which cannot become a Python value, or not as it
    is."""
    import pyarrow

    return {
        "when": pyarrow.array([2**62] * count, pyarrow.timestamp("ns")),
        "long_ago": pyarrow.array([-(2**40)] * count, pyarrow.timestamp("s")),
        "day": pyarrow.array([2**30] * count, pyarrow.date32()),
        "bytes": pyarrow.array([b"\xff\xfe"] * count),
        "no_text": pyarrow.Array.from_buffers(
            pyarrow.string(),
            count,
            [
                None,
                pyarrow.array([0, *range(1, count + 1)], pyarrow.int32()).buffers()[1],
                pyarrow.py_buffer(b"\xff" * count),
            ],
        ),
        "nothing": pyarrow.nulls(count),
    }


@pytest.mark.parametrize("name", ["when", "long_ago", "day", "bytes", "no_text", "nothing", "all"])
def test_other_columns_of_a_table_do_not_matter(tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    rows = native_rows()
    table = pyarrow.Table.from_pylist(rows)
    for column, values in side_columns(len(rows)).items():
        if name in (column, "all"):
            table = table.append_column(column, values)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    loaded, bad = load_rows([str(tmp_path / "rows.parquet")], config())
    assert not bad
    assert [row.target.chosen for row in loaded] == [row["target"]["chosen"] for row in rows]


@pytest.mark.parametrize("column", ["language", "dominant", "target"])
@pytest.mark.parametrize(
    "kind",
    [
        "when",
        "long_ago",
        "day",
        "bytes",
        "no_text",
        "nothing",
        "missing",
        "json",
        "numbers",
        "other_fields",
    ],
)
@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_columns_of_rows_that_are_none_are_bad_rows_or_refused_with_the_file(
    tmp_path, column, kind, form
):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = native_rows()
    table = pyarrow.Table.from_pylist(rows).drop_columns([column])
    own = {
        "json": pyarrow.array([json.dumps(rows[0]["target"])] * len(rows)),
        "numbers": pyarrow.array(range(len(rows))),
        "other_fields": pyarrow.array([{"prompt": "x", "chosen": None}] * len(rows)),
        **side_columns(len(rows)),
    }
    if kind != "missing":
        table = table.append_column(column, own[kind])
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        try:
            datasets.Dataset(table).save_to_disk(path)
        except Exception:
            pytest.skip("such a folder cannot be made")
    if (column, kind) == ("language", "json"):
        assert len(load_rows([str(path)], config())[0]) == len(rows)  # any text is a name
        return
    with pytest.raises(UserError, match=f"rows.{form}"):
        load_rows([str(path)], config())


def test_tables_without_a_column_of_rows_or_with_one_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array(["x"])
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": text, "answer": text}), tmp_path / "other.parquet"
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([text] * 2, names=["language"] * 2), tmp_path / "twice.parquet"
    )
    for name, message in (
        ("other", r"has no column of rows \(language, .*; it has prompt, answer"),
        ("twice", "has the column 'language' twice"),
    ):
        with pytest.raises(UserError, match=message):
            load_rows([str(tmp_path / f"{name}.parquet")], config())


@pytest.mark.parametrize(
    "name", ["hf:a/b", "hf:a/b:train", "hf:a/b:train[:10]", "hf:a/b:train[10:20]+test"]
)
def test_splits_of_the_hub_are_given_as_they_are(monkeypatch, name):
    import datasets

    asked = []

    def load(repository, split):
        asked.append((repository, split))
        return datasets.Dataset.from_list(native_rows())

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(objects(name, "b", COLUMNS))
    assert asked == [("a/b", name.removeprefix("hf:a/b").removeprefix(":") or "train")]
    assert rows[1][0] == "b[1]"
    assert len(rows) == 6
    for none in ("hf:", "hf::train"):
        with pytest.raises(UserError, match="names no dataset"):
            list(objects(none, "b", COLUMNS))


def test_one_language_has_one_name_whichever_a_row_gives_it(tmp_path):
    forms = [
        "zh",
        "ZH",
        "zh-CN",
        "zh_Hans_CN",
        "zho_Hans",
        "Chinese",
        "cmn",
        "zh-TW",
        "Zho_Hant",
        "tlh",
        "TLH",
    ]
    rows = [{**native_rows(1, ("zh",))[0], "language": form} for form in forms]
    loaded, _ = load_rows([str(write_rows(tmp_path / "rows.jsonl", rows))], config())
    assert [row.language for row in loaded] == ["zh"] * 7 + ["zh-Hant"] * 2 + ["tlh"] * 2


def test_a_language_that_was_not_offered_is_a_bad_row(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps([published_row()]), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=(
            r"language_not_offered: the target texts are in sw, which data.languages does not name"
        ),
    ):
        load_rows([str(path)], config(languages=("zh",)))
    assert load_rows([str(path)], config(languages=("zh", "swh_Latn")))[0][0].language == "sw"


# Anything at all


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_value_at_any_place_of_a_row_is_read_or_a_bad_row_with_its_place(
    tmp_path_factory, data
):
    good = native_rows(1, ("sw",))[0]
    row = data.draw(st.sampled_from([good, published_row()]))
    odd = changed(row, data.draw(st.sampled_from(list(places(row)))), data.draw(VALUES))
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(odd))
    if path.read_text().endswith("\n"):
        return
    rows, bad = load_rows([str(path)], config(on_bad_row="drop"))
    assert [row.source for row in [*rows, *bad]] == ["rows.jsonl:1", "rows.jsonl:2"]
    json.dumps(
        [row.language for row in rows] + [f"{row.reason} {row.detail}" for row in bad],
        ensure_ascii=False,
    ).encode()


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"PAR1", b"[", b"{", b"\xef\xbb\xbf"]
    ),
    st.sampled_from(["x.jsonl", "x.parquet"]),
)
def test_any_bytes_are_refused_with_the_name_of_the_file(
    tmp_path_factory, content, beginning, name
):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(beginning + content)
    with pytest.raises(UserError, match=name):
        load_rows([str(path)], config())


def test_every_beginning_of_a_file_is_refused_or_read(tmp_path):
    """A download that was cut short, of each kind: whole rows or a message, never half a row."""
    import pyarrow
    import pyarrow.parquet

    rows = native_rows()
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole")
    text = "\n".join(lines).encode()
    for kind, whole in (
        ("lines", text),
        ("list", json.dumps(rows).encode()),
        ("gzip", gzip.compress(text)),
        ("table", (tmp_path / "whole").read_bytes()),
    ):
        for size in range(0, len(whole), max(1, len(whole) // 60)):
            (tmp_path / "rows").write_bytes(whole[:size])
            try:
                loaded, _ = load_rows([str(tmp_path / "rows")], config())
            except UserError:
                continue
            assert kind == "lines"
            assert [row.target.chosen for row in loaded] == [
                row["target"]["chosen"] for row in rows[: len(loaded)]
            ]
            assert size in (
                sum(len(line.encode()) + 1 for line in lines[: len(loaded)]),
                sum(len(line.encode()) + 1 for line in lines[: len(loaded)]) - 1,
            )
