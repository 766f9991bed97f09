"""The optimizer where it differs between a GPU and a CPU, and its guard."""

import math

import pytest
import torch
from test_model import Count

from mpo.training import engine
from mpo.training.engine import OptimizerGuard
from mpo.training.portable import _make_states


@pytest.mark.parametrize(
    ("place", "value", "is_dropped"),
    [
        (0, math.nan, True),
        (39, math.nan, True),
        (17, math.inf, True),
        (17, -math.inf, True),
        (17, 3e38, False),  # whose square is none in float32
        (17, -3e38, False),
        (0, 0.0, False),
    ],
)
def test_gradients_that_are_not_finite_are_dropped_after_one_look(place, value, is_dropped):
    """Of forty parameters, an empty one among them."""
    parameters = [torch.nn.Parameter(torch.zeros(i % 5)) for i in range(1, 41)]
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # without a gradient
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    guard = OptimizerGuard(optimizer, 0)
    for parameter in parameters[:-1]:
        parameter.grad = torch.full_like(parameter, 0.5)
    parameters[place if place != 39 else 38].grad[-1] = value
    with Count() as count:
        optimizer.step()
    reads = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
    assert sum(n for op, n in count.calls.items() if op.name() in reads) == 1
    assert guard._dropped == is_dropped
    assert all(not p.any() for p in parameters) == is_dropped


@pytest.mark.parametrize(("accelerator", "on_a_gpu"), [("cuda", True), ("cpu", False)])
def test_a_gpu_steps_in_one_kernel(accelerator, on_a_gpu, monkeypatch):
    monkeypatch.setattr(
        engine, "get_accelerator", lambda: type("A", (), {"device_name": lambda _: accelerator})()
    )
    assert engine._steps_on_a_gpu() == on_a_gpu


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_a_converted_checkpoint_counts_steps_where_the_optimizer_reads_them(fused, device):
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)], fused=fused)
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    _make_states(optimizer, 0, 7, [weight])
    count = optimizer.state[weight]["step"]
    assert count.device.type == device and count.dtype == torch.float32
    assert device == "meta" or count == 7
