"""The whole-step benchmark on a tiny model: every side has the right gradient, and one that has not
is marked."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks import step  # noqa: E402
from benchmarks.output import Machine  # noqa: E402
from mpo.config import load_config  # noqa: E402
from mpo.data.examples import Answers, Example, TokenizedResponse  # noqa: E402
from mpo.data.rows import Pair, Row  # noqa: E402

VOCAB = 61
SETTINGS = {
    "all": ["train.pairs_per_micro_batch=3"],
    "budget": ["train.tokens_per_micro_batch=30"],
    "selective": ["train.tokens_per_micro_batch=30", "model.activation_checkpointing=selective"],
}


def load(attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )


def examples():
    generator = torch.Generator().manual_seed(1)

    def pair(prompt, *lengths):
        ids = [
            torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in (prompt, *lengths)
        ]
        return Answers(*(TokenizedResponse((*ids[0], *response), prompt) for response in ids[1:]))

    dominant, no_text = pair(4, 5, 3), Pair(prompt=(), chosen="", rejected="")
    return [
        Example(Row(str(i), language, no_text, no_text), dominant, pair(3 + i, 4 + i, 6 - i))
        for i, language in enumerate(("sw", "zh", "ar"))
    ]


@pytest.fixture
def settings():
    return {
        name: load_config(step.RECIPE, ["data.eval=[]", "model.attention=packed", *more])
        for name, more in SETTINGS.items()
    }


def test_every_side_has_the_gradient_of_float64(settings, tmp_path):
    found = step.compare("tiny", load, examples(), settings, 2)
    assert [side.name for side in found.sides] == [step.PUBLISHED, *SETTINGS]
    assert all(side.status == "ok" and side.gradient_error < 1e-5 for side in found.sides)
    assert len({round(side.l1, 5) for side in found.sides}) == 1
    assert found.tokens["all"] == found.tokens["budget"] < found.tokens[step.PUBLISHED]
    assert all(side.peak_bytes > 0 and side.seconds.repetitions == 2 for side in found.sides)
    result = step.StepResult(
        machine=Machine.here(torch.device("cpu")), quick=True, configurations=[found], bars=[]
    )
    assert step.StepResult.model_validate_json(result.model_dump_json()) == result
    bars = step.judge(found, 0.0, 10.0)
    assert [bar.holds for bar in bars] == [True, True] and bars[0].side in SETTINGS
    assert [bar.holds for bar in step.judge(found, 1e9, 0.0)] == [False, False]
    step.picture(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_is_marked(settings, monkeypatch):
    """A side that forgets the prompt of the rejected answers, as packing without isolation
    might."""
    right = step.ours

    def wrong(model, rows, config):
        swapped = [
            Example(e.row, e.dominant, e.target._replace(rejected=e.dominant.rejected))
            for e in rows
        ]
        return right(model, swapped if config is settings["all"] else rows, config)

    monkeypatch.setattr(step, "ours", wrong)
    status = {
        side.name: side.status for side in step.compare("tiny", load, examples(), settings, 1).sides
    }
    assert status == {step.PUBLISHED: "ok", "all": "wrong", "budget": "ok", "selective": "ok"}
