"""The folder of one run: what lies where, and whose it is.

config.json           the configuration, and a digest of the rows: what makes it this run; and the number of threads that it began with
metrics.jsonl         one line a logged step
dropped_rows.jsonl    rows left out, with reasons (only with data.on_bad_row=drop)
reference/            the reference store
gaps_before/          gaps and pooled hidden states of the measured rows before training
checkpoints/          step-00000010, ...
model/                the trained model, a Hugging Face folder
result.json result.png    the table and its picture; their presence says that the run is finished
.lock                 held by the process that is at work here
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file

from mpo.config import Config
from mpo.data import BadRow
from mpo.errors import UserError
from mpo.files import new_folder, read_json, to_json, write_json
from mpo.scoring import Gaps

LOCK = ".lock"
MAY_CHANGE = {"output_dir", "log_every", "checkpoint", "track", "zero"}
"""Sections that do not change what a run computes, so an interrupted one may go on with others."""


class OutputFolder:
    """Paths and small files of a run's output folder. Until it is opened it touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.metrics = root / "metrics.jsonl"
        self.dropped = root / "dropped_rows.jsonl"
        self.reference = root / "reference"
        self.before = root / "gaps_before"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.result = root / "result.json"
        self.plot = root / "result.png"
        self._lock: TextIO | None = None

    def open(self, config: Config, rows_digest: str) -> bool:
        """Claims the folder for this run. Returns whether it holds an interrupted run of the same configuration.

        Raises:
            UserError: the folder holds another run, a finished one, or files that are no run's; or another process is at work in it.
        """
        mine = {"config": config.model_dump(mode="json"), "rows": rows_digest, "threads": torch.get_num_threads()}
        another = "Choose another output_dir (for example output_dir=runs/second) or delete the folder."
        is_empty = not self.root.exists() or all(path.name == LOCK for path in self.root.iterdir())
        if not is_empty and not self.config.is_file():
            raise UserError(f"output_dir {self.root} is not empty and holds no MPO run. {another}")
        self._claim()
        if not self.config.is_file():
            write_json(self.config, mine)
            return False
        theirs = read_json(self.config)
        differing = _differences(_identity(theirs), _identity(mine))
        if differing:
            raise UserError(f"output_dir {self.root} holds another run: {'; '.join(differing)}. {another}")
        if self.result.is_file():
            raise UserError(f"output_dir {self.root} holds the finished run of this configuration. {another}")
        return True

    def other_threads(self) -> int | None:
        """How many CPU threads the run began with, where this process has another number of them; a CPU's sums depend on it."""
        began_with = read_json(self.config).get("threads")
        return None if began_with == torch.get_num_threads() else began_with

    def _claim(self) -> None:
        """Holds the folder until this process ends, however it ends. File systems without locks are not guarded."""
        if self._lock is not None:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        lock = open(self.root / LOCK, "a+", encoding="utf-8")  # stays open as long as this object
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"Another process ({lock.read() or 'unknown'}) is at work in output_dir {self.root}. Ranks outlive a launcher that is "
                "killed: wait for it, or end it and run the same command again, which goes on from the newest checkpoint."
            ) from error
        except OSError:
            return
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock

    def write_dropped(self, rows: Sequence[BadRow]) -> None:
        """Writes the rows that were left out, one JSON object a line."""
        self.dropped.write_text("".join(to_json(asdict(r)) + "\n" for r in rows), encoding="utf-8")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")

    def truncate_metrics(self, steps: int) -> None:
        """Removes lines of steps that a checkpoint does not have, which will be computed again."""
        if self.metrics.is_file():
            rows = [row for row in read_metrics(self.metrics) if row["step"] <= steps]
            self.metrics.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")

    def save_gaps_before(self, gaps: Gaps) -> None:
        """Keeps the gaps before training, which a resumed run can no longer measure."""
        with new_folder(self.before) as temporary:
            save_file({k: v.contiguous() for k, v in vars(gaps).items()}, temporary / "gaps.safetensors")

    def load_gaps_before(self) -> Gaps | None:
        """The kept gaps, or None where there are none yet."""
        path = self.before / "gaps.safetensors"
        return Gaps(**load_file(path)) if path.is_file() else None

    def listing(self) -> list[str]:
        """Names of what the run left, for people."""
        return [p.name for p in (self.model, self.metrics, self.result, self.plot, self.dropped) if p.exists()]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    return {"rows": run.get("rows"), **{k: v for k, v in run.get("config", {}).items() if k not in MAY_CHANGE}}


def _differences(theirs: Any, mine: Any, where: str = "") -> list[str]:
    """`section.field: old there, new here` for every leaf that differs."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = dict.fromkeys([*theirs, *mine])
        return [d for k in keys for d in _differences(theirs.get(k), mine.get(k), f"{where}.{k}" if where else k)]
    if theirs == mine:
        return []
    if where == "rows":
        return ["the training rows differ"]
    return [f"{where} is {theirs!r} there and {mine!r} here"]
