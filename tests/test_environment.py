"""The suite's own environment: the same on any machine, and the same for every process that it
starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
MACHINES = {
    "many-threads": {"OMP_NUM_THREADS": "64", "MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "5"},
    "terminal": {
        "COLUMNS": "20",
        "LINES": "3",
        "FORCE_COLOR": "1",
        "TERM": "dumb",
        "TERMINAL_WIDTH": "30",
        "GITHUB_ACTIONS": "true",
    },
    "elsewhere": {
        "LC_ALL": "tr_TR.ISO-8859-9",
        "LANGUAGE": "tr",
        "TZ": "Asia/Kathmandu",
        "PYTHONIOENCODING": "latin-1",
    },
    "under-a-launcher": {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1",
    },
}


def seen(script, **environment):
    """What a process prints as JSON that starts as this suite does, on a machine with this
    environment."""
    begin = f"import json, os, runpy, subprocess, sys; runpy.run_path({str(CONFTEST)!r}); "
    machine = {**os.environ, **environment}
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", begin + script], env=machine, capture_output=True, check=True
        ).stdout
    )


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_every_machine_looks_alike_to_the_tests_and_to_what_they_start(machine):
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    child = f"print(subprocess.check_output([sys.executable, '-c', {show!r}], text=True))"
    assert seen(child, **machine) == seen(child)


def test_threads_time_and_width_are_the_environments():
    script = (
        "import time, shutil, torch; print(json.dumps([torch.get_num_threads(), time.tzname[0],"
        " shutil.get_terminal_size()[0]]))"
    )
    assert seen(
        script, **MACHINES["many-threads"], **MACHINES["terminal"], **MACHINES["elsewhere"]
    ) == [1, "UTC", 100]


def test_a_process_that_would_take_the_machines_own_environment_is_refused():
    with pytest.raises(AssertionError, match="without OMP_NUM_THREADS"):
        subprocess.run([sys.executable, "-c", ""], env={"PATH": os.environ["PATH"]}, check=True)


def test_the_tools_of_libraries_have_environments_of_their_own():
    subprocess.run(["true"], env={"PATH": os.environ["PATH"]}, check=True)
