"""Every command on runs of losses other than mpo: a row at a time, the first step's rows alone,
rows that an epoch has twice."""

import json

import pytest
import yaml
from test_kto import project  # noqa: F401  (a fixture: KTO, eight rows)
from tiny import commands

from mpo.training.run_folder import read_metrics

LOSSES = {
    "kto": "loss.beta=0.3",
    "sft": "loss.per=tokens",
    "dpo": "loss.beta=0.3",
}
QUICK = ["train.learning_rate=1e-2", "train.epochs=1", "checkpoint.export=false"]


@pytest.fixture(scope="module")
def told(project):  # noqa: F811
    """What each command said, by its name; all in one process."""
    weighed = yaml.safe_load((project / "run.yaml").read_text())
    weighed["data"]["weights"] = [2]
    (project / "weighed.yaml").write_text(yaml.safe_dump(weighed))
    steps = {}

    def add(name, command, file, *more):
        steps[name] = ["mpo", command, str(project / file), *more]

    for loss in LOSSES:
        of = [f"loss.name={loss}", f"output_dir={project / loss}", LOSSES[loss], *QUICK]
        one = [*of, "train.max_steps=5", f"output_dir={project / loss}-one"]
        add(loss, "train", "run.yaml", *of, "train.pairs_per_step=1", "checkpoint.export=true")
        add(f"{loss} one", "train", "run.yaml", *one, "--overfit-batch")
        add(f"{loss} gaps", "gaps", "run.yaml", *of, "--json")
        add(f"{loss} valid", "validate", "run.yaml", *of)
        add(f"{loss} dry", "train", "run.yaml", *of, "--dry-run", "--json")
    add("weights", "train", "weighed.yaml", *QUICK, f"output_dir={project / 'twice'}")
    runs = [str(project / loss) for loss in LOSSES]
    steps["plot"] = ["mpo", "plot", *runs, "--to", str(project / "all.png")]
    return dict(zip(steps, commands(list(steps.values()), project), strict=True))


def test_every_command_knows_every_loss(told):
    assert {name: done["text"][-2000:] for name, done in told.items() if done["status"]} == {}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_a_row_at_a_time(project, told, loss):  # noqa: F811
    rows = read_metrics(project / loss / "metrics.jsonl")
    assert [row["pairs"] for row in rows] == [1] * 8
    assert all(("kl" in row) == (loss == "kto") and row["loss_name"] == loss for row in rows)
    measured = json.loads(told[f"{loss} gaps"]["text"].strip().splitlines()[-1])
    result = json.loads((project / loss / "result.json").read_text())
    before, after = measured["models"].values()
    for of_language in (before["all"], after["all"]):
        moment = "before" if of_language is before["all"] else "after"
        for key in ("target_gap", "dominant_gap", "distance"):
            assert of_language[key] == pytest.approx(result["all"][key][moment], abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_steps_rows_alone_are_learnt(project, told, loss):  # noqa: F811
    rows = read_metrics(project / f"{loss}-one" / "metrics.jsonl")
    assert len(rows) == 5 and len({(row["tokens"], *row["gap"]) for row in rows}) == 1
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_row_twice_in_an_epoch(project, told):  # noqa: F811
    """KTO deals out answers of other prompts all the same, and the KL begins at 0."""
    rows = read_metrics(project / "twice" / "metrics.jsonl")
    assert sum(row["pairs"] for row in rows) == 16 and rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert "16 rows" in told["weights"]["text"]
