"""Runs commands one after the other in one process, and damages files between them. Arguments: file
of the steps, file for what they gave.

The libraries behind a command take longer to import than a tiny run takes.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpo.commands import app
from mpo.runtime import ranks


def damage(path: Path, fault: str) -> None:
    """Does one thing to a file or a folder, whatever it was. Any other name of a fault is what the
    file holds then."""
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if fault == "a folder":
        path.mkdir()
        (path / "inside").write_text("text")
    elif fault == "an empty folder":
        path.mkdir()
    elif fault == "a dangling link":
        path.symlink_to(path.with_name("nowhere"))
    elif fault == "unreadable":  # for root too: a link to itself
        path.symlink_to(path)
    elif fault == "a link to it":
        path.with_name(f"moved-{path.name}").write_bytes(content)
        path.symlink_to(path.with_name(f"moved-{path.name}"))
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "other bytes":
        path.write_bytes(bytes((7 * i + 3) % 256 for i in range(len(content))))
    elif fault == "deep nesting":
        path.write_text("[" * 100_000)
    elif fault != "absent":
        path.write_text(fault)


def mpo(arguments: list[str]) -> tuple[int, str]:
    """Exit status and output of a command in this process."""
    said = io.StringIO()
    sys.argv = ["mpo", *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app.execute()
        except SystemExit as done:
            return int(done.code or 0), said.getvalue()
        except BaseException as error:
            return -1, f"{said.getvalue()}\nTraceback: {type(error).__name__}: {error}"
    return 0, said.getvalue()


def outcome(run: Path) -> dict:
    """What must not differ: the numbers of the steps that are done, and the result."""
    metrics, result = run / "metrics.jsonl", run / "result.json"
    try:
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        numbers = {row["step"]: [row["loss"], row["l1"], row["l2"], row["gap"]] for row in rows}
        return {"steps": numbers, "result": json.loads(result.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return {"steps": None, "result": None}


def no_picture(figure: Figure, to: Any, **_: Any) -> None:
    """Drawing takes longer than a run."""
    if hasattr(to, "write"):
        to.write(b"\x89PNG")
    else:
        Path(to).write_bytes(b"\x89PNG")


def do(step: list) -> dict:
    """One step, `[what, arguments...]`. Returns what a test wants to know of it."""
    what, *arguments = step
    if what == "mpo":
        status, text = mpo(arguments)
        return {"status": status, "text": text}
    if what == "copy":
        if Path(arguments[0]).exists():
            shutil.copytree(*arguments, symlinks=True)
    elif what == "damage":
        damage(Path(arguments[0]), arguments[1])
    elif what == "look":
        run = Path(arguments[0])
        files = (
            sorted(str(path.relative_to(run)) for path in run.rglob("*")) if run.is_dir() else []
        )
        return {"files": files, **outcome(run)}
    elif what == "remove":
        shutil.rmtree(arguments[0], ignore_errors=True)
    return {}


if __name__ == "__main__":
    ranks.leave = lambda: None  # one process group for all of them
    Figure.savefig = no_picture
    steps_file, outcomes_file = map(Path, sys.argv[1:])
    outcomes_file.write_text(
        json.dumps([do(step) for step in json.loads(steps_file.read_text())], allow_nan=False)
    )
    os._exit(0)  # gloo's threads need not be waited for
