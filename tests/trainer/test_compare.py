"""`mpo compare`: what is compared, the runs behind it, and what becomes of one that fails or is
interrupted."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from test_reports import AFTER, BEFORE, EXAMPLES
from test_train import project, run  # noqa: F401  (project is a fixture)
from tiny import mpo_command, mpo_process

from mpo.commands.app import status_of
from mpo.config import load_config
from mpo.evaluation.gaps import GapTable
from mpo.models.scoring import Measurement
from mpo.runtime.errors import UserError
from mpo.runtime.interruption import Interrupted
from mpo.runtime.terminal import console
from mpo.training.compare import Launcher, compare
from mpo.training.compared_losses import Choice, runs_of
from mpo.training.comparison import Comparison, Training
from mpo.training.run_folder import read_metrics

OTHER = "dpo,beta=0.5,train.learning_rate=1e-3"
LOSSES = ("--loss", "mpo", "--loss", OTHER)


def command(project, name, *arguments):  # noqa: F811
    """Of a comparison in a folder of its own, of 54 steps a run."""
    options = [f"output_dir={project / name}", "train.epochs=20", "checkpoint.export=false"]
    return ["compare", str(project / "run.yaml"), *options, *arguments]


@pytest.fixture(scope="module")
def both(project):  # noqa: F811
    """A comparison that Ctrl-C stopped in its first run, and the same command again. Returns the
    folder, both processes as they ended."""
    process = mpo_process(*command(project, "both", *LOSSES))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
    stopped = subprocess.CompletedProcess(
        process.args, process.wait(), "".join(lines), process.stderr.read()
    )
    assert not (project / "both" / "compare.json").exists()
    result = mpo_command(*command(project, "both", *LOSSES, "--json"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return project / "both", stopped, result


@pytest.fixture
def copy(both, tmp_path):
    """The finished comparison, to do something to."""
    shutil.copytree(both[0], tmp_path / "both")
    return tmp_path / "both"


class Said(list):
    """Where a comparison in this process reports to."""

    def launcher(self, *words):
        return Launcher(tuple(words) or (sys.executable, "-c", "exit(3)"), self.append)


def again(project, out, losses, *overrides, words=()):  # noqa: F811
    """A comparison in this process; by default none of its runs can be started."""
    said = Said()
    arguments = [f"output_dir={out}", "train.epochs=20", "checkpoint.export=false", *overrides]
    return compare(project / "run.yaml", losses, arguments, said.launcher(*words)), said


def test_the_table_says_what_the_runs_did(both):
    out, _, result = both
    report = json.loads(result.stdout)
    assert report == json.loads((out / "compare.json").read_text())
    assert list(report["losses"]) == ["mpo", OTHER] and report["gap_scale"] == 1.0
    before = Measurement.load(out / "mpo" / "gaps_before", 4)
    for name, loss in report["losses"].items():
        folder = out / name
        rows = read_metrics(folder / "metrics.jsonl")
        assert loss["steps"] == len(rows) == 54 and loss["folder"] == str(folder)
        assert loss["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
        assert loss["peak_memory_gib"] == max(row["peak_memory_gib"] for row in rows)
        of_run = json.loads((folder / "result.json").read_text())
        for language, row in {**loss["languages"], "all": loss["all"]}.items():
            theirs = {**of_run["languages"], "all": of_run["all"]}[language]
            for key in ("target_gap", "sign_accuracy", "dominant_gap"):
                assert row[key] == theirs[key]["after"]
            gap = theirs["dominant_gap"]
            assert row["dominant_gap_moved"] == pytest.approx(gap["after"] - gap["before"])
        after = Measurement.load(folder / "gaps_after", 4)
        distance = (after.target - before.dominant).abs().mean()
        assert loss["all"]["distance"] == pytest.approx(float(distance))
    own = report["losses"][OTHER]
    assert own["loss"]["name"] == "dpo" and own["loss"]["beta"] == 0.5
    assert own["train"]["learning_rate"] == 1e-3
    assert report["before"]["all"]["target_gap"] == pytest.approx(float(before.target.mean()))
    lines = (out / "compare.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| loss",
        "| before",
        "| mpo",
        f"| {OTHER}",
    ]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_stops_the_run_with_a_checkpoint_and_the_command_goes_on(both):
    out, stopped, result = both
    assert stopped.returncode == 130
    assert stopped.stderr.count("Stopping after this step, with a checkpoint") == 1
    assert stopped.stderr.rstrip().endswith("is kept, and the same command goes on from there.")
    assert "Going on from" in result.stderr and "of 54 steps done)" in result.stderr
    assert len(list((out / "mpo" / "checkpoints").iterdir())) == 2


def test_what_runs_share_is_computed_once(both):
    """Before any run. Each of these, in a process of its own, says how far it is."""
    _, stopped, result = both
    for once in (
        "Gaps before training: 12/12",
        "Reference store: 8/8",
        "Reference store of target pairs: 16/16",
    ):
        assert stopped.stdout.count(once) == 1 and once not in result.stderr
        assert stopped.stdout.index(once) < stopped.stdout.index("step 1/54")
    said = result.stderr
    assert said.count("step 54/54") == said.count("Gaps after training: 12/12") == 2
    assert said.index("[1/2] mpo: mpo train") < said.index("step 54/54")
    assert said.rindex("step 54/54") > said.index(f"[2/2] {OTHER}: mpo train")


def test_a_run_of_a_comparison_is_that_of_mpo_train(project, both):  # noqa: F811
    out, _ = run(project, "alone", "train.epochs=20", "checkpoint.export=false")
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (out, both[0] / "mpo")]
    for key in ("loss", "l2", "gap", "learning_rate"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]


def test_finished_runs_are_loaded_in_any_order(project, both, copy):  # noqa: F811
    report, said = again(project, copy, [OTHER, "mpo"])
    first = json.loads(both[2].stdout)["losses"]
    made = json.loads(json.dumps(report.as_dict()))["losses"]
    assert list(made) == [OTHER, "mpo"]
    for name in made:
        assert {**made[name], "folder": ""} == {**first[name], "folder": ""}
    assert [line.split(":")[1].split(",")[0] for line in said[:2]] == [" finished before"] * 2
    assert not report.failures


def test_a_run_that_fails_leaves_the_others(project, copy, tmp_path, capfd):  # noqa: F811
    """The table names it, and the exit status is 1."""
    words = "echo 'Error: the disk is full' >&2; echo 'Error: and more' >&2; exit 2"
    (tmp_path / "launch.sh").write_text(words)
    arguments = command(project, copy, "--launcher", f"sh {tmp_path / 'launch.sh'}")
    assert status_of([*arguments, "--loss", "mpo", "--loss", "mpo,beta=3"]) == 1
    shown = capfd.readouterr()
    assert "mpo,beta=3 failed: the disk is full" in shown.out
    assert "Error: and more" in shown.err
    report = json.loads((copy / "compare.json").read_text())
    assert report["losses"]["mpo,beta=3"] == {"status": "failed", "error": "the disk is full"}
    assert report["losses"]["mpo"]["all"]["n"] == 4
    assert "| mpo,beta=3 | failed |" in (copy / "compare.md").read_text()


def test_where_no_run_is_finished_the_table_says_so(project, tmp_path):  # noqa: F811
    words = ("sh", "-c", "test $1 = precompute || kill -9 $$")
    report, _ = again(project, tmp_path / "none", ["mpo"], words=words)
    assert report.failures["mpo"].startswith("killed by signal 9")
    assert report.as_dict()["before"] is None
    assert (tmp_path / "none" / "compare.png").is_file()


def test_without_a_reference_nothing_is_trained(project, tmp_path):  # noqa: F811
    words = ("sh", "-c", "echo 'Error: no room' >&2; exit 2")
    with pytest.raises(UserError, match=r"reference store.*cannot be built: no room"):
        again(project, tmp_path / "none", ["mpo", "mpo,beta=3"], words=words)


def test_where_a_run_is_interrupted_the_comparison_is(project, tmp_path):  # noqa: F811
    with pytest.raises(Interrupted, match=r"mpo train .* the same command goes on"):
        again(project, tmp_path / "none", ["sft"], words=("sh", "-c", "exit 130"))


DAMAGE = [
    ("gaps_after/gaps.safetensors", "lacks gaps_after or it is damaged"),
    ("gaps_before/gaps.safetensors", "lacks gaps_before or it is damaged"),
]


@pytest.mark.parametrize(("file", "words"), DAMAGE)
def test_a_finished_run_that_lost_its_gaps_is_named(project, copy, file, words):  # noqa: F811
    (copy / "mpo" / file).unlink()
    report, _ = again(project, copy, ["mpo", OTHER])
    assert words in report.failures["mpo"] and report.row(OTHER).n == 4


def test_a_finished_run_without_metrics_has_no_cost(project, copy):  # noqa: F811
    (copy / "mpo" / "metrics.jsonl").unlink()
    report, _ = again(project, copy, ["mpo", OTHER])
    assert math.isnan(report.trainings["mpo"].seconds) and report.trainings[OTHER].seconds > 0


def test_another_run_of_that_name_is_refused(project, copy):  # noqa: F811
    with pytest.raises(UserError, match=r"both/mpo holds another run: train.learning_rate"):
        again(project, copy, ["mpo", "dpo"], "train.learning_rate=1e-5")
    assert not (copy / "dpo.yaml").exists()
    shutil.rmtree(copy / "mpo")
    (copy / "mpo").mkdir()
    (copy / "mpo" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no MPO run"):
        again(project, copy, ["mpo"])


def test_a_folder_that_is_a_run_is_refused(project, both):  # noqa: F811
    with pytest.raises(UserError, match="holds a run, and those of a comparison lie in a folder"):
        again(project, both[0] / "mpo", ["mpo"])


def test_ranks_are_started_by_it(project, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r'--launcher "deepspeed --num_gpus 8 --module"'):
        again(project, tmp_path / "none", ["mpo"])
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="no-such-launcher cannot be started"):
        again(project, tmp_path / "none", ["mpo"], words=("no-such-launcher",))
    with pytest.raises(UserError, match="is no command line"):
        Launcher.of("deepspeed '", print, None)


@pytest.mark.slow
def test_two_ranks(project):  # noqa: F811
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 -m"
    options = ("--loss", "mpo", "zero.stage=2", "--launcher", launcher, "--json")
    result = mpo_command(*command(project, "ranks", *options))
    assert result.returncode == 0 and "2 rank(s)" in result.stderr, result.stderr[-3000:]
    assert json.loads(result.stdout)["losses"]["mpo"]["steps"] == 54


REFUSED = [
    ([], "No loss to compare"),
    (["mpp"], "--loss 'mpp': .*did you mean 'mpo'"),
    (["mpo", "mpo"], "is the run mpo once more"),
    (["mpo", "mpo,beta=1.0"], "'mpo,beta=1.0' is the run mpo once more"),
    (["mpo", "mpo,train.seed=5"], "is the run mpo once more"),
    (["mpo,beta"], "not of the form NAME or NAME,field=value"),
    (["mpo,"], "not of the form"),
    (["=1"], "not of the form"),
    (["mpo,gamma=1"], "--loss 'mpo,gamma=1': .*loss.gamma: unknown field"),
    (["mpo,beta=-1"], "loss.beta: .*greater than 0"),
    (["mpo,train.learning_rat=1"], "did you mean 'learning_rate'"),
    (["mpo,data.max_length=9"], "sets data.max_length, but runs that are compared"),
    (["mpo,output_dir.x=9"], "differ in fields of loss and train alone"),
    (["mpo,name=dpo"], "sets name"),
    (["sft", "mpo", "dpo,pool=all", "mpo,pool=all"], "'mpo,pool=all' has loss.pool=all and mpo"),
    (["mpo", "dpo,pairs=both,pool=all"], "share one reference store"),
]


@pytest.mark.parametrize(("losses", "words"), REFUSED)
def test_what_cannot_be_compared_is_refused(project, losses, words):  # noqa: F811
    with pytest.raises(UserError) as error:
        runs_of(project / "run.yaml", losses, [])
    assert re.search(words, str(error.value), re.DOTALL), error.value


def test_each_run_has_a_name_a_folder_and_its_own_fields(project):  # noqa: F811
    losses = [
        "mpo",
        "mpo, beta=0.5",
        "mpo,loss.beta=2,train.adam_betas=[0.8,0.9],train.schedule=linear",
    ]
    runs = runs_of(project / "run.yaml", losses, ["output_dir=x", "train.epochs=3"])
    assert [each.name for each in runs] == [
        "mpo",
        "mpo,beta=0.5",
        "mpo,beta=2,train.adam_betas=[0.8,0.9],train.schedule=linear",
    ]
    assert [str(each.folder) for each in runs] == [f"x/{each.name}" for each in runs]
    assert [each.config.loss.beta for each in runs] == [1.0, 0.5, 2.0]
    assert runs[2].config.train.adam_betas == (0.8, 0.9) and runs[0].config.train.epochs == 3
    assert len({each.config.reference.store for each in runs}) == 1
    assert Choice.of("a_b:c.d,x=/etc/a b").name == "a_b:c.d,x=_etc_a_b"
    own = runs_of(project / "run.yaml", ["mpo"], ["reference.store=elsewhere"])
    assert len(runs_of(project / "run.yaml", ["mpo", "dpo,pool=all"], [])) == 2
    assert own[0].config.reference.store.endswith("elsewhere")


def test_a_losses_defaults_are_its_own(tmp_path):
    """The demo's file has a beta of MPO's."""
    mpo, dpo, slow = runs_of("demo", ["mpo", "dpo", "dpo,train.learning_rate=1e-9"], [])
    assert dpo.config.loss.beta == 0.1 and dpo.config.loss.retention_weight == 0
    assert mpo.config.loss.beta == mpo.config.loss.retention_weight == 1
    assert slow.config.train.learning_rate == 1e-9
    assert mpo.config.train == dpo.config.train


def test_a_runs_configuration_file_is_its_configuration(both, project):  # noqa: F811
    for name in ("mpo", OTHER):
        config = load_config(both[0] / f"{name}.yaml")
        kept = json.loads((both[0] / name / "config.json").read_text())["config"]
        assert config.model_dump(mode="json") == kept
        assert yaml.safe_load((both[0] / f"{name}.yaml").read_text())["loss"] == kept["loss"]


def table(failures=(), trainings=()):
    names = ("one", "two")
    measured = {"before": BEFORE} | {name: AFTER for name in names if name not in failures}
    made = {
        name: Training("runs/x", {}, 4, 12.5, 1.25) for name in names if name not in failures
    } | dict(trainings)
    return Comparison(names, GapTable.of(EXAMPLES, measured, 2.0), made, dict(failures))


def test_the_table_of_numbers_that_were_worked_out(capsys):
    """As in test_reports.py: over all four rows the dominant gap goes from 0.9375 to 1.0625."""
    table(failures={"two": "why"}).show(console())
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [
        ["before", "+0.312", "0.562", "50%", "", "", ""],
        ["one", "+0.250", "1.312", "75%", "+0.125", "12.5", "1.25 GiB"],
        ["two", "failed", "", "", "", "", ""],
    ]
    assert lines[-1] == "two failed: why"


@pytest.mark.parametrize(("beta", "scale"), [(1.0, ""), (1.5, "1.5 x ")])
def test_the_title_names_a_scale_only_where_distances_have_one(beta, scale):
    """Of a loss other than MPO they have none, whatever its own beta."""
    gaps = GapTable.of(EXAMPLES, {"before": BEFORE}, beta)
    page = Comparison((), gaps, {}, {}).as_markdown("x.png")
    assert f"mean |{scale}target gap -" in page and "beta" not in page
    assert ("distances of 1.5 x target gap)" in page) == bool(scale)


def test_seconds_are_of_all_steps_also_where_not_each_has_a_line():
    rows = [{"seconds": s, "peak_memory_gib": p} for s, p in ((1.0, 3.0), (2.0, 2.0))]
    training = Training.of("x", {}, 10, rows)
    assert training.seconds == 15.0 and training.peak_memory_gib == 3.0


def test_a_model_that_gives_no_numbers_has_a_line(capsys):
    nothing = torch.full((4,), math.nan)
    lost = Measurement(nothing, nothing, torch.zeros(4, 2, 3))
    gaps = GapTable.of(EXAMPLES, {"before": BEFORE, "one": lost}, 1.0)
    cost = {"one": Training("x", {}, 1, math.nan, math.nan)}
    report = Comparison(("one",), gaps, cost, {})
    report.show(console())
    assert "nan" in capsys.readouterr().out
    assert "| one | +nan |" in report.as_markdown("x.png")
