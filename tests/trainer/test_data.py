"""Rows of both formats, and every kind of bad row."""

import copy
import json
import os

import pytest
from anything import VALUES, changed, places
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import native_rows, published_row, write_rows

from mpo.config import DataConfig
from mpo.data.sources import labels_of, load_rows
from mpo.runtime.errors import UserError


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


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
