"""train.deterministic: set for the run, given back after it, and refused where it cannot be."""

import os

import pytest
import torch

from mpo.config import load_config
from mpo.runtime.determinism import NO_SWITCH_SUMS, WORKSPACES, deterministic
from mpo.runtime.errors import UserError
from mpo.training import engine, precompute, train

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "PYTORCH_TUNABLEOP_ENABLED")


def state():
    return (
        {name: os.environ.get(name) for name in NAMES},
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Ring"},
        {"NCCL_ALGO": "^nvlstree,CollNetDirect,nvls"},
    ],
)
def test_applied_and_given_back(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = state()
    with pytest.raises(KeyboardInterrupt), deterministic(True):
        wanted = {"CUBLAS_WORKSPACE_CONFIG": WORKSPACES[0], "NCCL_ALGO": NO_SWITCH_SUMS, **given}
        assert {name: os.environ[name] for name in wanted} == wanted
        assert state()[1:] == (True, False, False)
        raise KeyboardInterrupt
    assert state() == before
    with deterministic(False):
        assert state() == before


@pytest.mark.parametrize("module", [train, precompute])
def test_runs_are_in_it_before_the_ranks_meet(module, monkeypatch):
    seen = []

    def start():
        seen.append(state())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "start", start)
    function = getattr(module, module.__name__.rpartition(".")[2])
    for value in ("true", "false"):
        with pytest.raises(KeyboardInterrupt):
            function(load_config("demo", [f"train.deterministic={value}"]))
    assert [found[1] for found in seen] == [True, False]
    assert seen[0][0]["NCCL_ALGO"] == NO_SWITCH_SUMS and seen[1][0]["NCCL_ALGO"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "NVLS"),
        ("NCCL_ALGO", "Ring,nvlstree"),
        ("NCCL_ALGO", "^CollNetDirect"),
        ("NCCL_ALGO", "^NVLS"),
        ("PYTORCH_TUNABLEOP_ENABLED", "1"),
    ],
)
def test_what_contradicts_it_is_refused(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    before = state()
    with (
        pytest.raises(UserError, match=f"train.deterministic=true and {name}"),
        deterministic(True),
    ):
        pass
    assert state() == before


def test_attention_that_promises_no_order_is_refused():
    more = ["train.deterministic=true", "model.attention=flex_attention"]
    with pytest.raises(UserError, match=r"train\.deterministic=true.*flex_attention.*packed"):
        engine.refuse_attention(load_config("demo", more), torch.device("cuda"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_gradients_travel_beside_the_backward_on_gpus(stage, on_a_gpu, monkeypatch):
    """Under the stages where DeepSpeed divides gradients; a user may turn it off, and not on."""
    monkeypatch.setattr(engine, "_is_on_a_gpu", lambda: on_a_gpu)
    made = []
    for more in ([], ["zero.deepspeed={zero_optimization: {overlap_comm: false}}"]):
        config = load_config("demo", [f"zero.stage={stage}", "model.dtype=float32", *more])
        made.append(engine.deepspeed_settings(config)["zero_optimization"]["overlap_comm"])
    assert made == [on_a_gpu and stage >= 2, False]
    if stage < 2:
        on = ["zero.deepspeed={zero_optimization: {overlap_comm: true}}"]
        with pytest.raises(UserError, match="overlap_comm=True contradicts False"):
            engine.deepspeed_settings(load_config("demo", [f"zero.stage={stage}", *on]))
