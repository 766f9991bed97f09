"""Each file of a build of data, damaged in each way: the build goes on, or ends with status 2 and a
sentence that names the file."""

import re
import shutil

from builds import (
    expected,
    folder,  # noqa: F401  (a fixture)
    read,
    server,  # noqa: F401  (a fixture)
    through,
)
from commands_worker import damage

from mpo.commands.app import status_of

JOURNAL, REPORT, DROPPED = (
    f"rows.jsonl.{name}.json{'' if name == 'report' else 'l'}"
    for name in ("translations", "report", "dropped")
)
FILES = {
    JOURNAL: {
        # one line without an end is cut off
        **dict.fromkeys(
            ("absent", "empty", "truncated", "deep nesting", "a link to it", "\n"), "ok"
        ),
        "other bytes": "translations.jsonl, line 1",
        "[1]\n": "translations.jsonl, line 1: holds list",
        '{"key": 1}\n': "is no journal of this command",
        "unreadable": "translations.jsonl cannot be written",
        "a folder": "translations.jsonl cannot be written",
    },
    REPORT: {
        **dict.fromkeys(
            ("absent", "unreadable", "a folder", '{"build": []}', "{}"),
            "no report beside it says that this command wrote it",
        ),
        **dict.fromkeys(
            ("empty", "truncated", "other bytes", "[]", "null", "deep nesting"),
            "report beside output .* is damaged",
        ),
        "a link to it": "ok",
    },
    DROPPED: {
        **dict.fromkeys(("absent", "empty", "other bytes", "a link to it"), "ok"),
        "a folder": "dropped.jsonl cannot be written",
    },
    "rows.jsonl": {
        **dict.fromkeys(("absent", "a link to it", "unreadable"), "ok"),
        **dict.fromkeys(("empty", "truncated", "other bytes"), "was changed after it was built"),
        "a folder": "is a folder",
    },
    ".rows.jsonl.lock": {
        **dict.fromkeys(("absent", "other bytes"), "ok"),
        "a folder": ".rows.jsonl.lock cannot be written",
    },
}
CASES = [
    (file, fault, expected) for file, faults in FILES.items() for fault, expected in faults.items()
]


def test_damaged_files_of_a_build(folder, server, capfd):  # noqa: F811
    through(server, folder)
    command = ["data", "build", str(folder / "build.yaml")]
    assert status_of(command) == 0
    shutil.copytree(folder / "out", folder / "whole")
    wrong = []
    for file, fault, outcome in CASES:
        shutil.rmtree(folder / "out")
        shutil.copytree(folder / "whole", folder / "out")
        damage(folder / "out" / file, fault)
        capfd.readouterr()
        status, text = status_of(command), "".join(capfd.readouterr())
        if outcome == "ok":
            fine = status == 0 and read(folder / "out" / "rows.jsonl") == expected()
        else:
            fine = status == 2 and re.search(outcome, text, re.DOTALL) and "Error: " in text
        if not fine or "Traceback" in text:
            wrong.append((file, fault, status, text[-300:]))
    assert not wrong
