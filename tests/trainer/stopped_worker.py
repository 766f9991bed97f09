"""One run that is stopped, or fails, at one place after another.

    python stopped_worker.py CONFIG STOPS.json OVERRIDES...

STOPS.json holds [[place, how], ...]. Each is one call of `mpo.training.train.train`, the function
behind `mpo train`, in the same output folder. It meets at the place a signal (SIGTERM, SIGINT), a
failing write (ENOSPC), or both, a SIGTERM and a disk that is full from then on (FULL). The last
call meets nothing. Prints a JSON line for each: what it raised, the step of the newest checkpoint,
whether there is a result.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mpo.training.micro_batches
import mpo.training.run
import mpo.training.train
from mpo.config import load_config
from mpo.models.scoring import Scorer
from mpo.training import checkpoint_folder

PLACES: dict[str, tuple[Any, str]] = {
    "rows": (mpo.training.run, "load_inputs"),
    "weights": (mpo.training.run, "load_model"),
    "engine": (mpo.training.run, "build_engine"),
    "reference": (mpo.training.run, "build"),
    "gaps before": (Scorer, "measure"),
    "self-check": (mpo.training.train, "self_check"),
    "first step": (mpo.training.micro_batches.Batches, "micro_batches"),
    "second step": (mpo.training.micro_batches.Batches, "micro_batches"),
    "last step": (mpo.training.micro_batches.Batches, "micro_batches"),
    "gaps after": (Scorer, "measure"),
    "export": (mpo.training.train, "export_engine"),
    "summary": (mpo.training.train.RunResult, "of"),
    "picture": (mpo.training.train, "plot_run"),
    "result": (mpo.training.train, "write_json"),
}


def meets(how: str) -> None:
    if how == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == "FULL":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, NO_LIMIT[1]))
        how = "SIGTERM"
    os.kill(os.getpid(), getattr(signal, how))


NO_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


@contextmanager
def stopped(place: str, how: str, steps: int) -> Iterator[None]:
    """Within it the function of the place meets `how` when it begins, at the step that the place
    names."""
    if place == "nowhere":
        yield
        return
    owner, name = PLACES[place]
    original: Callable = getattr(owner, name)
    number = {"first step": 0, "second step": 1, "last step": steps - 1}.get(place)

    def meeting(*arguments: Any, **options: Any) -> Any:
        if number is None or number in arguments:
            setattr(owner, name, original)
            meets(how)
        return original(*arguments, **options)

    setattr(owner, name, meeting)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, NO_LIMIT)
        setattr(owner, name, original)


def main(configuration: Path, stops: list[list[str]], overrides: list[str]) -> None:
    config = load_config(configuration, overrides)
    out = Path(config.output_dir)
    for place, how in [*stops, ["nowhere", "nothing"]]:
        raised = None
        with stopped(place, how, config.train.max_steps or 0):
            try:
                mpo.training.train.train(config)
            except (Exception, KeyboardInterrupt) as error:
                raised = f"{type(error).__name__}: {error}"
        gc.collect()  # the folder's lock goes with the run's object
        found = checkpoint_folder.newest(out / "checkpoints")
        seen = {
            "place": place,
            "how": how,
            "raised": raised,
            "step": found and found.step,
            "result": (out / "result.json").exists(),
        }
        print("STOPPED", json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), sys.argv[3:])
