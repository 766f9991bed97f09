"""What a run is before its first step: inputs that are checked, a folder that is claimed, an engine
with the model, and the reference.

In this order: what can be refused is refused before anything is written, and what can be refused
from files alone before any weight is loaded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch

from mpo.config import Config
from mpo.data.examples import Answers, Example, Side, TokenizedResponse
from mpo.data.run_date import with_date
from mpo.models.forward import SequenceScores, bind_mpo_forward
from mpo.models.inputs import Inputs, load_inputs
from mpo.models.loading import load_model
from mpo.models.scoring import Measurement, Scorer, distinct_sequences
from mpo.runtime.claims import Claim
from mpo.runtime.files import to_json
from mpo.runtime.progress import Progress
from mpo.runtime.ranks import is_main, on_main
from mpo.training.cpu_adam import compile_cpu_adam
from mpo.training.engine import (
    OptimizerGuard,
    build_engine,
    deepspeed_settings,
    partitioned_loading,
)
from mpo.training.kl import mismatched_of
from mpo.training.objective import Objective, StoreOf
from mpo.training.reference import (
    LiveReference,
    Parts,
    Reference,
    ReferenceStore,
    StoredReference,
    build,
    identity,
    model_identity,
    rows_digest,
)
from mpo.training.run_folder import OutputFolder
from mpo.training.schedule import Schedule, schedule_of


@dataclass(frozen=True)
class Run:
    """A checked configuration, its inputs, and where its output goes."""

    config: Config
    """With the date that a chat template may print."""
    settings: dict[str, Any]
    """DeepSpeed's."""
    inputs: Inputs
    identity: dict[str, Any]
    """Of the model, `model_identity`."""
    mismatched: dict[Side, list[Answers]]
    """Of each row that is trained on, its prompts with answers of other rows; empty where the loss
    takes no KL."""
    folder: OutputFolder
    device: torch.device
    progress: Progress

    @property
    def examples(self) -> Sequence[Example]:
        """What is trained on."""
        return self.inputs.examples.train

    @property
    def measured(self) -> Sequence[Example]:
        """What is measured before and after."""
        return self.inputs.examples.measured

    @property
    def schedule(self) -> Schedule:
        """Its optimizer steps."""
        return schedule_of(self.config, len(self.examples))

    @property
    def store_folder(self) -> Path:
        """Where its reference store is."""
        named = self.config.reference.store
        return self.folder.reference if named is None else Path(named)


def read_run(config: Config, device: torch.device) -> Run:
    """Reads and checks everything that a configuration names. Writes nothing.

    Raises:
        UserError: bad configuration, data or model.
    """
    progress = Progress(enabled=is_main())
    settings = deepspeed_settings(config)
    config = on_main(with_date, config)
    inputs = load_inputs(config, progress.log)
    model = on_main(model_identity, inputs.model, inputs.tokenizer)
    folder = OutputFolder(Path(config.output_dir))
    mismatched = mismatched_of(config, inputs)
    return Run(config, settings, inputs, model, mismatched, folder, device, progress)


def claim_folder(run: Run, may_be_finished: bool = False) -> None:
    """Takes hold of the output folder until this process ends.

    Raises:
        UserError: it is another run's, a finished one's (unless it may be), or in use.
    """
    on_main(
        run.folder.open,
        run.config,
        rows_digest(run.examples, run.measured),
        run.identity,
        torch.get_num_threads(),
        may_be_finished,
    )


def say_what_differs(run: Run) -> None:
    """Warns where the run goes on with threads or libraries other than it began with."""
    threads = torch.get_num_threads()
    if (began_with := on_main(run.folder.other_threads, threads)) is not None:
        run.progress.log(
            f"WARNING: This run began with {began_with} CPU thread(s) a rank and goes on with"
            f" {threads}, which changes the last bits of a CPU's sums. Set"
            f" OMP_NUM_THREADS={began_with} to go on bit for bit."
        )
    if versions := on_main(run.folder.other_versions):
        run.progress.log(
            f"WARNING: This run began with {', '.join(versions)}. What it computes from here on may"
            " differ in its last bits."
        )


def show_header(run: Run) -> None:
    """The run in a few lines: model, rows, dropped rows, batch arithmetic."""
    config, train, log = run.config, run.config.train, run.progress.log
    dropped = run.inputs.examples.dropped
    dominant = len({e.dominant for e in run.examples})
    log(
        f"Model     {config.model.path} ({config.model.dtype}), ZeRO-{config.zero.stage},"
        f" {dist.get_world_size()} rank(s)"
    )
    log(f"Training  {_by_language(run.examples)}, sharing {dominant} dominant pairs")
    log(f"Measured  {_by_language(run.measured)}")
    if dropped:
        counts = Counter(row.reason for row in dropped).most_common()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        log(f"Dropped   {len(dropped)} rows ({reasons}); see dropped_rows.jsonl")
    log(
        f"Steps     {run.schedule.steps} of {train.pairs_per_step} pairs (micro-batches of"
        f" {train.pairs_per_micro_batch}), learning rate {train.learning_rate:g}"
        f" {train.schedule}"
    )
    log(f"Loss      {config.loss.in_words()}")


def _by_language(examples: Sequence[Example]) -> str:
    counts = Counter(e.language for e in examples)
    languages = ", ".join(f"{language} {n}" for language, n in sorted(counts.items()))
    return f"{len(examples)} rows ({languages})"


def load_engine(run: Run) -> tuple[deepspeed.DeepSpeedEngine, OptimizerGuard]:
    """Loads the weights into an engine that trains them.

    Raises:
        UserError: they cannot be loaded, or the offloaded optimizer cannot be compiled.
    """
    if run.config.zero.offload_optimizer:
        compile_cpu_adam(run.progress.log)
    with partitioned_loading(run.settings):
        model = bind_mpo_forward(load_model(run.inputs.model), run.config.loss)
        return build_engine(model, run.config, run.settings)


def open_reference(run: Run, scorer: Scorer) -> Reference:
    """The run's reference: the store, or the model itself with its adapters off; of a loss without
    one, nothing."""
    if run.config.reference.mode == "live" and Objective(run.config.loss).takes_reference:
        return LiveReference(scorer)
    return StoredReference(open_store(run, scorer))


def open_store(run: Run, scorer: Scorer) -> ReferenceStore:
    """What the run's loss takes of the reference, from its stores, which are built on first use.

    Raises:
        UserError: one is of something else or damaged, or the model gives numbers that are not
            finite.
    """
    objective = Objective(run.config.loss)
    stores = objective.stores(run.store_folder, run.config.train.seed)
    return ReferenceStore.joined(
        *(
            _open_store(run, scorer, store, store.sequences(run.examples, run.mismatched))
            for store in stores
        )
    )


def _open_store(
    run: Run, scorer: Scorer, store: StoreOf, sequences: Sequence[TokenizedResponse]
) -> ReferenceStore:
    def build_values(parts: Parts) -> SequenceScores:
        with run.progress.task(store.name, len(sequences)) as advance:
            return build(scorer, sequences, run.examples, parts, advance, pools=store.pools)

    return ReferenceStore.open(
        store.folder,
        identity(run.identity, sequences, scorer.pool if store.pools else None),
        sequences,
        run.inputs.data.date,
        build_values,
        run.progress.log,
    )


def measured_before(run: Run, scorer: Scorer) -> Measurement:
    """The measured examples before training: those that the folder keeps, or those that runs share
    with their reference store, or measured now and kept."""
    before = on_main(_kept, run.folder.before, run)
    if before is None:
        before = shared_before(run, scorer) if run.config.reference.store else _before(run, scorer)
        on_main(before.save, run.folder.before)
    return before


def shared_before(run: Run, scorer: Scorer) -> Measurement:
    """As `measured_before`, of all runs that measure the same rows and share a reference store:
    kept beside that. Of several processes that want it at once one keeps it, and none waits."""
    what = [run.identity, run.config.loss.pool, rows_digest(run.measured)]
    of = hashlib.sha256(to_json(what).encode()).hexdigest()[:16]
    place = run.store_folder.with_name(f"{run.store_folder.name}-gaps-{of}")
    before = on_main(_kept, place, run)
    if before is None:
        claim = Claim(place.with_name(f".{place.name}.lock"))
        other = on_main(claim.take)
        before = _before(run, scorer)
        if other is None:
            on_main(before.save, place)
        claim.release()
    return before


def _before(run: Run, scorer: Scorer) -> Measurement:
    return measure(run, scorer, "Gaps before training")


def _kept(folder: Path, run: Run) -> Measurement | None:
    kept = Measurement.load(folder, len(run.measured))
    return kept if kept is not None and kept.is_finite else None


def measure(run: Run, scorer: Scorer, name: str) -> Measurement:
    """Measures the examples with the model as it is now, under a bar of that name."""
    with run.progress.task(name, len(distinct_sequences(run.measured))) as advance:
        return scorer.measure(run.measured, advance)
