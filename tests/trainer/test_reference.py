"""The reference store on disk, the step-0 self-check, and scoring."""

import json

import pytest
import torch
from test_train import project, run  # noqa: F401  (project is a fixture)
from tiny import build_model

from mpo import reference
from mpo.errors import UserError
from mpo.model import Scores
from mpo.tokenizing import Example, TokenizedResponse


def example(i=0):
    responses = [TokenizedResponse((1, 2, 3 + i, 4 + k), 2) for k in range(4)]
    return Example(f"rows:{i}", "sw", *responses)


def store_of(examples):
    sequences = reference.dominant_sequences(examples)
    scores = Scores(torch.arange(len(sequences)).float(), torch.randn(len(sequences), 5))
    return reference.ReferenceStore({s: i for i, s in enumerate(sequences)}, scores)


def test_round_trip(tmp_path):
    examples = [example(0), example(1), example(0)]
    store = store_of(examples)
    assert len(store.rows) == 4  # two distinct dominant pairs
    manifest = {"format": 1, "weights": "abc"}
    assert reference.load(tmp_path / "reference", manifest, examples) is None
    reference.save(store, tmp_path / "reference", manifest)
    loaded = reference.load(tmp_path / "reference", manifest, examples)
    assert loaded.gap(examples[1]) == store.gap(examples[1]) == -1.0
    assert torch.equal(loaded.pooled(examples[1].dominant_rejected), store.pooled(examples[1].dominant_rejected))


def test_a_store_of_something_else_is_refused_with_what_differs(tmp_path):
    reference.save(store_of([example()]), tmp_path / "reference", {"format": 1, "weights": "abc", "dtype": "float32"})
    with pytest.raises(UserError, match=r"dtype: float32 stored, bfloat16 now.*delete"):
        reference.load(tmp_path / "reference", {"format": 1, "weights": "abc", "dtype": "bfloat16"}, [example()])
    (tmp_path / "reference" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        reference.load(tmp_path / "reference", {"format": 1}, [example()])


def test_an_interrupted_save_leaves_no_store(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(reference, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        reference.save(store_of([example()]), tmp_path / "reference", {})
    assert not list(tmp_path.iterdir())


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
    few, every = (json.loads((project / name / "result.json").read_text()) for name in ("few", "all"))
    assert few["all"]["n"] == 2 and every["all"]["n"] == 4
    rows = project / "eval.jsonl"
    (project / "first.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    _, _ = run(project, "first", "train.max_steps=1", f"data.eval=[{project / 'first.jsonl'}]")
    first = json.loads((project / "first" / "result.json").read_text())
    for language in ("sw", "zh"):
        one, other = (r["languages"][language]["target_gap"]["before"] for r in (few, first))
        assert one == pytest.approx(other, abs=1e-6)
