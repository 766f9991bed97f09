"""What a build leaves, and whose it is.

rows.jsonl                        the rows; there only when all of the others are
rows.jsonl.report.json            the report, with what makes it this build
rows.jsonl.dropped.jsonl          rows that were left out, with reasons
rows.jsonl.translations.jsonl     journal of finished translations, which translator.file reads too
rows.jsonl.answers.jsonl          journal of the model's answers (only with chosen_from_model)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo.runtime.claims import Claim, differences
from mpo.runtime.errors import UserError
from mpo.runtime.files import new_file, read_object, to_json, write_json


class Output:
    """Paths and files of one build."""

    def __init__(self, path: Path) -> None:
        self.rows = path
        self.report, self.dropped, self.translations, self.answers = (
            path.with_name(f"{path.name}.{name}")
            for name in ("report.json", "dropped.jsonl", "translations.jsonl", "answers.jsonl")
        )

    @contextmanager
    def claimed(self, build: dict[str, Any]) -> Iterator[None]:
        """Within the block the output is this process's alone.

        Args:
            build: what makes it this build, as JSON holds it.
        Raises:
            UserError: no folder to write to; another process is at it; or rows are there that are
                not this build's.
        """
        again = (
            f"Choose another output, or move {self.rows} away; translations that are finished stay"
            f" in {self.translations.name}."
        )
        try:
            self.rows.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder of output {self.rows} cannot be made: {error}") from error
        if not os.access(self.rows.parent, os.W_OK):
            raise UserError(
                f"The folder of output {self.rows} cannot be written to. Choose another output."
            )
        if self.rows.is_dir():
            raise UserError(
                f"output {self.rows} is a folder. Give the name of a file, such as"
                f" {self.rows / 'rows.jsonl'}."
            )
        claim = Claim(self.rows.with_name(f".{self.rows.name}.lock"))
        if (holder := claim.take()) is not None:
            raise UserError(
                f"Another process is building {self.rows} right now ({holder}). Wait for it, or"
                " choose another output."
            )
        try:
            if self.rows.exists():
                self._check_owner(build, again)
            yield
        finally:
            claim.release()

    def _check_owner(self, build: dict[str, Any], again: str) -> None:
        if not self.report.is_file():
            raise UserError(
                f"output {self.rows} exists, and no report beside it says that this command wrote"
                f" it. {again}"
            )
        try:
            report = read_object(self.report)
        except UserError as error:
            raise UserError(f"The report beside output {self.rows} is damaged: {error}") from error
        theirs = report.get("build")
        if not isinstance(theirs, dict):
            raise UserError(
                f"output {self.rows} exists, and no report beside it says that this command wrote"
                f" it. {again}"
            )
        differing = differences({name: theirs.get(name) for name in build}, build)
        if differing:
            raise UserError(
                f"output {self.rows} is of another build: {'; '.join(map(str, differing))}. {again}"
            )
        if report.get("sha256") != hashlib.sha256(self.rows.read_bytes()).hexdigest():
            raise UserError(f"output {self.rows} was changed after it was built. {again}")

    def write(
        self,
        report: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        dropped: Sequence[dict[str, Any]],
    ) -> None:
        """Writes everything but the journals; rows last, and none if there are none.

        Raises:
            UserError: no room, or no right to write.
        """
        lines = [to_json(row) + "\n" for row in rows]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        try:
            self.rows.unlink(missing_ok=True)
            with new_file(self.dropped) as file:
                file.writelines(to_json(row) + "\n" for row in dropped)
            write_json(self.report, {**report, "sha256": digest})
            if lines:
                with new_file(self.rows) as file:
                    file.writelines(lines)
        except OSError as error:
            raise UserError(
                f"{self.rows} cannot be written ({error}). Make room; the same command goes on from"
                " the journals."
            ) from error
