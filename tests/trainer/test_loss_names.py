"""`loss.name`: which losses there are, what their sections take, what is refused and with which
words; what a loss takes of rows and of the reference."""

import importlib
import json
import pickle
import re
import shutil
import sys
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import make_tokenizer
from tiny import commands, example_of, native_rows, save_model, write_rows

from mpo import losses
from mpo.config import Config, load_config
from mpo.data.examples import TokenizedResponse
from mpo.loss_config import RecordedLoss
from mpo.models.forward import SequenceScores
from mpo.runtime.errors import UserError
from mpo.training.micro_batches import in_micro_batches, make_batch
from mpo.training.objective import Objective
from mpo.training.reference import ReferenceStore, dominant_sequences
from mpo.training.run_folder import OutputFolder
from mpo_kernels.losses import CPO, DPO, SequenceLoss

MINIMAL = {"output_dir": "out", "model": {"path": "-"}, "data": {"train": ["-"]}}
NAMES = [name for name in losses.named() if name != "mpo"]


def rows_of(count):
    """Rows whose sequences are all different, but that each three share a dominant pair."""

    def answer(mark, scored):
        return TokenizedResponse((1, mark, *range(10 * mark, 10 * mark + scored)), 2)

    return [
        example_of(
            str(i),
            "sw",
            answer(100 + 2 * i, 1 + i % 4),
            answer(101 + 2 * i, 1 + i % 3),
            answer(50 + 2 * (i // 3), 2),
            answer(51 + 2 * (i // 3), 3),
        )
        for i in range(count)
    ]


@pytest.fixture
def load(tmp_path):
    def load(*overrides, **loss):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **({"loss": loss} if loss else {})}))
        return load_config(path, list(overrides)).loss

    return load


def test_the_names_are_those_of_the_family():
    """The nine baselines of the paper under the names that its readers expect."""
    baselines = "sft dpo ipo robust_dpo cpo kto orpo length_dpo simpo"
    assert {"mpo", *baselines.split()} < set(losses.named())
    assert len({*losses.named().values()}) == len(losses.named()) > 20
    assert not {"sum", "sequence_loss", "likelihood_loss"} & set(losses.named())


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_the_fields_of_its_loss_and_their_defaults(load, name):
    loss = load(f"loss.name={name}")
    kind = losses.named()[name]
    assert loss.build() == loss.build() or type(loss.build()) is kind
    assert asdict(loss.build()) == asdict(kind()) == loss.own()
    assert loss.retention_weight == 0 and not loss.pools_dominant and loss.gap_scale == 1
    # as config.json keeps it, and as ranks send it to each other
    config = Config.model_validate({**MINIMAL, "loss": loss.model_dump(mode="json")})
    assert config.loss.model_dump() == pickle.loads(pickle.dumps(loss)).model_dump()
    assert name in loss.in_words()


def test_fields_reach_the_loss(load):
    loss = load("loss.name=cpo", "loss.alpha=2", "loss.per=sequence", "loss.pairs=both")
    assert asdict(loss.build()) == asdict(CPO(beta=0.1, alpha=2.0, per="sequence"))
    assert type(loss.build().alpha) is float  # so that 2 and 2.0 are one run
    assert "alpha 2" in loss.in_words() and "target and dominant pairs" in loss.in_words()


def test_another_loss_behind_the_command_leaves_out_the_numbers_of_the_files_own(load):
    mine = {"beta": 1.5, "retention_weight": 0.5, "head": "logits", "pool": "all"}
    assert load(**mine).build().beta == 1.5
    dpo = load("loss.name=dpo", **mine)
    assert (dpo.build().beta, dpo.retention_weight) == (0.1, 0)
    assert (dpo.head, dpo.pool) == ("logits", "all")
    assert load("loss.name=dpo", "loss.beta=0.3", **mine).build().beta == 0.3
    assert load("loss.name=dpo", name="dpo", beta=0.7).build().beta == 0.7
    assert load("loss.name=mpo", name="dpo", beta=0.7).build().beta == 1.0


REFUSED = [
    ({"name": "dpoo"}, "loss.name: unknown loss; did you mean 'dpo'?"),
    ({"name": "zzz"}, "known losses: bco, cdpo"),
    ({"name": "Rdpo"}, "did you mean 'dpo'?"),
    *(
        ({"name": name}, "robust DPO against wrong labels .* is robust_dpo .* length_dpo")
        for name in ("rdpo", "r_dpo", "r-dpo")
    ),
    ({"name": "own_losses:good_pairs"}, "takes is_desirable, which is said of single answers"),
    ({"name": "dpo", "betta": 1}, "loss.betta: unknown field of dpo; did you mean 'beta'?"),
    ({"name": "ipo", "beta": 1}, "loss.beta: unknown field of ipo; known fields: .*tau"),
    ({"name": "sft", "beta": 1}, "loss.beta: unknown field of sft"),
    ({"name": "dpo", "beta": -1}, "loss.beta: DPO: beta is -1.0; needed is a number above 0"),
    ({"name": "dpo", "beta": "wide"}, "loss.beta: .*valid number"),
    ({"name": "dpo", "beta": True}, "loss.beta: true is no value of it"),
    ({"name": "dpo", "beta": float("nan")}, "loss.beta: .*finite number"),
    ({"name": "dpo", "beta": 1e308}, r"loss.name: with beta 1e\+308 it gives"),
    ({"name": "ipo", "tau": 1e-320}, "loss.name: with tau 1e-320 it gives"),
    ({"name": "robust_dpo", "flipped": 0.5}, "flipped is 0.5; needed is .* below 0.5"),
    ({"name": "cpo", "per": "token"}, "loss.per: CPO: per is 'token'; needed is sequence or"),
    ({"name": "dpo", "pairs": "dominant"}, "loss.pairs"),
    ({"name": "mpo", "pairs": "both"}, "pairs=both is for the other losses"),
    ({"name": "mpo", "tau": 1}, "loss.tau: unknown field; "),
    ({"name": 3}, "loss.name: Input should be a valid string"),
    ({"name": ["dpo"]}, "loss.name: Input should be a valid string"),
    ({"name": "own_losses:gone"}, "loss.name: cannot be imported: AttributeError"),
    ({"name": "no_such_module:loss"}, "cannot be imported: ModuleNotFoundError.*lies in"),
    ({"name": "own_losses:"}, "cannot be imported"),
    ({"name": ":margin"}, "cannot be imported"),
    ({"name": "own_losses:nothing"}, "is no loss. Needed is a function"),
    ({"name": "builtins:print"}, "loss.name: "),
    ({"name": "own_losses:wants_more"}, "needs margin_rewards, which a run does not know"),
    ({"name": "own_losses:of_the_batch"}, "has to depend on that group alone"),
    ({"name": "own_losses:too_few"}, r"gives \(1,\), not one loss per group"),
    ({"name": "own_losses:detached"}, "does not depend on scores.logps"),
    ({"name": "own_losses:of_a_parameter"}, "does not depend on scores.logps"),
    ({"name": "own_losses:fails"}, "fails with RuntimeError: out of luck"),
    ({"name": "own_losses:squared", "beta": 1}, "loss.beta: unknown field of own_losses:squared"),
    ({"name": "own_losses:Lift", "rate": 0}, "loss.rate: Lift: rate is 0"),
    ({"name": "own_losses:squared", "code_sha256": "0"}, "has other code now"),
    ({"name": "own_losses:Pairs", "pairs": "both"}, "has a field pairs, which the section loss"),
    ({"name": "own_losses:Weight"}, "has a field retention_weight, .*Give it another name"),
    ({"name": "own_losses:Code"}, "has a field code_sha256, which"),
    ({"name": "own_losses:Build"}, "has a field build, which"),
    ({"name": "own_losses:Hidden"}, "has a field _scale, which"),
    ({"name": "own_losses:Function"}, "field scale whose default is <built-in .*numbers, texts"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_refused(load, section, message):
    message = message.replace("?", r"\?")
    with pytest.raises(UserError, match=message) as error:
        load(**section)
    assert len(str(error.value)) < 1500


def test_a_loss_of_ones_own(load):
    function, kind, made = (
        load(f"loss.name=own_losses:{name}") for name in ("squared", "Lift", "lift")
    )
    assert function.build().constants == ("reference_logps",) and function.own() == {}
    assert kind.own() == {"rate": 0.5} and made.own() == {"rate": 0.25}
    assert kind.build().sequences == 1 and isinstance(function.build(), SequenceLoss)
    assert asdict(load("loss.name=mpo_kernels.losses:DPO").build()) == asdict(DPO())


def test_a_run_with_a_loss_that_is_gone_can_still_be_read(load, tmp_path, monkeypatch):
    """Its folder is read by commands that do not compute it, such as export."""
    (tmp_path / "gone.py").write_text("def loss(scores):\n    return -scores.logps[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {**MINIMAL, "loss": load("loss.name=gone:loss").model_dump(mode="json")}
    (tmp_path / "gone.py").unlink()
    monkeypatch.delitem(sys.modules, "gone")
    losses.section_of.cache_clear()
    loss = Config.model_validate(kept).loss
    assert isinstance(loss, RecordedLoss) and loss.model_dump(mode="json") == kept["loss"]
    with pytest.raises(UserError, match="gone:loss: cannot be imported"):
        loss.build()


def test_other_code_or_another_loss_is_another_run(load, tmp_path, monkeypatch):
    """A folder goes on with the loss that it began with, whatever its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def begin(code, *overrides):
        (tmp_path / "mine.py").write_text(code)
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        losses.section_of.cache_clear()
        load()  # writes run.yaml
        config = load_config(tmp_path / "run.yaml", ["data.date=2026-03-02", *overrides])
        folder = OutputFolder(tmp_path / "run")
        try:
            return folder.open(config, "rows", {}, 1)
        finally:
            folder._claim.release()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = "def loss(scores):\n    return -scores.logps[0] * {}\n"
    assert not begin(code.format(1), "loss.name=mine:loss")
    assert begin(code.format(1), "loss.name=mine:loss")
    with pytest.raises(UserError, match=r"holds another run: loss.code_sha256 is '.*' there and"):
        begin(code.format(2), "loss.name=mine:loss")
    with pytest.raises(UserError, match=r"loss.name is 'mine:loss' there and 'dpo' here"):
        begin(code.format(1), "loss.name=dpo")
    (tmp_path / "run" / "config.json").unlink()
    assert not begin(code, "loss.name=dpo") and begin(code, "loss.name=dpo", "loss.beta=0.1")
    with pytest.raises(UserError, match=r"holds another run: loss.beta is 0.1 there and 0.2 here"):
        begin(code, "loss.name=dpo", "loss.beta=0.2")


def test_what_a_loss_takes_of_rows(load):
    """Chosen answers or pairs, of one side or both, whose weights sum to one per row; and of the
    reference nothing that it does not need."""
    rows = rows_of(3)
    sft, dpo = Objective(load("loss.name=sft")), Objective(load("loss.name=dpo"))
    both = Objective(load("loss.name=dpo", "loss.pairs=both"))
    assert [g.sequences for g in sft.groups(rows[0])] == [(rows[0].target.chosen,)]
    assert [g.sequences for g in both.groups(rows[0])] == [rows[0].target, rows[0].dominant]
    assert [g.weight for g in both.groups(rows[0])] == [0.5, 0.5]
    assert sft.referenced(rows, {}) == set() and not sft.takes_reference
    assert dpo.referenced(rows, {}) == {s for e in rows for s in e.target}
    assert both.referenced(rows, {}) == {s for e in rows for s in e.sequences()}
    kept = Objective(load("loss.name=simpo", "loss.retention_weight=1"))
    assert kept.referenced(rows, {}) == set(dominant_sequences(rows)) and kept.takes_reference


@pytest.mark.parametrize("tokens", [None, 60])
def test_a_dominant_pair_that_rows_share_is_scored_once(load, tokens):
    """With the weight of all of them; and it is in the row once where it is pooled too."""
    rows = rows_of(4)  # the first three share a dominant pair
    objective = Objective(load("loss.name=dpo", "loss.pairs=both", "loss.retention_weight=1"))
    parts = in_micro_batches(rows, objective, pairs=2, tokens=tokens, share_prompts=True)
    groups = [group for part in parts for group in part.groups]
    weights = {group.sequences: group.weight for group in groups if not group.is_target}
    assert weights == {rows[0].dominant: 1.5, rows[3].dominant: 0.5}
    assert sum(group.weight for group in groups) == len(rows)
    for part in parts:
        of_groups = {s for g in part.groups if not g.is_target for s in g.sequences}
        assert of_groups.isdisjoint(part.only_pooled())
        assert len(part.sequences()) == len(set(part.sequences()))
        assert {s for s, _ in part.dominant} <= of_groups | set(part.only_pooled())


def test_a_batch_has_the_constants_in_the_order_of_the_loss(load):
    rows = rows_of(2)
    objective = Objective(load("loss.name=length_dpo"))
    (part,) = in_micro_batches(rows, objective, pairs=2, tokens=None, share_prompts=True)
    sequences = part.reference_sequences(objective)
    means = torch.arange(len(sequences)).float()
    store = ReferenceStore.of(sequences, SequenceScores(means, torch.zeros(len(sequences), 0)))
    config = Config.model_validate(MINIMAL)
    batch = make_batch(part, objective, store, config, {})
    sides = list(zip(*(e.target for e in rows), strict=True))  # chosen, rejected
    lengths = torch.tensor([[float(len(s.response)) for s in side] for side in sides])
    want = torch.tensor([[means[sequences.index(s)] for s in side] for side in sides]) * lengths
    assert torch.equal(batch.constants[0], want)
    assert batch.packed.pooled_rows.numel() == 0 and batch.weights.tolist() == [1, 1]
    token = Objective(load("loss.name=cpo")).numbers_of_step(rows)
    assert token == {"mean_tokens": lengths[0].mean()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("losses")
    save_model(root / "model", make_tokenizer())
    write_rows(root / "train.jsonl", native_rows(dominants=2))
    sections = {
        "output_dir": str(root / "run"),
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"], "date": "2026-03-02"},
        "train": {"max_steps": 1, "pairs_per_step": 2, "learning_rate": 3e-4},
        "zero": {"stage": 0},
        "checkpoint": {"export": False},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    return root


def test_runs_of_several_losses_share_a_store(project):
    """Each builds what it takes and is not there yet; a loss without a reference needs none; a
    store of other values stops a run before its first step."""
    run, shared = str(project / "run.yaml"), f"reference.store={project / 'stores' / 'all'}"

    def train(name, *more):
        return ["mpo", "train", run, f"loss.name={name}", f"output_dir={project / name}", *more]

    own = project / "simpo"
    steps = [
        train("dpo", shared),
        train("mpo", shared),
        train("ipo", shared),
        train("own_losses:Nearer", shared, "loss.pairs=both", f"output_dir={project / 'both'}"),
        train("simpo"),
        ["mpo", "precompute", run, "loss.name=simpo"],
        ["mpo", "train", run, f"output_dir={own}", "loss.name=orpo"],
        ["mpo", "train", run, "loss.name=dpo", "loss.retention_weight=1", "--dry-run", "--json"],
        ["mpo", "validate", run, "loss.name=sft"],
        [
            "mpo",
            "train",
            run,
            "loss.name=dpo",
            "model.lora.rank=2",
            "reference.mode=live",
            f"output_dir={project / 'live'}",
        ],
    ]
    dpo, mpo, ipo, both, simpo, no_store, other, dry, validated, live = commands(steps, project)
    for done in (dpo, mpo, ipo, both, simpo, live):
        assert done["status"] == 0, done["text"]
    assert "Reference store of target pairs:" in dpo["text"] and "loss 0.6931" in dpo["text"]
    assert "Reference store:" not in dpo["text"] and "Reference store:" in mpo["text"]
    assert "Reference store" not in ipo["text"] and "(8 sequences)" in ipo["text"]
    # both sides, and of each the chosen answer alone: no other stores
    assert "Reference store" not in both["text"] and "loss 1.0000" in both["text"]
    assert sorted(
        path.name for path in (project / "stores").glob("all*") if "gaps" not in path.name
    ) == [
        "all",
        "all-target",
    ]
    assert not list(own.glob("reference*"))
    assert no_store["status"] == 2 and "loss.name=simpo takes nothing" in no_store["text"]
    assert other["status"] == 2 and "loss.name is 'simpo' there and 'orpo' here" in other["text"]
    told = json.loads(dry["text"].strip().splitlines()[-1])
    assert told["reference_sequences"] == 12 and "dominant pairs for L2" in told["loss"]
    assert "sft (per tokens), trains on chosen target answers" in validated["text"]
    assert "loss 0.6931" in live["text"] and not list((project / "live").glob("reference*"))
    for path in (project / "dpo", project / "ipo"):
        result = json.loads((path / "result.json").read_text())
        assert result["loss"] == path.name and result["gap_scale"] == 1


def test_a_store_of_another_model_is_found_before_the_first_step(project):
    """The loss would not begin at log 2."""
    from safetensors.torch import load_file, save_file

    store = project / "stores" / "wrong"
    run = str(project / "run.yaml")
    options = ["loss.name=dpo", f"reference.store={store}"]
    (built,) = commands(
        [["mpo", "precompute", run, *options, f"output_dir={project / 'a'}"]], project
    )
    assert built["status"] == 0, built["text"]
    values = store.with_name("wrong-target") / "values.safetensors"
    kept = load_file(values)
    kept["mean_logp"][0] += 0.5
    save_file(kept, values)
    (found,) = commands([["mpo", "train", run, *options, f"output_dir={project / 'b'}"]], project)
    assert found["status"] == 2
    assert re.search(r"dpo is \d\.\d+ \(should be 0\.693147\)", found["text"])
    shutil.rmtree(project / "b")
