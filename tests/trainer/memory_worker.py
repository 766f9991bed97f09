"""What real engines keep in memory, for test_memory.py: python memory_worker.py CONFIG CELLS.json >
one JSON line a cell

Each cell is a list of overrides. Counted are the bytes of all tensors at the end of the second
step's backward, when weights, gradients and the optimizer's state exist together.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_model import mpo_batch, some_sequences

from mpo.config import Config, load_config
from mpo.models.forward import bind_mpo_forward
from mpo.models.loading import load_model
from mpo.runtime.ranks import leave, start
from mpo.training import memory
from mpo.training.engine import build_engine, deepspeed_settings, partitioned_loading


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors, by address."""
    gc.collect()
    tensors = [
        value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)
    ]
    both = [
        tensor
        for value in tensors
        for tensor in (value, value.grad if value.is_leaf else None)
        if tensor is not None
    ]
    return {
        storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in both)
    }


def measure(config: Config) -> int:
    # held, so that no address is used again: DeepSpeed lets go of an engine only when the next one
    # comes
    before = storages()
    settings = deepspeed_settings(config)
    with partitioned_loading(settings):
        engine, _ = build_engine(
            bind_mpo_forward(load_model(config.model), config.loss), config, settings
        )
    batch = mpo_batch(some_sequences())
    batch = dataclasses.replace(
        batch, pooled_reference=torch.randn(2, engine.module.config.hidden_size)
    )
    held = 0
    for _ in range(2):
        engine.backward(engine(batch=batch).loss, scale_wrt_gas=False)
        held = sum(
            storage.nbytes() for address, storage in storages().items() if address not in before
        )
        engine.step()
    engine.destroy()
    return held


def main(configuration: Path, cells: list[list[str]]) -> None:
    start()
    linear = torch.nn.functional.linear
    for cell in cells:
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there for the rest of the process
        config = load_config(configuration, cell)
        size = memory.size_of(config.model)
        result: dict[str, Any] = {
            "computed": memory.per_gpu(config, size, 0, 1),
            "size": size._asdict(),
            "held": measure(config),
        }
        print(json.dumps(result), flush=True)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
