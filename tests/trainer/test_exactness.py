"""Exactness: however a run is split over ranks, ZeRO stages and micro-batches, it computes what one
plain process computes, to rounding.

The runs of a module share two process groups (exactness_worker.py), one of a single rank and one of
two. Each run takes four steps, the last of a single pair, so that on two ranks one of them has only
a filler. Compared with ZeRO-0, one rank, one pair per micro-batch:

    losses and gaps       of every step
    first moments         AdamW's running mean of the clipped gradients: a wrong scale of them, or
                          one lost micro-batch, shows here
    weights               at the end
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flash
import pytest
import torch
import yaml
from plain_training import train_plainly
from safetensors.torch import load_file
from tiny import apart, native_rows, save_model, write_rows

from benchmarks.instruments.covering import covering
from mpo.config import load_config
from mpo.training.run_folder import read_metrics

# DeepSpeed leaves parameters as small as ours whole unless told so
PARTITION_ALL = "stage3_param_persistence_threshold: 0"
NO_LOOKAHEAD = f"{PARTITION_ALL}, stage3_max_reuse_distance: 0, stage3_prefetch_bucket_size: 0"


RECOMPUTE = {
    "kept": ["model.activation_checkpointing=false"],
    "recomputed": ["model.activation_checkpointing=true"],
    "selective": ["model.activation_checkpointing=selective"],
}


class Cell(NamedTuple):
    """One way of computing the run."""

    architecture: str
    stage: int
    ranks: int
    split: str
    recompute: str

    @property
    def name(self) -> str:
        return f"{self.architecture}-zero{self.stage}-x{self.ranks}-{self.split}-{self.recompute}"

    @property
    def overrides(self) -> list[str]:
        size = (
            "train.tokens_per_micro_batch=500"
            if self.split == "tokens"
            else f"train.pairs_per_micro_batch={self.split}"
        )
        return [
            f"model.path={self.architecture}",
            size,
            *stage(self.stage),
            *RECOMPUTE[self.recompute],
        ]


FACTORS: tuple[tuple, ...] = (
    ("llama", "llama-tied", "gemma2", "gemma3", "qwen2"),  # llama-tied: as Llama-3.2
    (0, 1, 2, 3),
    (1, 2),
    ("1", "2", "3", "tokens"),
    tuple(RECOMPUTE),
)
ALL = [Cell(*values) for values in itertools.product(*FACTORS)]
PLAIN = {architecture: Cell(architecture, 0, 1, "1", "kept") for architecture in FACTORS[0]}


def stage(number: int, zero3: str = PARTITION_ALL) -> list[str]:
    return [
        f"zero.stage={number}",
        *([f"zero.deepspeed={{zero_optimization: {{{zero3}}}}}"] if number == 3 else []),
    ]


def interactions(cell: Cell) -> set[tuple]:
    """Every two of the cell's choices, and the three that decide how gradients meet: stage, ranks
    and recomputation."""
    pairs = itertools.combinations(enumerate(cell), 2)
    return {*pairs, ((1, cell.stage), (2, cell.ranks), (4, cell.recompute))}


def covering_cells() -> list[Cell]:
    """Few cells that hold every interaction of the full product."""
    axes = dict(zip(Cell._fields, FACTORS, strict=True))
    together = [*itertools.combinations(axes, 2), ("stage", "ranks", "recompute")]
    cells = [Cell(**choices) for choices in covering(axes, together)]
    return [cell for cell in cells if cell not in PLAIN.values()]


# Each loss on two ranks, cut and recomputed in another way; compared with plain training itself.
# The hyper-parameters are none of the defaults.
LOSSES: dict[str, list[str]] = {
    "dpo": ["loss.beta=0.3", *stage(2), "train.pairs_per_micro_batch=2"],
    "ipo": ["loss.tau=0.7", "loss.pairs=both", *stage(0), "train.tokens_per_micro_batch=500"],
    "cpo": [
        *("loss.beta=0.2", "loss.alpha=0.7", "loss.pairs=both", "loss.retention_weight=0.6"),
        *("train.pairs_per_micro_batch=3", *stage(1)),
    ],
    "kto": [
        *("loss.beta=0.3", "loss.desirable_weight=1.5", "loss.undesirable_weight=0.7"),
        *("loss.pairs=both", "loss.retention_weight=0.6", *stage(2)),
        "train.tokens_per_micro_batch=300",
    ],
    "orpo": ["loss.beta=0.4", "loss.head=logits", *stage(1), "train.pairs_per_micro_batch=1"],
    "simpo": ["loss.beta=1.5", "loss.gamma=0.4", *stage(3), "train.pairs_per_micro_batch=2"],
    "length_dpo": [
        *("loss.beta=0.2", "loss.alpha=0.05", "loss.retention_weight=0.3", *stage(2)),
        *("train.tokens_per_micro_batch=500", *RECOMPUTE["selective"]),
    ],
    "sft": [*stage(2), "train.tokens_per_micro_batch=300", *RECOMPUTE["recomputed"]],
    "own_losses:squared": [*stage(3), "train.pairs_per_micro_batch=1"],
    "own_losses:Lift": ["loss.rate=0.3", "loss.pairs=both", *stage(1)],
}


def loss_folder(name: str) -> str:
    return f"loss-{name.replace(':', '-')}"


def loss_overrides(name: str) -> list[str]:
    return ["model.path=llama", f"loss.name={name}", *LOSSES[name]]


# And biases beside kept products: the linear layer that DeepSpeed puts in place under ZeRO-3 adds
# them to the product itself.
COVERING = [*covering_cells(), Cell("qwen2", 3, 2, "2", "selective")]


def gathering(
    architecture: str, name: str, *overrides: str, zero3: str = NO_LOOKAHEAD
) -> dict[str, Any]:
    return {
        "name": f"gather-{architecture}-{name}",
        "overrides": [f"model.path={architecture}", *overrides, *stage(3, zero3)],
    }


GATHERING = [
    gathering(architecture, name, *overrides)
    for architecture in ("llama", "llama-tied")
    for name, overrides in (
        ("one-pair", ["train.pairs_per_micro_batch=1"]),
        ("three-pairs", ["train.pairs_per_micro_batch=3"]),
        ("chunks", ["train.pairs_per_micro_batch=3", "loss.chunk_bytes=2048"]),
        ("logits", ["train.pairs_per_micro_batch=2", "loss.head=logits"]),
    )
] + [
    gathering("llama", "recomputed", "train.pairs_per_micro_batch=2", *RECOMPUTE["recomputed"]),
    gathering("llama", "lookahead", "train.pairs_per_micro_batch=1", zero3=PARTITION_ALL),
]
ADAPTERS = ["model.path=llama", "model.lora.rank=2"]
ONE_CALL = [
    {"name": f"{kernel}-{how}", "overrides": [f"model.path={model}", *more], "kernel": kernel}
    for model, kernel in (("llama", flash.PYTORCHS), ("gemma2", flash.FLASH_ATTN))
    for how, more in (
        ("zero3-selective", [*stage(3), *RECOMPUTE["selective"], "train.pairs_per_micro_batch=2"]),
        ("zero2", [*stage(2), "train.tokens_per_micro_batch=500"]),
        *([("zero0", stage(0))] if model == "llama" else []),
    )
]
UNMOVED = {
    name: [*ADAPTERS, f"train.seed={seed}", "train.learning_rate=1e-30", "train.max_steps=1"]
    for name, seed in (("adapters-seed-6", 6), ("adapters-seed-6-again", 6), ("adapters-seed-7", 7))
}


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("parallel")
    for architecture in FACTORS[0]:
        save_model(root / architecture, tokenizer, architecture)
    write_rows(root / "train.jsonl", native_rows(dominants=4))
    configuration = {
        "output_dir": str(root / "run"),
        "model": {"path": "llama", "dtype": "float32"},
        "data": {"train": ["train.jsonl"], "eval_rows_per_language": 1, "max_length": 256},
        # No option has the value at which it would not be missed. Decay moves the weights about as
        # much as the gradients do.
        "loss": {"beta": 1.7, "retention_weight": 0.6},
        # 10 pairs of 8 rows in steps of 3, 3, 3 and 1. The norm is clipped in some steps and not in
        # others.
        "train": {
            **{"epochs": 1.25, "pairs_per_step": 3, "seed": 5, "max_grad_norm": 0.9},
            **{"learning_rate": 3e-4, "schedule": "linear", "warmup_ratio": 0.3},
            **{"weight_decay": 4.0, "adam_betas": [0.8, 0.95]},
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(configuration))
    return root


def compute(project: Path, ranks: int, runs: list[dict[str, Any]], timeout: float = 900) -> str:
    """All runs, one after the other, in one process group. Returns what was printed."""
    cells = project / f"cells-{ranks}.json"
    cells.write_text(json.dumps(runs))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    worker = [
        str(Path(__file__).with_name("exactness_worker.py")),
        str(project / "run.yaml"),
        str(cells),
    ]
    result = subprocess.run(
        [*launcher, *worker], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


def as_runs(cells: list[Cell], ranks: int) -> list[dict[str, Any]]:
    return [
        {"name": cell.name, "overrides": cell.overrides} for cell in cells if cell.ranks == ranks
    ]


@pytest.fixture(scope="module")
def computed(project):
    """The folder of every run that is not marked slow."""
    cells = [*PLAIN.values(), *COVERING]
    plain = {"name": "adapters", "overrides": ADAPTERS}
    split = {
        "name": "adapters-zero3",
        "overrides": [*ADAPTERS, *stage(3), *RECOMPUTE["recomputed"]],
    }
    planted = [
        {"name": f"planted-{name}", "overrides": [*PLAIN["llama"].overrides, *overrides]}
        for name, overrides in PLANTED.items()
    ]
    unmoved = [{"name": name, "overrides": overrides} for name, overrides in UNMOVED.items()]
    compute(project, 1, [*as_runs(cells, 1), plain, *planted, *unmoved])
    compute(project, 2, [*as_runs(cells, 2), *GATHERING, *ONE_CALL, split])
    return project


@pytest.fixture(scope="module")
def computed_losses(project):
    """The folder of the runs with other losses."""
    runs = [{"name": loss_folder(name), "overrides": loss_overrides(name)} for name in LOSSES]
    compute(project, 2, runs)
    return project


class Outcome(NamedTuple):
    """What a run computed."""

    steps: list[dict[str, Any]]
    moments: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]
    """The weights before; of adapters nothing."""
    observed: dict[str, Any]


def outcome(folder: Path) -> Outcome:
    weights = next(folder.glob("model/*.safetensors"))
    observed = json.loads((folder / "observed.json").read_text())
    base = Path(json.loads((folder / "config.json").read_text())["config"]["model"]["path"])
    start = load_file(base / "model.safetensors") if weights.name == "model.safetensors" else {}
    return Outcome(
        read_metrics(folder / "metrics.jsonl"),
        load_file(folder / "moments.safetensors"),
        load_file(weights),
        start,
        observed,
    )


def check_same(ours: Outcome, plain: Outcome) -> None:
    """Equal to rounding."""
    assert (
        [row["pairs"] for row in ours.steps]
        == [row["pairs"] for row in plain.steps]
        == [3, 3, 3, 1]
    )
    assert not any(row["skipped"] for row in ours.steps)
    for one, two in zip(ours.steps, plain.steps, strict=True):
        assert one["gap"] == pytest.approx(two["gap"], abs=1e-5), one["step"]
    check_close(ours, plain.steps, plain.moments, plain.weights)


def check_close(
    ours: Outcome,
    steps: list[dict[str, Any]],
    moments: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    limit: float = 1e-3,
) -> None:
    """Losses of every step within half the limit, moments in the norm of each parameter, and what
    training added to the weights.

    Of that one norm for all: AdamW's step makes the rounding of a gradient that is none, as of
    Qwen2's key biases, as large as any. Seen are at most 7e-5 in a loss, 3e-5 in a moment and 3e-5
    in what was added; weights that did not move would be off by 1.
    """
    for one, two in zip(ours.steps, steps, strict=True):
        # L2 is not computed for a loss that does without
        for name in ("loss", "l1", *(["l2"] if one["l2"] is not None else [])):
            assert one[name] == pytest.approx(two[name], rel=limit / 2, abs=1e-8), (
                name,
                one["step"],
            )
    assert ours.moments.keys() == moments.keys() and ours.weights.keys() == weights.keys()
    for name in moments:
        assert (ours.moments[name] - moments[name]).norm() <= limit * moments[name].norm(), name
    assert apart(ours.weights, weights, ours.start) <= limit


@pytest.mark.parametrize("architecture", FACTORS[0])
def test_the_plainest_run_is_plain_training(computed, architecture):
    """Of a step, also of the smaller last one, the mean over its own pairs; clipped by the true
    norm; decayed."""
    config = load_config(computed / "run.yaml", PLAIN[architecture].overrides)
    steps, moments, weights = train_plainly(config)
    plain = outcome(computed / PLAIN[architecture].name)
    check_close(plain, steps, moments, {name: weights[name] for name in plain.weights})


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_on_two_ranks_is_plain_training(computed_losses, name):
    """Also where the rows of a step share a number: the tokens of its chosen answers."""
    config = load_config(computed_losses / "run.yaml", loss_overrides(name))
    steps, moments, weights = train_plainly(config)
    ours = outcome(computed_losses / loss_folder(name))
    assert [row["l2"] is None for row in ours.steps] == [config.loss.retention_weight == 0] * 4
    assert {row["loss_name"] for row in ours.steps} == {name}
    if name == "kto":
        assert [row["kl"] for row in ours.steps] == pytest.approx(
            [s["kl"] for s in steps], abs=1e-4
        )
        assert any(step["kl"] > 0.01 for step in steps)
    check_close(ours, steps, moments, {key: weights[key] for key in ours.weights})


# one per cent of everything that a step multiplies with, and what decides which rows it has
PLANTED = {
    "learning-rate": ["train.learning_rate=3.03e-4"],
    "beta": ["loss.beta=1.717"],
    "lambda": ["loss.retention_weight=0.606"],
    "decay": ["train.weight_decay=4.04"],
    "first-beta": ["train.adam_betas=[0.808,0.95]"],
    "second-beta": ["train.adam_betas=[0.8,0.9405]"],
    "norm": ["train.max_grad_norm=0.909"],
    "warm-up": ["train.warmup_ratio=0.2"],
    "schedule": ["train.schedule=constant"],
    "seed": ["train.seed=6"],
}


@pytest.mark.parametrize("planted", PLANTED)
def test_one_per_cent_of_any_option_is_seen(computed, planted):
    plain = outcome(computed / PLAIN["llama"].name)
    with pytest.raises(AssertionError):
        check_close(
            outcome(computed / f"planted-{planted}"), plain.steps, plain.moments, plain.weights
        )


def test_the_chosen_cells_hold_every_interaction():
    held = set().union(*(interactions(cell) for cell in [*COVERING, *PLAIN.values()]))
    assert held == set().union(*map(interactions, ALL)) and len(COVERING) < 30


@pytest.mark.parametrize("cell", COVERING, ids=lambda cell: cell.name)
def test_same_losses_moments_and_weights(computed, cell):
    ours, plain = outcome(computed / cell.name), outcome(computed / PLAIN[cell.architecture].name)
    check_same(ours, plain)
    assert set(ours.observed["attention_calls"]) == {1 if cell.recompute == "kept" else 2}


@pytest.mark.parametrize("run", ONE_CALL, ids=lambda run: run["name"])
def test_what_a_gpu_does_in_one_call_changes_nothing(computed, run):
    """Attention of a row, and a step of AdamW."""
    architecture = "llama" if run["kernel"] == flash.PYTORCHS else "gemma2"
    ours, plain = outcome(computed / run["name"]), outcome(computed / PLAIN[architecture].name)
    check_same(ours, plain)
    assert ours.observed["fused"] and not plain.observed["fused"]


def test_adapters_with_frozen_weights_recomputed_under_zero3(computed):
    """Frozen parameters are gathered again for the recomputation, which DeepSpeed before 0.19.8 got
    wrong."""
    ours = outcome(computed / "adapters-zero3")
    check_same(ours, outcome(computed / "adapters"))
    assert set(ours.observed["attention_calls"]) == {2}


def test_adapters_begin_where_their_seed_says(computed):
    """Their first matrices are random, and these runs leave them as they were."""
    first, again, other = (outcome(computed / name).weights for name in UNMOVED)
    names = [name for name in first if "lora_A" in name]
    assert names and all(torch.equal(first[name], again[name]) for name in names)
    assert all(not torch.equal(first[name], other[name]) for name in names)


def head_gathers(run: Outcome) -> list[list[tuple[str, str]]]:
    """Per micro-batch, the gathers of the weight that the LM head reads, as (for which module, in
    which phase)."""
    weight = "lm_head.weight" if "lm_head.weight" in run.moments else "model.embed_tokens.weight"
    return [
        [(module, phase) for module, parameter, phase in batch if parameter == weight]
        for batch in run.observed["gathers"]
    ]


@pytest.mark.parametrize(
    "run", [run["name"] for run in GATHERING if "lookahead" not in run["name"]]
)
def test_the_head_is_gathered_once_in_forward_and_once_in_backward(computed, run):
    """However many pairs and chunks the micro-batch has. A tied weight is gathered for the
    embedding too, likewise."""
    ours = outcome(computed / run)
    once = [("lm_head", "forward"), ("lm_head", "backward")]
    if "tied" in run:
        once = [("model.embed_tokens", "forward"), *once, ("model.embed_tokens", "backward")]
    assert len(head_gathers(ours)) >= 4 and all(gathers == once for gathers in head_gathers(ours))
    check_same(ours, outcome(computed / PLAIN["llama-tied" if "tied" in run else "llama"].name))


def test_with_look_ahead_the_head_is_not_gathered_more_often(computed):
    """As DeepSpeed is set unless told otherwise: it gathers ahead of use, so another module's call
    may gather for the head."""
    gathers = head_gathers(outcome(computed / "gather-llama-lookahead"))
    assert {tuple(phase for _, phase in batch) for batch in gathers} == {("forward", "backward")}
    assert any(module != "lm_head" for batch in gathers for module, _ in batch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FACTORS[0])
def test_same_losses_moments_and_weights_in_the_full_product(project, architecture):
    """Every stage, number of ranks, split and recomputation: 96 runs per architecture."""
    cells = [
        cell
        for cell in ALL
        if cell.architecture == architecture and not (project / cell.name).exists()
    ]
    for ranks in FACTORS[2]:
        compute(project, ranks, as_runs(cells, ranks))
    plain = outcome(project / PLAIN[architecture].name)
    wrong = {}
    for cell in ALL:
        if cell.architecture == architecture:
            try:
                check_same(outcome(project / cell.name), plain)
            except AssertionError as error:
                wrong[cell.name] = str(error).splitlines()[0]
    assert not wrong
