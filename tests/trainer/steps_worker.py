"""What each step of a run does and keeps, in counts: python steps_worker.py COUNTS.json CONFIG
OVERRIDE...

Of every step: operators that it called, values that the host read from the device, kernels that
Triton compiled, and bytes of all tensors that it left.
"""

import collections
import json
import sys
from pathlib import Path
from typing import Any

import torch
from memory_worker import storages
from test_model import Count

from mpo.config import load_config
from mpo.training.step import Stepper
from mpo.training.train import train

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


class Watch(Count):
    """Counts reads of values too, copies from a GPU among them."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(operator, types, args, kwargs)
        given = [x for x in args if isinstance(x, torch.Tensor)]
        came = isinstance(out, torch.Tensor) and out.device.type == "cpu"
        self.reads += operator.name() in READS or (came and any(x.is_cuda for x in given))
        return out


def compilations() -> collections.Counter:
    """Counts what Triton compiles from here on, by the kernel's name."""
    made: collections.Counter = collections.Counter()

    def count(*_, fn: Any, **__) -> None:
        made[fn.name] += 1

    try:
        import triton
    except ImportError:  # it has none for this machine
        return made
    triton.knobs.runtime.jit_post_compile_hook = count
    return made


def held(device: torch.device) -> int:
    living = sum(storage.nbytes() for storage in storages().values())
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else living


def main(place: Path, configuration: str, *overrides: str) -> None:
    rows, step, compiled = [], Stepper.step, compilations()

    def watched(self, *arguments):
        before = compiled.total()
        with Watch() as watch:
            metrics = step(self, *arguments)
        rows.append(
            {
                "operators": watch.calls.total(),
                "reads": watch.reads,
                "compiled": compiled.total() - before,
                "held": held(self.run.device),
                "tokens": metrics.totals.tokens,
            }
        )
        return metrics

    Stepper.step = watched
    train(load_config(configuration, list(overrides)))
    place.write_text(json.dumps(rows, allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
