"""Which runs `mpo compare` makes of `--loss mpo --loss simpo,beta=10,train.learning_rate=1e-6`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo.config import Config, load_config
from mpo.runtime.errors import UserError
from mpo.training.objective import Objective

SECTIONS = ("loss", "train")
"""What may differ between runs that are compared: they start from the same model and rows."""
STORE = "reference"
"""The folder of the reference store in that of the comparison, unless the configuration names
one."""


@dataclass(frozen=True)
class Choice:
    """A loss to compare, and what is its own.

    >>> Choice.of("simpo,beta=10,train.learning_rate=1e-6").overrides
    ['loss.name=simpo', 'loss.beta=10', 'train.learning_rate=1e-6']
    """

    text: str
    loss: str
    fields: tuple[tuple[str, str], ...]
    """Names, those of the section `loss` without it, and values, as they were given."""

    @classmethod
    def of(cls, text: str) -> Choice:
        """Reads NAME or NAME,field=value,...: a comma belongs to a value unless a field follows.

        Raises:
            UserError: it is of another form, or sets what must be the same for all.
        """
        loss, *rest = (part.strip() for part in re.split(r",(?=\s*[A-Za-z_][\w.]*\s*=)", text))
        if not re.fullmatch(r"[\w.:]+", loss):
            raise UserError(
                f"--loss {text!r} is not of the form NAME or NAME,field=value,...: write for"
                " example --loss simpo or --loss simpo,beta=10,train.learning_rate=1e-6."
            )
        pairs = [part.partition("=") for part in rest]
        fields = [(name.strip().removeprefix("loss."), value.strip()) for name, _, value in pairs]
        for name, _ in fields:
            section = name.rpartition(".")[0].split(".")[0]
            if name == "name" or section not in ("", *SECTIONS):
                raise UserError(
                    f"--loss {text!r} sets {name}, but runs that are compared differ in fields of"
                    f" {' and '.join(SECTIONS)} alone. Set it for all of them: {name}=... without"
                    " --loss, or compare other runs with mpo plot."
                )
        return cls(text, loss, tuple(fields))

    @property
    def name(self) -> str:
        """What the table and its run's folder call it.

        >>> Choice.of("cpo, beta=0.2").name
        'cpo,beta=0.2'
        """
        parts = [self.loss, *(f"{name}={value}" for name, value in self.fields)]
        return re.sub(r"[^\w.,:=+\[\]-]", "_", ",".join(parts))

    @property
    def overrides(self) -> list[str]:
        """The fields of a configuration that it sets."""
        own = [f"{name if '.' in name else f'loss.{name}'}={value}" for name, value in self.fields]
        return [f"loss.name={self.loss}", *own]


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str
    config: Config
    """With an output_dir of its own, and the reference store that all of them share."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self.config.output_dir)

    @property
    def file(self) -> Path:
        """Its whole configuration, for `mpo train`."""
        return self.folder.with_name(f"{self.name}.yaml")


def runs_of(path: Path, losses: Sequence[str], overrides: Sequence[str]) -> list[ComparedRun]:
    """The runs of a comparison, checked, in the order of the losses.

    runs_of(Path("demo"), ["mpo", "dpo,beta=0.05"], ["output_dir=runs/losses"])[1].folder

    Raises:
        UserError: no loss is named, a field is unknown or has a wrong value, two losses are one
            run, or two want one reference store with different pooling.
    """
    if not losses:
        raise UserError(
            "No loss to compare. Name each with --loss, such as --loss mpo --loss dpo"
            " (docs/losses.md has them)."
        )
    runs: dict[str, ComparedRun] = {}
    for choice in map(Choice.of, losses):
        run = _run_of(path, choice, overrides)
        for other in runs.values():
            if run.name == other.name or _settings(run) == _settings(other):
                raise UserError(
                    f"--loss {choice.text!r} is the run {other.name} once more. Leave it out, or"
                    " give it fields of its own, such as"
                    f" {choice.loss},train.learning_rate=1e-6."
                )
        runs[run.name] = run
    _refuse_two_pools(list(runs.values()))
    return list(runs.values())


def _refuse_two_pools(runs: Sequence[ComparedRun]) -> None:
    """One store holds the pooled states of all: the second run would find it built for another."""
    pooling = [run for run in runs if _keeps_pooled(run.config)]
    for other in pooling[1:]:
        (first, pool), another = (pooling[0].name, pooling[0].config.loss.pool), other.config.loss
        if another.pool != pool:
            raise UserError(
                f"--loss {other.name!r} has loss.pool={another.pool} and {first} has {pool}, but"
                " runs that are compared share one reference store, whose hidden states are pooled"
                " in one way. Give all of them the same pool, or compare them in two folders."
            )


def _keeps_pooled(config: Config) -> bool:
    """Whether pooled hidden states are in the store that it opens."""
    if config.reference.mode != "stored":
        return False
    stores = Objective(config.loss).stores(Path(str(config.reference.store)), config.train.seed)
    return any(store.pools for store in stores)


def _run_of(path: Path, choice: Choice, overrides: Sequence[str]) -> ComparedRun:
    try:
        config = load_config(path, [*overrides, *choice.overrides])
    except UserError as error:
        raise UserError(f"--loss {choice.text!r}: {error}") from error
    root = Path(config.output_dir)
    store = config.reference.store or str((root / STORE).absolute())
    places = {
        "output_dir": str(root / choice.name),
        "reference": config.reference.model_copy(update={"store": store}),
    }
    return ComparedRun(choice.name, config.model_copy(update=places))


def _settings(run: ComparedRun) -> Config:
    return run.config.model_copy(update={"output_dir": ""})
