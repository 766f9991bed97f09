"""`mpo compare`: several losses from the same start, one table.

Each run is a process of its own (DeepSpeed and random states begin anew, and peak memory is its
own), `mpo train` of a configuration that lies beside its folder:

<output_dir>/reference/          the reference store of all runs
<output_dir>/simpo,beta=10/      a run
<output_dir>/simpo,beta=10.yaml  its configuration
<output_dir>/compare.json compare.md compare.png
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mpo.config import Config, load_config
from mpo.data.run_date import with_date
from mpo.evaluation.gaps import GapTable
from mpo.models.inputs import Inputs, load_inputs
from mpo.models.scoring import Measurement
from mpo.runtime.errors import Status, UserError
from mpo.runtime.files import new_file, write_json
from mpo.runtime.interruption import Interrupted
from mpo.runtime.processes import Ended, run
from mpo.training.compared_losses import ComparedRun, runs_of
from mpo.training.comparison import BEFORE, Comparison, Training
from mpo.training.comparison_picture import draw_comparison
from mpo.training.objective import Objective
from mpo.training.reference import model_identity, rows_digest
from mpo.training.run_folder import ANOTHER, OutputFolder, read_metrics
from mpo.training.schedule import schedule_of

JSON, MARKDOWN, PICTURE = "compare.json", "compare.md", "compare.png"


@dataclass(frozen=True)
class Launcher:
    """How `mpo` is started with other arguments: as one process, or by a launcher of ranks."""

    words: tuple[str, ...]
    log: Callable[[str], None]
    stdout: int | None = None
    """File descriptor for what runs print; None: that of this process."""

    @classmethod
    def of(cls, text: str | None, log: Callable[[str], None], stdout: int | None) -> Launcher:
        """From a command line such as "deepspeed --num_gpus 8 --module"."""
        try:
            words = shlex.split(text or "") or [sys.executable, "-m"]
        except ValueError as error:
            raise UserError(f"--launcher {text!r} is no command line: {error}.") from error
        return cls(tuple(words), log, stdout)

    def run(self, command: str, config: Path) -> Ended:
        """Runs `mpo COMMAND CONFIG` to its end.

        Raises:
            Interrupted: it was interrupted, as this process may have been.
        """
        again = "What is finished is kept, and the same command goes on from there."
        try:
            ended = run([*self.words, "mpo", command, str(config)], self.stdout)
        except KeyboardInterrupt as stop:
            raise Interrupted(f"Interrupted. {again}") from stop
        if ended.status == Status.INTERRUPTED:
            raise Interrupted(f"mpo {command} {config} was interrupted. {again}")
        return ended


def compare(
    path: Path, losses: Sequence[str], overrides: Sequence[str], launcher: Launcher
) -> Comparison:
    """Trains each loss, or loads it where its run is finished, and writes what came of them.

        launcher = Launcher.of(None, print, None)
        compare(Path("demo"), ["mpo", "simpo,beta=10"], [], launcher).show(console())

    A run that fails leaves the others as they are.

    Args:
        path: configuration or recipe; its reward gap scale (loss.beta of mpo) is that of every
            distance.
        losses: NAME or NAME,field=value,... (`compared_losses.Choice`).
        overrides: for all of them.
    Raises:
        UserError: bad configuration, loss, data, model or folder, before anything is trained; or
            the reference store cannot be built.
        Interrupted: by Ctrl-C or SIGTERM, or a run of it was.
    """
    _refuse_ranks()
    base = load_config(path, list(overrides))
    runs = runs_of(path, losses, overrides)
    _refuse_a_run(Path(base.output_dir))
    runs = _on_one_date(runs)
    inputs = load_inputs(runs[0].config, launcher.log)
    finished = {each.name for each in runs if _is_finished(each, inputs)}
    failures = _train(runs, finished, launcher)
    comparison = _collect(runs, failures, inputs, base.loss.gap_scale)
    _write(comparison, Path(base.output_dir))
    launcher.log(f"Written to {base.output_dir}: {MARKDOWN}, {JSON}, {PICTURE}")
    return comparison


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "mpo compare starts the ranks of each run itself. Start it without a launcher, and give"
            " it the launcher's command line: mpo compare CONFIG --loss ... --launcher \"deepspeed"
            ' --num_gpus 8 --module"'
        )


def _refuse_a_run(root: Path) -> None:
    if OutputFolder(root).config.exists():
        raise UserError(
            f"output_dir {root} holds a run, and those of a comparison lie in a folder of their"
            f" own. {ANOTHER}"
        )


def _on_one_date(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs with the date that a chat template may print: that of the first that has begun."""
    begun = [each for each in runs if OutputFolder(each.folder).config.is_file()]
    data = with_date((begun or runs)[0].config).data
    return [replace(each, config=each.config.model_copy(update={"data": data})) for each in runs]


def _is_finished(each: ComparedRun, inputs: Inputs) -> bool:
    """Raises UserError where its folder is another run's. Model and rows are digested only where
    there is something to compare them with."""
    folder = OutputFolder(each.folder)
    if not folder.config.is_file():
        return folder.is_finished(each.config, "", {})
    examples = inputs.examples
    return folder.is_finished(
        each.config,
        rows_digest(examples.train, examples.measured),
        model_identity(inputs.model, inputs.tokenizer),
    )


def _train(runs: Sequence[ComparedRun], finished: set[str], launcher: Launcher) -> dict[str, str]:
    """Trains what is not finished. Returns why runs failed, by their names."""
    failures: dict[str, str] = {}
    for each in runs:
        _write_config(each)
    _build_reference([each for each in runs if each.name not in finished], launcher)
    for number, each in enumerate(runs, start=1):
        at = f"[{number}/{len(runs)}] {each.name}"
        if each.name in finished:
            launcher.log(f"{at}: finished before, in {each.folder}")
            continue
        launcher.log(f"{at}: mpo train {each.file}")
        failure = launcher.run("train", each.file).failure
        if failure is not None:
            failures[each.name] = failure
            launcher.log(f"{at} FAILED: {failure}")
    return failures


def _write_config(each: ComparedRun) -> None:
    with new_file(each.file) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(each.config.model_dump(mode="json"))))


def _build_reference(runs: Sequence[ComparedRun], launcher: Launcher) -> None:
    """Builds what the runs share in processes of its own, so that the first run's memory is no
    other than that of the rest."""
    for each in runs:
        if each.config.reference.mode != "stored" or not _lacks_reference(each.config):
            continue
        launcher.log(f"Reference of all runs: mpo precompute {each.file}")
        failure = launcher.run("precompute", each.file).failure
        if failure is not None:
            raise UserError(f"The reference store, which runs share, cannot be built: {failure}")


def _lacks_reference(config: Config) -> bool:
    """Whether a store that its loss takes is not there. Whose it is the run itself finds out."""
    root = Path(str(config.reference.store))
    stores = Objective(config.loss).stores(root, config.train.seed)
    return any(not (store.folder / "manifest.json").is_file() for store in stores)


def _collect(
    runs: Sequence[ComparedRun], failures: dict[str, str], inputs: Inputs, gap_scale: float
) -> Comparison:
    """What lies in the folders of the runs."""
    examples = inputs.examples.measured
    measured: dict[str, Measurement] = {}
    trainings: dict[str, Training] = {}
    for each in runs:
        if each.name in failures:
            continue
        folder = OutputFolder(each.folder)
        before, after = (
            Measurement.load(place, len(examples)) for place in (folder.before, folder.after)
        )
        if before is None or after is None:
            failures[each.name] = (
                f"{folder.root} lacks {(folder.before if before is None else folder.after).name} or"
                " it is damaged. Delete the folder, and the same command trains this loss again."
            )
            continue
        measured.setdefault(BEFORE, before)
        measured[each.name] = after
        trainings[each.name] = _training(each, folder, len(inputs.examples.train))
    table = GapTable.of(examples, measured, gap_scale) if measured else None
    return Comparison(tuple(each.name for each in runs), table, trainings, failures)


def _training(each: ComparedRun, folder: OutputFolder, rows: int) -> Training:
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    values: dict[str, Any] = each.config.model_dump(mode="json")
    settings = {section: values[section] for section in ("loss", "train")}
    return Training.of(str(folder.root), settings, schedule_of(each.config, rows).steps, lines)


def _write(comparison: Comparison, root: Path) -> None:
    write_json(root / JSON, comparison.as_dict())
    draw_comparison(comparison, root / PICTURE)
    with new_file(root / MARKDOWN) as file:
        file.write(comparison.as_markdown(PICTURE))
