"""How commands end: one sentence and a status for whatever goes wrong, and standard streams that
cost nobody a run."""

import ast
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import mpo
from mpo.commands.app import status_of
from mpo.runtime.errors import Status, UserError
from mpo.runtime.interruption import Interrupted

HERE = Path(mpo.__file__).parent


@pytest.fixture
def raising(monkeypatch):
    """Makes the body of every command raise."""

    def arrange(error):
        def raises(*_, **__):
            raise error

        monkeypatch.setattr("mpo.config.load_config", raises)

    return arrange


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("row 3 is bad"), 2, "Error: row 3 is bad"),
        (Interrupted("Stopped after step 3."), 130, "Stopped after step 3."),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            2,
            "x.json: No such file or directory",
        ),
        (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "No space left"),
        (MemoryError(), 2, "dry-run"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "pairs_per_micro_batch"),
        (ModuleNotFoundError("No module named 'peft'"), 2, "pip install"),
        (
            RuntimeError(
                "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
            ),
            2,
            "Another rank ended",
        ),
        (KeyError("gap"), 70, "Unexpected error (KeyError: 'gap')"),
        (AssertionError(), 70, "Unexpected error (AssertionError"),
        (RecursionError("maximum recursion depth exceeded"), 70, "RecursionError"),
        (RuntimeError("one line\nand another"), 70, "RuntimeError: one line and another"),
    ],
)
def test_every_exception_has_a_status_and_one_line(raising, capsys, error, status, words):
    raising(error)
    assert status_of(["validate", "run.yaml"]) == status
    complaint = capsys.readouterr().err
    assert words in complaint and len(complaint.splitlines()) == 1 and "Traceback" not in complaint
    if status == Status.UNEXPECTED:
        (file,) = re.findall(r"with (\S+), which holds the details", complaint)
        details = Path(file).read_text()
        Path(file).unlink()
        assert "Traceback" in details
        assert f"torch: {torch.__version__}" in details
        assert type(error).__name__ in details


def test_the_traceback_is_there_for_those_who_ask(raising, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MPO_TRACEBACK", "1")
    raising(UserError("row 3 is bad"))
    assert status_of(["validate", "run.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("MPO_TRACEBACK")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    raising(KeyError("gap"))
    assert status_of(["validate", "run.yaml"]) == 70
    assert "MPO_TRACEBACK=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "local", "said"), [("0", "0", True), ("1", "1", False), ("8", "0", True)]
)
def test_a_message_comes_once_from_each_node_and_a_fault_from_every_rank(
    raising, capsys, monkeypatch, rank, local, said
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    raising(UserError("row 3 is bad"))
    status_of(["validate", "run.yaml"])
    assert ("row 3" in capsys.readouterr().err) == said
    raising(OSError(28, "No space left on device"))
    status_of(["validate", "run.yaml"])
    assert "No space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "a.yaml", "--no-such"],
        ["export", "run"],
        ["gaps", "--model"],
    ],
)
def test_a_wrong_command_line_is_mendable(capsys, arguments):
    assert status_of(arguments) == Status.MENDABLE
    assert "Traceback" not in capsys.readouterr().err


def test_statuses_are_named_in_one_place():
    assert [int(status) for status in Status] == [0, 1, 2, 70, 130]
    literal = re.compile(r"sys\.exit\(\d|typer\.Exit\(\d|SystemExit\(\d")
    found = [path.name for path in sorted(HERE.rglob("*.py")) if literal.search(path.read_text())]
    assert not found


ODD = "model [old] [/x] :smile: → 模型"
SHOW = f"""
import sys
from mpo.runtime.terminal import Streams, console
from rich.table import Table
streams = Streams()
table = Table(title={ODD!r})
table.add_column({ODD!r})
table.add_row({ODD!r})
terminal = console()
for _ in range(int(sys.argv[1])):
    terminal.print(table)
    terminal.print({ODD!r})
    print({ODD!r})
print("caf\\u00e9", file=sys.stderr)
lost = streams.lost()
print("lost", lost, file=sys.stderr)
print("end", file=sys.stderr)
"""


def show(times=1, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-c", SHOW, str(times)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment},
    )


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252", "shift_jis"])
def test_texts_are_texts_in_every_encoding(encoding):
    """No markup, no pictures for `:smile:`; what the encoding lacks is spelled out."""
    done = show(PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"end" in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    expected = "".join(
        (
            c
            if _has(encoding, c)
            else "->"
            if c == "→"
            else c.encode("ascii", "backslashreplace").decode()
        )
        for c in ODD
    )
    assert text.count(expected) == 5 and "model [old] [/x] :smile:" in text


def _has(encoding, letter):
    try:
        return bool(letter.encode(encoding))
    except UnicodeEncodeError:
        return False


def test_a_reader_that_leaves_costs_nothing():
    read, write = os.pipe()
    os.close(read)
    try:
        done = show(2000, stdout=write)
    finally:
        os.close(write)
    assert done.returncode == 0
    assert done.stderr.decode().splitlines() == [
        "café",
        "lost None",
        "end",
    ]


def test_a_full_disk_behind_standard_output_is_told_at_the_end():
    with open("/dev/full", "w") as full:
        done = show(2000, stdout=full)
    assert done.returncode == 0
    assert done.stderr.decode().splitlines() == [
        "café",
        "lost No space left on device",
        "end",
    ]


def test_without_standard_streams():
    shell = f'exec "{sys.executable}" -m mpo --help >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell], check=False, env={**os.environ, "PYTHONPATH": str(HERE.parent)}
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("stdout", "stderr", "status"),
    [("/dev/full", "", 2), ("closed", "", 0), ("/dev/full", "closed", 2), ("closed", "closed", 0)],
)
def test_a_command_whose_output_goes_nowhere(stdout, stderr, status):
    """`mpo ... > log` on a full disk says so, `mpo ... | head` and `2>&1 | head` end in peace."""
    read, closed = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        files = {"/dev/full": full, "closed": closed, "": subprocess.PIPE}
        done = subprocess.run(
            [sys.executable, "-m", "mpo", "train", "--help"],
            stdout=files[stdout],
            stderr=files[stderr],
            check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )
    os.close(closed)
    assert done.returncode == status
    if not stderr:
        assert (b"No space left on device" in done.stderr) == (status == 2)
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("term", ["dumb", "xterm-256color", "no-such-terminal", ""])
def test_any_terminal(term):
    """Bars and tables on a terminal of that kind."""
    code = """
from mpo.runtime.progress import Progress
progress = Progress(enabled=True)
with progress.task("Gaps of [old] :x:", 3) as advance:
    for _ in range(3):
        advance(1)
progress.log("done [/x]")
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=theirs,
        stderr=subprocess.PIPE,
        check=False,
        env=environment,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0, done.stderr
    assert "done [/x]" in shown


def test_there_is_one_kind_of_console_and_none_of_its_texts_is_markup():
    """Names of models and languages reach bars, tables and lines as they are, because nothing else
    makes a console or a column of a bar."""
    for path in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rsplit(".", 1)[-1]
                assert name != "Console" or path.name == "terminal.py", path
                assert name not in ("from_markup", "render"), path
                if name == "TextColumn":
                    assert any(
                        k.arg == "markup" and ast.unparse(k.value) == "False" for k in node.keywords
                    ), path


AT_THE_END = """
import atexit, sys, time
from mpo import __main__
from mpo.commands import app
from mpo.runtime import ranks

class Waits:
    def __del__(self):
        print("torn down")

kept = Waits()
atexit.register(print, "at exit")
def command(*_):
    ranks.start()
    print("done", end=" ")
    sys.exit({status})
app.app = command
__main__.main()
"""


@pytest.mark.parametrize("status", [0, 2])
def test_a_rank_ends_without_what_its_librarys_threads_make_of_the_interpreters_end(status):
    """Its output is whole, what was registered for the exit is done, and the status is its own;
    nothing is torn down."""
    result = subprocess.run(
        [sys.executable, "-c", AT_THE_END.format(status=status)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status and result.stdout.endswith("done at exit\n"), (
        result.stdout + result.stderr
    )
