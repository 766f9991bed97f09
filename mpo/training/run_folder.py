"""The folder of one run: what lies where, and whose it is. It is read without torch.

config.json           the configuration, and digests of the rows and the model: what makes it this
                      run; and what it began on
metrics.jsonl         one line a logged step
dropped_rows.jsonl    rows left out, with reasons (only with data.on_bad_row=drop)
reference/            the reference store; .reference.lock is held while it is built
reference-target/     likewise, of target pairs, for losses of log-ratios
reference-mismatched-SIDE-SEED/    likewise, of answers to other prompts, for KTO's KL
gaps_before/          gaps and pooled hidden states of the measured rows before training
gaps_after/           the same after it
checkpoints/          step-00000010, ...
model/                the trained model, a Hugging Face folder
result.json result.png    the table and its picture; their presence says that the run is finished
.lock                 held by the process that is at work here
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpo.config import Config
from mpo.data.rows import Finding
from mpo.runtime.claims import Claim, Difference, differences
from mpo.runtime.errors import UserError
from mpo.runtime.files import (
    BadLine,
    json_lines,
    new_file,
    read_object,
    remove_incomplete,
    to_json,
    write_json,
    writing,
)

LOCK = ".lock"
ANOTHER = "Choose another output_dir (for example output_dir=runs/second) or delete the folder."
VERSIONS = {package: version(package) for package in ("torch", "transformers", "deepspeed")}
"""Of what computes. They are no part of a run's identity, but of the last bits of its numbers. Read
once, before anything is written."""
MAY_CHANGE = {"output_dir", "log_every", "checkpoint", "track", "zero"}
"""Sections that do not change what a run computes, so an interrupted one may go on with others."""
KNOWN_BY_CONTENT = {
    "model.path",
    "model.revision",
    "data.train",
    "data.eval",
    "data.date",
    "reference.store",
}
"""Fields that name files, or the date that becomes part of the rows: what lies there counts, not
where."""


class OutputFolder:
    """Paths and small files of a run's output folder. Until it is opened it touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.metrics = root / "metrics.jsonl"
        self.dropped = root / "dropped_rows.jsonl"
        self.reference = root / "reference"
        self.before = root / "gaps_before"
        self.after = root / "gaps_after"
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.result = root / "result.json"
        self.plot = root / "result.png"
        self._claim = Claim(root / LOCK)
        self._unwritten: list[str] = []

    def open(
        self,
        config: Config,
        rows: str,
        model: dict[str, Any],
        threads: int,
        may_be_finished: bool = False,
    ) -> bool:
        """Claims the folder for this run, until this process ends. Returns whether it holds an
        interrupted run of the same configuration.

        Args:
            config: with its data.date settled.
            rows: digest of the rows, `reference.rows_digest`.
            model: digests of the model, `reference.model_identity`.
            threads: CPU threads of this process.
        Raises:
            UserError: the folder holds another run, a finished one (unless it may), or files that
                are no run's or are damaged; it cannot be written to; or another process is at work
                in it.
        """
        mine = {
            "date": config.data.date and config.data.date.isoformat(),
            **_of_run(config, rows, model),
            "threads": threads,
            "versions": VERSIONS,
        }
        self._refuse_what_is_no_run()
        self._take()
        remove_incomplete(self.root)
        if not self.config.is_file():
            write_json(self.config, mine)
            return False
        self._refuse_another_run(mine, may_be_finished)
        return True

    def is_finished(self, config: Config, rows: str, model: dict[str, Any]) -> bool:
        """Whether it holds the finished run of these (see `open`). Writes nothing.

        Raises:
            UserError: it holds another run, or files that are no run's or are damaged.
        """
        self._refuse_what_is_no_run()
        if not self.config.is_file():
            return False
        self._refuse_another_run(_of_run(config, rows, model), may_be_finished=True)
        if not self.result.is_file():
            return False
        self._check_result()
        return True

    def _refuse_what_is_no_run(self) -> None:
        with writing(self.root):
            self._check_kinds()
            foreign = not self.config.is_file() and not self._is_empty()
        if foreign:
            raise UserError(f"output_dir {self.root} is not empty and holds no MPO run. {ANOTHER}")

    def _take(self) -> None:
        """Refuses what another process is at work in."""
        if (holder := self._claim.take()) is not None:
            raise UserError(
                f"Another process ({holder}) is at work in output_dir {self.root}. Ranks outlive a"
                " launcher that is killed: wait for it, or end it and run the same command again,"
                " which goes on from the newest checkpoint."
            )

    def _refuse_another_run(self, mine: dict[str, Any], may_be_finished: bool) -> None:
        differing = differences(_identity(self.read()), _identity(mine))
        if differing:
            listed = "; ".join(map(_in_words, differing))
            raise UserError(f"output_dir {self.root} holds another run: {listed}. {ANOTHER}")
        if self.result.is_file() and not may_be_finished:
            self._check_result()
            raise UserError(
                f"output_dir {self.root} holds the finished run of this configuration. {ANOTHER}"
            )

    def other_threads(self, threads: int) -> int | None:
        """How many CPU threads the run began with, where this process has another number of them; a
        CPU's sums depend on it."""
        began_with = self.read().get("threads")
        return None if began_with == threads else began_with

    def other_versions(self) -> list[str]:
        """Libraries that the run began with in another version than they have now."""
        began_with = self.read().get("versions") or {}
        return [
            f"{name} {began_with[name]} (now {now})"
            for name, now in VERSIONS.items()
            if began_with.get(name, now) != now
        ]

    def read(self) -> dict[str, Any]:
        """What config.json says of the run, with every field of its configuration.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.root} holds no MPO run (no config.json). Give a run's output folder."
            )
        kept = read_object(self.config)
        try:
            return {
                **kept,
                "config": Config.model_validate(kept.get("config")).model_dump(mode="json"),
            }
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in ("config", *problem["loc"]))
            raise UserError(
                f"{self.config} is no run's configuration of this version ({where}:"
                f" {problem['msg']}). Restore the file, or choose another output_dir."
            ) from error

    def _is_empty(self) -> bool:
        """Whether nothing is there but what a start leaves that was killed before it had written
        config.json."""
        return not self.root.exists() or all(
            path.name == LOCK or path.name.startswith(f".{self.config.name}.")
            for path in self.root.iterdir()
        )

    def _check_kinds(self) -> None:
        """Refuses a file where the run has a folder, and the other way round, before anything is
        computed."""
        stores = (self.reference, *self.root.glob("reference-*"))
        gaps = (self.before, self.after)
        folders = (self.root, *stores, *gaps, self.checkpoints, self.model)
        files = (self.root / LOCK, self.config, self.metrics, self.dropped, self.result, self.plot)
        for paths, what, is_fine in (
            (folders, "folder", Path.is_dir),
            (files, "file", Path.is_file),
        ):
            for path in paths:
                if os.path.lexists(path) and not is_fine(path):
                    raise UserError(
                        f"{path} is no {what}, and a run's is to lie there. Move it away, or choose"
                        " another output_dir."
                    )

    def _check_result(self) -> None:
        try:
            read_object(self.result)
        except UserError as error:
            raise UserError(
                f"{self.result} is damaged: {error} Without that file the same command makes it"
                " again."
            ) from error

    def write_dropped(self, rows: Sequence[Finding]) -> None:
        """Writes the rows that were left out, one JSON object a line."""
        with new_file(self.dropped) as file:
            file.writelines(to_json(asdict(r)) + "\n" for r in rows)

    def append_metrics(self, row: dict[str, Any]) -> str | None:
        """Adds one line to metrics.jsonl. Returns why it could not, such as a full disk; the line
        is then kept for the next call."""
        self._unwritten.append(to_json(row) + "\n")
        try:
            self.flush_metrics()
        except UserError as error:
            return f"{error} {len(self._unwritten)} line(s) wait for that."
        return None

    def flush_metrics(self) -> None:
        """Writes the lines that wait. Raises UserError where that is not possible; then none of
        them is written."""
        if not self._unwritten:
            return
        with writing(self.metrics), open(self.metrics, "ab", buffering=0) as file:
            size, rest = file.tell(), "".join(self._unwritten).encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # no half line that the next one would be written behind
                raise
        self._unwritten.clear()

    def truncate_metrics(self, steps: int) -> str | None:
        """Removes lines of steps that a checkpoint does not have: they come again. Returns what of
        the others is lost, or None.

        Raises:
            UserError: a line before the last is damaged.
        """
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        kept = [row for row in rows if row["step"] <= steps]
        if self.metrics.exists():
            with new_file(self.metrics) as file:
                file.writelines(to_json(row) + "\n" for row in kept)
        newest = max((row["step"] for row in kept), default=0)
        if steps - newest < max(1, self.read()["config"]["log_every"]):
            return None
        return (
            f"{self.metrics} has no lines of steps {newest + 1} to {steps}, which are done. Its"
            " curves will lack them."
        )

    def listing(self) -> list[str]:
        """Names of what the run left, for people."""
        return [
            p.name
            for p in (self.model, self.metrics, self.result, self.plot, self.dropped)
            if p.exists()
        ]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        UserError: the file cannot be read, or another line is no step's.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error}. Restore it, or delete it: the run goes on without its"
            " curves."
        ) from error
    rows = []
    try:
        for line in json_lines(text):
            if not _is_step(line.value):
                raise BadLine(line, ValueError("not the numbers of a step"))
            rows.append(line.value)
    except BadLine as bad:
        if text[bad.line.end :].strip():
            raise UserError(
                f"{path}, line {bad.line.number}: {bad.why}. Restore the line, or remove it: only"
                " the curves lack it then."
            ) from bad
    return rows


def _is_step(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get("gap"), dict)
    )


def _of_run(config: Config, rows: str, model: dict[str, Any]) -> dict[str, Any]:
    """What config.json has of it."""
    return {"config": config.model_dump(mode="json"), "rows": rows, "model": model}


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """What makes it this run: digests of rows and model, and every field of the configuration that
    changes what is computed."""
    fields = {
        f"{section}.{name}": value
        for section, fields in run["config"].items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    }
    fields |= {name: value for name, value in run["config"].items() if not isinstance(value, dict)}
    fixed = {
        name: value
        for name, value in fields.items()
        if name.split(".")[0] not in MAY_CHANGE and name not in KNOWN_BY_CONTENT
    }
    return {"rows": run.get("rows"), "model": run.get("model"), **fixed}


def _in_words(difference: Difference) -> str:
    """For people, who would not know a digest."""
    if difference.where == "rows":
        return "the training or the measured rows differ"
    section, _, name = difference.where.partition(".")
    if section == "model" and name in ("weights", "config", "chat_template", "vocabulary"):
        return f"the model's {name.replace('_', ' ')} is another one"
    return str(difference)
