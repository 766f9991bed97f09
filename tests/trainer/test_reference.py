"""The reference store on disk, the step-0 self-check, and scoring."""

import errno
import json
import os
import re
import shutil
from datetime import datetime

import pytest
import torch
from conftest import TEMPLATES, make_tokenizer
from safetensors.torch import load_file, save_file
from test_train import project, run  # noqa: F401  (project is a fixture)
from tiny import build_model, example_of, save_model

from mpo.config import ModelConfig
from mpo.data.examples import TokenizedResponse
from mpo.models.forward import SequenceScores
from mpo.models.loading import load_tokenizer
from mpo.runtime import claims
from mpo.runtime.claims import Claim
from mpo.runtime.errors import UserError
from mpo.training import reference
from mpo.training.reference import ReferenceStore

dominants = reference.dominant_sequences


def example(i=0):
    responses = [TokenizedResponse((1, 2, 3 + i, 4 + k), 2) for k in range(4)]
    return example_of(f"rows:{i}", "sw", *responses)


def store_of(examples):
    sequences = reference.dominant_sequences(examples)
    scores = SequenceScores(torch.arange(len(sequences)).float(), torch.randn(len(sequences), 5))
    return ReferenceStore({s: i for i, s in enumerate(sequences)}, scores)


def test_round_trip(tmp_path):
    examples = [example(0), example(1), example(0)]
    store = store_of(examples)
    assert len(store.rows) == 4  # two distinct dominant pairs
    manifest = {"format": 1, "weights": "abc"}
    assert ReferenceStore.load(tmp_path / "reference", manifest, dominants(examples)) is None
    store.save(tmp_path / "reference", manifest)
    loaded = ReferenceStore.load(tmp_path / "reference", manifest, dominants(examples))
    assert loaded.gap(examples[1]) == store.gap(examples[1]) == -1.0
    assert torch.equal(
        loaded.pooled(examples[1].dominant.rejected), store.pooled(examples[1].dominant.rejected)
    )


def test_a_store_of_something_else_is_refused_with_what_differs(tmp_path):
    store_of([example()]).save(
        tmp_path / "reference",
        {"format": 1, "weights": "abc", "dtype": "float32"},
    )
    with pytest.raises(UserError, match=r"dtype: float32 stored, bfloat16 now.*delete"):
        ReferenceStore.load(
            tmp_path / "reference",
            {"format": 1, "weights": "abc", "dtype": "bfloat16"},
            dominants([example()]),
        )
    (tmp_path / "reference" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ReferenceStore.load(tmp_path / "reference", {"format": 1}, dominants([example()]))


def test_an_interrupted_save_leaves_no_store(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(reference, "write_json", full)
    with pytest.raises(UserError, match="reference cannot be written: No space"):
        store_of([example()]).save(tmp_path / "reference", {})
    assert not list(tmp_path.iterdir())


def rows_of_four():
    return [
        example_of(f"rows:{i}", "sw", *(TokenizedResponse((1, 2, 10 * i + k), 2) for k in range(4)))
        for i in range(4)
    ]


class SmallScorer:
    """Its scores are the last token ids. It notes how many it gives, and may fail, or do something
    else first, at a call."""

    def __init__(self, calls, fails_at=None, adds=0, first=lambda calls: None):
        self._calls, self._fails_at, self._adds, self._first = calls, fails_at, adds, first

    def scores(self, sequences, advance, pools):
        self._first(self._calls)
        self._calls.append(len(sequences))
        if self._fails_at == len(self._calls):
            raise KeyboardInterrupt
        ids = torch.tensor([float(s.input_ids[-1]) for s in sequences]) + self._adds
        return SequenceScores(ids, ids[:, None].clone() if pools else ids.new_zeros(len(ids), 0))


@pytest.fixture
def builder(monkeypatch):
    """Builds a store of four pieces of two sequences, whose values are a number and the last token
    id. Yields (build, sizes scored)."""
    monkeypatch.setattr(reference, "on_main", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(reference, "PART", 2)
    monkeypatch.setattr(reference, "PATIENCE", 0.01)
    calls = []

    def build(folder, manifest, log=lambda line: None, date=None, **scorer):
        examples = rows_of_four()
        scorer = SmallScorer(calls, **scorer)
        sequences = dominants(examples)

        def values(parts):
            return reference.build(
                scorer, sequences, examples, parts, lambda count: None, pools=True
            )

        return ReferenceStore.open(folder, manifest, sequences, date, values, log)

    return build, calls


MANIFEST = {"format": 2, "weights": "abc"}


def interrupted(builder, folder):
    """A build that ended in its third piece."""
    build, calls = builder
    with pytest.raises(KeyboardInterrupt):
        build(folder, MANIFEST, fails_at=3)
    assert not folder.exists()
    calls.clear()


def test_an_interrupted_store_goes_on(builder, tmp_path):
    build, calls = builder
    interrupted(builder, tmp_path / "store")
    store = build(tmp_path / "store", MANIFEST)
    assert calls == [2, 2]
    assert [store.gap(e) for e in rows_of_four()] == [-1.0] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".store.lock", "store"]
    calls.clear()
    assert (
        torch.equal(build(tmp_path / "store", MANIFEST).scores.pooled, store.scores.pooled)
        and calls == []
    )


@pytest.mark.parametrize(
    "other",
    [{"format": 2, "weights": "abd"}, {"format": 3, "weights": "abc"}, {**MANIFEST, "pool": "all"}],
)
def test_finished_parts_of_another_store_are_not_used(builder, tmp_path, other):
    """Same sequences, another model: everything is scored again, and the values are the other
    model's."""
    build, calls = builder
    interrupted(builder, tmp_path / "store")
    store = build(tmp_path / "store", other, adds=1000)
    assert calls == [2, 2, 2, 2]
    assert float(store.scores.mean_logp.min()) >= 1000


PART_FAULTS = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "of another kind": lambda path: path.write_text("{}"),
    "of other sequences": lambda path: save_file(
        {"mean_logp": torch.zeros(3), "pooled": torch.zeros(3, 1)}, path
    ),
    "of other tensors": lambda path: save_file({"loss": torch.zeros(2)}, path),
    "not finite": lambda path: save_file(
        {"mean_logp": torch.full((2,), torch.nan), "pooled": torch.zeros(2, 1)}, path
    ),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", PART_FAULTS)
def test_a_damaged_part_is_computed_again(builder, tmp_path, fault):
    build, calls = builder
    whole = build(tmp_path / "whole", MANIFEST).scores
    calls.clear()
    interrupted(builder, tmp_path / "store")
    PART_FAULTS[fault](tmp_path / ".store.parts" / "00001.safetensors")
    if fault == "a folder":  # nothing can take its place, which is said
        with pytest.raises(UserError, match=r"00001.safetensors cannot be written"):
            build(tmp_path / "store", MANIFEST)
        return
    assert torch.equal(
        build(tmp_path / "store", MANIFEST).scores.mean_logp, whole.mean_logp
    ) and calls == [2, 2, 2]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, None])
def test_parts_whose_manifest_is_damaged_are_not_used(builder, tmp_path, content):
    build, calls = builder
    interrupted(builder, tmp_path / "store")
    manifest = tmp_path / ".store.parts" / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    build(tmp_path / "store", MANIFEST)
    assert calls == [2, 2, 2, 2]


STORE_FAULTS = [
    ("values.safetensors", None, "is damaged: values.safetensors cannot be read"),
    ("values.safetensors", b"", "is damaged: values.safetensors cannot be read"),
    ("values.safetensors", b"half", "is damaged: values.safetensors cannot be read"),
    (
        "values.safetensors",
        {"mean_logp": torch.zeros(8), "pooled": torch.zeros(8)},
        "does not hold the values of 8 sequences",
    ),
    (
        "values.safetensors",
        {"mean_logp": torch.zeros(7), "pooled": torch.zeros(7, 1)},
        "does not hold the values of 8 sequences",
    ),
    (
        "values.safetensors",
        {"mean_logp": torch.zeros(8), "pooled": torch.full((8, 1), torch.inf)},
        "numbers that are not finite",
    ),
    ("manifest.json", None, "holds no whole reference store"),
    ("manifest.json", b"", "is damaged: .*manifest.json cannot be read"),
    ("manifest.json", b"[1]", "is damaged: .*it holds list, not an object"),
    ("manifest.json", b"{}", "was built for something else .format: None stored"),
]


@pytest.mark.parametrize(("name", "content", "message"), STORE_FAULTS)
def test_a_damaged_store_is_refused_and_left_alone(builder, tmp_path, name, content, message):
    """It may be other people's, so nothing of it is removed; the message says how to get a new one,
    and that works."""
    build, _ = builder
    build(tmp_path / "store", MANIFEST)
    path = tmp_path / "store" / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    before = sorted(p.name for p in (tmp_path / "store").iterdir())
    with pytest.raises(UserError, match=message) as refused:
        build(tmp_path / "store", MANIFEST)
    assert "delete" in str(refused.value).lower() and str(tmp_path / "store") in str(refused.value)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == before
    shutil.rmtree(tmp_path / "store")
    build(tmp_path / "store", MANIFEST)


def test_a_folder_of_something_else_is_never_replaced(builder, tmp_path):
    """A store that is named by mistake: a folder with photos, one whose manifest is a web page's, a
    file."""
    build, _ = builder
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "beach.jpg").write_bytes(b"sun")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "site"}')
    (tmp_path / "file").write_text("text")
    for name, message in (
        ("photos", "holds no whole reference store"),
        ("site", "built for something else"),
        ("file", "holds no whole"),
    ):
        with pytest.raises(UserError, match=message):
            build(tmp_path / name, MANIFEST)
    assert (tmp_path / "photos" / "beach.jpg").read_bytes() == b"sun" and (
        tmp_path / "site" / "manifest.json"
    ).exists()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    build(tmp_path / "link", MANIFEST)
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "elsewhere" / "values.safetensors"
    ).is_file()


def test_of_two_that_want_one_store_one_builds_and_the_other_waits_and_finds_it(builder, tmp_path):
    build, calls = builder
    other = Claim(tmp_path / ".store.lock")
    assert other.take() is None
    said = []

    def log(line):
        said.append(line)
        if "Waiting" in line:  # now the other one finishes
            scores = torch.arange(8.0)
            store = ReferenceStore({}, SequenceScores(scores, scores[:, None].clone()))
            store.save(tmp_path / "store", MANIFEST)
            other.release()

    store = build(tmp_path / "store", MANIFEST, log=log)
    assert calls == [] and store.scores.mean_logp.tolist() == list(range(8))
    assert re.match(
        r"Another process \(pid \d+ on .*\) builds the reference store .*store\. Waiting for it",
        said[0],
    )


def test_a_builder_that_ends_without_a_store_leaves_it_to_the_one_that_waits(builder, tmp_path):
    """Its finished parts are used."""
    build, calls = builder
    interrupted(builder, tmp_path / "store")
    other = Claim(tmp_path / ".store.lock")
    assert other.take() is None
    build(
        tmp_path / "store",
        MANIFEST,
        log=lambda line: other.release() if "Waiting" in line else None,
    )
    assert calls == [2, 2]


def test_without_locks_two_builders_end_with_one_whole_store(builder, tmp_path, monkeypatch):
    """A network file system without locks: the second begins and ends while the first is in its
    third piece."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    build, calls = builder
    others = [None]

    def begin_another(calls):
        if len(calls) == 2 and others:
            others.pop()
            build(tmp_path / "store", MANIFEST)

    store = build(tmp_path / "store", MANIFEST, first=begin_another)
    assert calls == [2] * 6 and [store.gap(e) for e in rows_of_four()] == [-1.0] * 4
    calls.clear()
    build(tmp_path / "store", MANIFEST)
    assert calls == [] and not (tmp_path / ".store.parts").exists()


def test_a_store_keeps_the_date_that_its_template_may_have_printed(builder, tmp_path):
    """The date is no part of what makes it this store, but whoever uses the store reads it there,
    also while it is being built."""
    build, calls = builder
    monday, tuesday = datetime(2026, 3, 2, 9, 30), datetime(2026, 3, 3)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", MANIFEST, date=monday, fails_at=3)
    assert (
        json.loads((tmp_path / ".store.parts" / "manifest.json").read_text())["date"]
        == "2026-03-02T09:30:00"
    )
    calls.clear()
    build(tmp_path / "store", MANIFEST, date=monday)
    assert (
        calls == [2, 2]
        and json.loads((tmp_path / "store" / "manifest.json").read_text())["date"]
        == "2026-03-02T09:30:00"
    )
    build(tmp_path / "store", MANIFEST, date=tuesday)
    assert calls == [2, 2]


# What makes it this model, and this data: a change of each thing, and the key of the identity that
# tells.
MODEL_CHANGES = {
    "a weight": (lambda folder: _add_to_first_weight(folder, 1e-3), {"weights"}),
    "a setting": (lambda folder: _edit(folder / "config.json", rope_theta=20000.0), {"config"}),
    "the template": (
        lambda folder: (folder / "chat_template.jinja").write_text(TEMPLATES["llama3"]),
        {"chat_template"},
    ),
    "the vocabulary": (lambda folder: _swap_tokens(folder / "tokenizer.json"), {"vocabulary"}),
    "another name and place": (lambda folder: folder.rename(folder.with_name("moved")), set()),
    "later times": (lambda folder: [os.utime(p, (2e9, 2e9)) for p in folder.iterdir()], set()),
}


def _add_to_first_weight(folder, amount):
    values = load_file(folder / "model.safetensors")
    name = sorted(values)[0]
    values[name].view(-1)[0] += amount
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _swap_tokens(path):
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["a"], tree["model"]["vocab"]["b"] = (
        tree["model"]["vocab"]["b"],
        tree["model"]["vocab"]["a"],
    )
    path.write_text(json.dumps(tree))


def _identity_of(folder, **settings):
    model = ModelConfig(path=str(folder), dtype="float32", **settings)
    return reference.model_identity(model, load_tokenizer(model))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("identity") / "model", make_tokenizer())


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_each_thing_that_the_values_depend_on_is_part_of_the_identity(
    model_folder, tmp_path, change
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before = _identity_of(folder)
    work, keys = MODEL_CHANGES[change]
    work(folder)
    after = _identity_of(folder if folder.exists() else tmp_path / "moved")
    assert {key for key in before if before[key] != after[key]} == keys


def test_the_identity_of_a_store_tells_settings_sequences_and_pooling(model_folder):
    ours, other = dominants([example()]), dominants([example(1)])
    plain = reference.identity(_identity_of(model_folder), ours, "response")
    # repeated rows need nothing new
    assert ours == dominants([example(), example()])
    for key, changed in (
        (
            "attention",
            reference.identity(_identity_of(model_folder, attention="eager"), ours, "response"),
        ),
        (
            "quantized",
            reference.identity(
                {**_identity_of(model_folder), "quantized": "nf4"}, ours, "response"
            ),
        ),
        ("pool", reference.identity(_identity_of(model_folder), ours, "all")),
        ("sequences", reference.identity(_identity_of(model_folder), other, "response")),
    ):
        assert {name for name in plain if plain[name] != changed[name]} == {key}


def _changed(e, source="rows:0", language="sw", **answers):
    """The example with other answers: `target_chosen`, `target_rejected`, ..."""
    four = dict(zip(FOUR, e.sequences(), strict=True)) | answers
    return example_of(source, language, *four.values())


FOUR = ("target_chosen", "target_rejected", "dominant_chosen", "dominant_rejected")


def test_each_part_of_the_rows_digest():
    """What is trained on and measured, in which order: whatever differs, the digest does."""
    one, two = example(0), example(1)
    base = reference.rows_digest([one, two], [one])
    # a place is no content
    assert base == reference.rows_digest(
        [example(0), example(1)], [_changed(one, source="elsewhere:7")]
    )
    other_start = TokenizedResponse(one.target.chosen.input_ids, 1)
    others = {
        "order": ([two, one], [one]),
        "a row twice": ([one, two, two], [one]),
        "a row less": ([one], [one]),
        "measured": ([one, two], [two]),
        "measured more": ([one, two], [one, two]),
        "moved between the groups": ([one], [two, one]),
        "language": ([_changed(one, language="zh"), two], [one]),
        "answers swapped": (
            [
                _changed(one, target_chosen=one.target.rejected, target_rejected=one.target.chosen),
                two,
            ],
            [one],
        ),
        "sides swapped": (
            [
                _changed(one, target_chosen=one.dominant.chosen, dominant_chosen=one.target.chosen),
                two,
            ],
            [one],
        ),
        "where the response begins": ([_changed(one, target_chosen=other_start), two], [one]),
        **{
            f"a token of {name}": (
                [_changed(one, **{name: TokenizedResponse((9, 9, 9), 2)}), two],
                [one],
            )
            for name in FOUR
        },
    }
    digests = {name: reference.rows_digest(*groups) for name, groups in others.items()}
    assert base not in digests.values() and len(set(digests.values())) == len(digests)


def test_each_part_of_the_digest_of_sequences():
    first = [TokenizedResponse((1, 2, 3), 1), TokenizedResponse((4, 5), 1)]
    others = [
        first[::-1],
        first[:1],
        [TokenizedResponse((1, 2, 3), 2), first[1]],
        [TokenizedResponse((1, 2, 4), 1), first[1]],
        [TokenizedResponse((1, 2), 1), TokenizedResponse((3, 4, 5), 1)],
        [TokenizedResponse((1, 2, 3, 4, 5), 1)],
    ]
    assert len({reference.digest(sequences) for sequences in [first, *others]}) == 7


def test_self_check_refuses_a_model_with_dropout(project, tokenizer):  # noqa: F811
    model = build_model("llama", len(tokenizer))
    model.config.attention_dropout = 0.5
    model.save_pretrained(project / "dropout")
    tokenizer.save_pretrained(project / "dropout")
    _, process = run(project, "with-dropout", f"model.path={project / 'dropout'}", expect=2)
    assert "Step-0 self-check failed" in process.stderr and "Turn off dropout" in process.stderr


def test_evaluation_reuses_nothing_and_is_independent_of_the_batch(project, monkeypatch):  # noqa: F811
    """Gaps before training are the same whatever else is measured with them."""
    _, _ = run(project, "few", "train.max_steps=1", "data.eval_rows_per_language=1")
    _, _ = run(project, "all", "train.max_steps=1")
    few, every = (
        json.loads((project / name / "result.json").read_text()) for name in ("few", "all")
    )
    assert few["all"]["n"] == 2 and every["all"]["n"] == 4
    rows = project / "eval.jsonl"
    (project / "first.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    _, _ = run(project, "first", "train.max_steps=1", f"data.eval=[{project / 'first.jsonl'}]")
    first = json.loads((project / "first" / "result.json").read_text())
    for language in ("sw", "zh"):
        one, other = (r["languages"][language]["target_gap"]["before"] for r in (few, first))
        assert one == pytest.approx(other, abs=1e-6)
