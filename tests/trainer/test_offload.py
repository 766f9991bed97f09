"""Optimizer and parameters in host memory: the same numbers as without, resumed too, and one
compilation of the CPU Adam."""

import copy
import signal
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from test_exactness import (
    check_same,
    compute,
    outcome,
    project,  # noqa: F401  (a fixture)
    stage,
)
from test_train import interrupt, losses, weights
from tiny import mpo_command

from mpo.config import load_config
from mpo.runtime.errors import UserError
from mpo.training import memory
from mpo.training.cpu_adam import go_on_counting
from mpo.training.engine import deepspeed_settings

OPTIMIZER, PARAMETERS = "zero.offload_optimizer=true", "zero.offload_parameters=true"
RUNS = {
    "zero1-optimizer": [*stage(1), OPTIMIZER],
    "zero2-optimizer": [*stage(2), OPTIMIZER],
    "zero3-optimizer": [*stage(3), OPTIMIZER],
    "zero3-parameters": [*stage(3), PARAMETERS],
    "zero3-both": [*stage(3), OPTIMIZER, PARAMETERS],
    "zero3-both-recompute": [
        *stage(3),
        OPTIMIZER,
        PARAMETERS,
        "train.pairs_per_micro_batch=3",
        "model.activation_checkpointing=true",
    ],
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*stage(0), OPTIMIZER], "zero: offload_optimizer needs stage 1, 2 or 3.*Set zero.stage=2"),
        (
            [*stage(2), PARAMETERS],
            (
                "zero: offload_parameters needs stage 3: under stage 2 every GPU holds all"
                " parameters.*Set zero.stage=3"
            ),
        ),
    ],
)
def test_refused(project, overrides, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        load_config(project / "run.yaml", overrides)


def test_deepspeed_is_told(project):  # noqa: F811
    zero = deepspeed_settings(load_config(project / "run.yaml", RUNS["zero3-both"]))[
        "zero_optimization"
    ]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


def test_computed_memory_moves_to_the_host(project):  # noqa: F811
    size = memory.Size(parameters=1000, trained=1000, vocab=10, hidden=4, intermediate=8, layers=2)

    def of(*overrides):
        config = load_config(project / "run.yaml", ["model.dtype=bfloat16", *overrides])
        return memory.per_gpu(config, size, 16, 2), memory.on_host(config, size, 2)

    (plain, none), (offloaded, host) = of(*stage(3)), of(*RUNS["zero3-both"])
    assert none == 0 and host == 1000 * (16 + 2) / 2
    assert plain["weights"] - offloaded["weights"] == 1000 * 2 / 2
    assert plain["optimizer"] == 1000 * 12 / 2 and plain["gradients"] == 1000 * 4 / 2
    assert (
        offloaded["optimizer"] == offloaded["gradients"] == 0
        and offloaded["activations"] == plain["activations"]
    )


def test_a_missing_compiler_is_named(project, tmp_path):  # noqa: F811
    """Before the weights are loaded and anything is computed with them."""
    nothing = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    options = [f"output_dir={project / 'refused'}", *RUNS["zero2-optimizer"]]
    result = mpo_command("train", str(project / "run.yaml"), *options, **nothing)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        "there is no C++ compiler 'no-such-compiler' on the PATH. Install a C++ compiler and"
        " Python's headers" in result.stderr
    )
    assert (
        not (project / "refused" / "reference").exists() and "Loading weights" not in result.stderr
    )


@pytest.fixture(scope="module")
def compiled(project, tmp_path_factory):  # noqa: F811
    """All runs; the two-rank ones begin with no extension compiled. Returns what these printed."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        printed = []
        for ranks in (2, 1):
            runs = [
                {"name": f"{name}-x{ranks}", "overrides": overrides}
                for name, overrides in RUNS.items()
            ]
            plain = [{"name": "plain", "overrides": stage(0)}] if ranks == 1 else []
            printed.append(compute(project, ranks, [*plain, *runs]))
        yield printed


@pytest.mark.slow
def test_one_rank_compiles_and_says_so(compiled):
    two_ranks, one_rank = compiled
    assert two_ranks.count(
        "Loading DeepSpeed's CPU Adam; its first use on a machine compiles it"
    ) == sum(OPTIMIZER in o for o in RUNS.values())
    assert (
        two_ranks.count("CPU Adam was compiled in") == 1
        and "CPU Adam was compiled in" not in one_rank
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_same_losses_moments_and_weights(compiled, project, name, ranks):  # noqa: F811
    ours = outcome(project / f"{name}-x{ranks}")
    check_same(ours, outcome(project / "plain"))
    assert ours.observed["optimizer"] == (
        "DeepSpeedCPUAdam" if OPTIMIZER in RUNS[name] else "AdamW"
    )
    assert ours.observed["offloads_parameters"] == (PARAMETERS in RUNS[name])


@pytest.mark.slow
def test_wherever_it_is_interrupted_the_optimizer_computes_the_same_bits(compiled):
    """Beside a run of 60 steps, at each of which another optimizer takes over its state."""

    def steps(optimizer, parameter, first, last):
        for step in range(first, last):
            parameter.grad = torch.sin(torch.arange(1000.0) * (step + 1))
            optimizer.step()
        return parameter.detach().clone()

    def begun():
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        return DeepSpeedCPUAdam([parameter], lr=0.01, betas=(0.8, 0.95)), parameter

    whole, weights_of_whole = begun()
    for step in range(60):
        before = weights_of_whole.detach().clone(), copy.deepcopy(whole.state_dict())
        steps(whole, weights_of_whole, step, step + 1)
        other, parameter = begun()
        with torch.no_grad():
            parameter.copy_(before[0])
        other.load_state_dict(before[1])
        go_on_counting(SimpleNamespace(optimizer=SimpleNamespace(optimizer=other)))
        assert torch.equal(steps(other, parameter, step, step + 1), weights_of_whole), step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-optimizer", "zero3-optimizer", "zero3-both"])
def test_interrupted_and_resumed_it_ends_bit_equal(compiled, project, name):  # noqa: F811
    options = [*RUNS[name], "train.epochs=12"]
    whole, out = project / f"{name}-whole", project / f"{name}-stopped"
    for folder in (whole, out):
        if folder == out:
            code, text = interrupt(project, out, 5, signal.SIGTERM, *options)
            assert code == 130 and "The same command goes on" in text, text
        result = mpo_command("train", str(project / "run.yaml"), f"output_dir={folder}", *options)
        assert result.returncode == 0, result.stderr[-3000:]
    assert "Going on from" in result.stdout
    assert torch.equal(losses(out), losses(whole))
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_the_reference_can_be_computed_first(compiled, project):  # noqa: F811
    """`mpo precompute` under the same configuration builds no optimizer, so it must not ask for the
    offloaded one."""
    result = mpo_command(
        "precompute",
        str(project / "run.yaml"),
        f"output_dir={project / 'first'}",
        *RUNS["zero3-both"],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (project / "first" / "reference" / "values.safetensors").is_file()
