"""Many short runs in one process group, for test_exactness.py.

    python -m torch.distributed.run ... exactness_worker.py CONFIG CELLS.json

CELLS.json holds [{"name": output folder beside CONFIG, "overrides": [...]}, ...], with "kernel"
where one of flash.py stands in and AdamW steps as on a GPU. Each cell is one call of
`mpo.training.train.train`, the function behind `mpo train`. Beside what the run itself leaves in
its folder, rank 0 writes what only the live engine knows:

    moments.safetensors   AdamW's first moment of every trained parameter after the last step,
                          gathered. It is linear in the gradients: it shows a wrong scale of them,
                          to which AdamW's step is blind, and does not blow up their rounding as
                          that step does.
    observed.json         `gathers`: per micro-batch, ZeRO-3's all-gathers in order as [module,
                          parameter, "forward" or "backward"].
                          `attention_calls`: per micro-batch, forward calls of the first block's
                          attention.
                          `optimizer`: the class that steps. `fused`: whether in one kernel.
                          `offloads_parameters`: whether ZeRO-3 keeps those not in use on the host.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import flash
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file

import mpo.training.engine
import mpo.training.run
import mpo.training.train
from mpo.config import load_config
from mpo.runtime.ranks import is_main


class Observer:
    """What one run's engine does, seen through hooks."""

    def __init__(self) -> None:
        self.gathers: list[list[tuple[str, str, str]]] = []
        self.attention_calls: list[int] = []
        self._engine: Any = None
        self._training = False  # in a forward with gradients, or in the backward that follows it
        self._fetching: torch.nn.Module | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the engine that `mpo.training.train.train` builds is watched from its first
        call on."""
        build = mpo.training.run.build_engine
        fetch = PartitionedParameterCoordinator.fetch_sub_module

        def build_engine(*arguments: Any) -> Any:
            built = build(*arguments)
            self._watch(built[0])
            return built

        def fetch_sub_module(
            coordinator: Any, module: torch.nn.Module, *arguments: Any, **options: Any
        ) -> None:
            self._fetching = module
            fetch(coordinator, module, *arguments, **options)

        mpo.training.run.build_engine = build_engine
        PartitionedParameterCoordinator.fetch_sub_module = fetch_sub_module
        try:
            yield
        finally:
            mpo.training.run.build_engine = build
            PartitionedParameterCoordinator.fetch_sub_module = fetch

    def _watch(self, engine: Any) -> None:
        self._engine = engine
        modules = {module: name for name, module in engine.module.named_modules()}
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        # before DeepSpeed's, which begins to gather
        engine.module.register_forward_pre_hook(self._forward_begins, prepend=True)
        first_attention = next(
            module for module, name in modules.items() if name.endswith("layers.0.self_attn")
        )
        first_attention.register_forward_pre_hook(self._attention_called)

        def counted(gather: Any) -> Any:
            def all_gather_coalesced(parameters: Any, *arguments: Any, **options: Any) -> Any:
                parameters = list(parameters)
                if self._training:
                    phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
                    self.gathers[-1].extend(
                        (modules[self._fetching], names[p], phase) for p in parameters
                    )
                return gather(parameters, *arguments, **options)

            return all_gather_coalesced

        for parameter in names:
            # ZeRO-3: the coordinator calls this method of a group's first parameter for all of the
            # group
            if hasattr(parameter, "ds_id"):
                parameter.all_gather_coalesced = counted(parameter.all_gather_coalesced)

    def _forward_begins(self, *_: Any) -> None:
        self._training = torch.is_grad_enabled()
        if self._training:
            self.gathers.append([])
            self.attention_calls.append(0)

    def _attention_called(self, *_: Any) -> None:
        if self._training:
            self.attention_calls[-1] += 1

    def write(self, folder: Path) -> None:
        """Called by all ranks after the run."""
        optimizer = self._engine.optimizer
        moments = {}
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                moment = safe_get_full_optimizer_state(parameter, "exp_avg")
                # stage 0 in fp32: torch's optimizer, with nothing of DeepSpeed's around it
                if moment is None:
                    moment = optimizer.state[parameter]["exp_avg"]
                moments[name] = moment.detach().cpu().clone()
        if is_main():
            save_file(moments, folder / "moments.safetensors")
            observed = {
                "gathers": self.gathers,
                "attention_calls": self.attention_calls,
                "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
                "fused": bool(optimizer.param_groups[0].get("fused")),
                "offloads_parameters": getattr(optimizer, "offload_param", False),
            }
            (folder / "observed.json").write_text(json.dumps(observed))


def main(configuration: Path, cells: list[dict[str, Any]]) -> None:
    mpo.training.train.plot_run = lambda *_: None  # drawing takes longer than the run
    linear = torch.nn.functional.linear
    for cell in cells:
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own there for the rest of the process
        folder = configuration.with_name(cell["name"])
        print(f"-- {folder.name}", flush=True)
        observer = Observer()
        kernel = flash.standing_in(cell["kernel"]) if "kernel" in cell else nullcontext()
        mpo.training.engine._steps_on_a_gpu = lambda: "kernel" in cell  # noqa: B023
        with observer.watching(), kernel:
            mpo.training.train.train(
                load_config(configuration, [f"output_dir={folder}", *cell["overrides"]])
            )
        observer.write(folder)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
