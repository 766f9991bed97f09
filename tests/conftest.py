"""One environment for every process of the suite: the tests' own, and the ones that they start,
which inherit it.

No test then depends on the machine's threads, its terminal, language or time zone, and both sides
of a comparison run alike: the number of threads changes the order of a CPU's sums, and so the last
bits of a run. What a test is about it sets itself, on top of this.

GPUs are for the tests that ask for one (devices.py): DeepSpeed sees none unless such a test says
so.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis

# no test asserts on time
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

PYTHON = ("python", "deepspeed", "torchrun", "mpo", "pytest")
"""How the names of programs begin that run it."""
FIXED = {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "100",
    "LINES": "40",
    "TERM": "xterm",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "MPLBACKEND": "agg",
    "DS_ACCELERATOR": "cpu",
    # read once, at a process's first product on a GPU
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
UNSET = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(
        "FORCE_COLOR",
        "CLICOLOR_FORCE",
        "PY_COLORS",
        "NO_COLOR",
        "GITHUB_ACTIONS",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        "TERMINAL_WIDTH",
    ),
    # they follow the one above, also where a test sets that otherwise
    *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("LANGUAGE", "PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONOPTIMIZE"),
)


def settle() -> None:
    """Gives this process the environment. Here, before anything imports torch, which reads the
    number of threads once."""
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update(FIXED)
    time.tzset()


def refuse_another(event: str, arguments: tuple[Any, ...]) -> None:
    """Audits every process that runs Python for a test: it may set these variables otherwise, but
    not leave them to the machine.

    Libraries start tools in environments of their own (torch 2.15 looks for libdl by ldconfig),
    which is theirs to know.
    """
    if event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name.startswith(PYTHON):
        environment = arguments[3]
        missing = [
            name
            for name in FIXED
            if name not in (os.environ if environment is None else environment)
        ]
        assert not missing, (
            f"{arguments[1]} is started without {', '.join(missing)}: "
            "pass env={**os.environ, ...}"
        )


settle()
sys.addaudithook(refuse_another)
