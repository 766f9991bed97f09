"""Files, tables and data sets that hold rows, whatever they are called, and those that do not."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import native_rows, published_row, write_rows

from mpo.config import DataConfig
from mpo.data.sources import COLUMNS, load_rows, objects
from mpo.runtime.errors import UserError
from mpo.runtime.files import BadLine, json_lines


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


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


@pytest.mark.parametrize("encoded", [False, True])
def test_lines_of_a_jsonl_file_say_where_they_lie(encoded):
    """Only a line feed ends one; a bad one is known with its place."""
    text = '{"a": "\u2028\u0085"}\r\n \n[1]\n{"cut'
    content = text.encode() if encoded else text
    lines = []
    with pytest.raises(BadLine) as error:
        for line in json_lines(content):
            lines.append(line)
    assert [(line.number, line.value) for line in lines] == [(1, {"a": "\u2028\u0085"}), (3, [1])]
    for line, part in zip([*lines, error.value.line], ('{"a"', "[1]", '{"cut'), strict=True):
        assert content[line.begin : line.end].startswith(part.encode() if encoded else part)
    assert error.value.line.number == 4
    assert error.value.line.end == len(content)
