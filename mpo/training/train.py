"""The training run, from a configuration to a table: one function that reads from top to bottom.

reference -> gaps before -> step-0 self-check -> steps -> checkpoint -> gaps after -> export ->
result
"""

from __future__ import annotations

from typing import Any

import deepspeed
from transformers import set_seed

from mpo.config import Config
from mpo.models.scoring import Scorer
from mpo.runtime.determinism import deterministic
from mpo.runtime.errors import UserError
from mpo.runtime.files import write_json
from mpo.runtime.interruption import Interrupted, Interruption, interruptions
from mpo.runtime.ranks import is_main, launcher_is_gone, on_main, start
from mpo.training import checkpoint, checkpoint_folder
from mpo.training.curves import plot_run
from mpo.training.engine import refuse_attention, track
from mpo.training.export import export_engine
from mpo.training.kl import MismatchedAnswers
from mpo.training.metrics import StepMetrics
from mpo.training.micro_batches import Batches
from mpo.training.result import RunResult
from mpo.training.run import (
    Run,
    claim_folder,
    load_engine,
    measure,
    measured_before,
    open_reference,
    read_run,
    say_what_differs,
    show_header,
)
from mpo.training.self_check import self_check
from mpo.training.step import Stepper


def train(config: Config) -> dict[str, Any]:
    """Runs MPO training and returns the result that is also written to `<output_dir>/result.json`.

    train(load_config("demo", ["output_dir=runs/short"]))["all"]["distance"]

    Raises:
        UserError: bad configuration, data, model or output folder (before training starts), or
            repeated non-finite gradients.
        Interrupted: SIGTERM or Ctrl-C between the first and the last step; a checkpoint was
            written.
        KeyboardInterrupt: SIGTERM or Ctrl-C before, when nothing is lost, or after, when the last
            step's checkpoint is written.
    """
    with deterministic(config.train.deterministic), interruptions() as interruption:
        return _train(config, interruption)


def _train(config: Config, interruption: Interruption) -> dict[str, Any]:
    device = start()
    set_seed(config.train.seed)

    # Refuse and open: before the weights are loaded.
    refuse_attention(config, device)
    run = read_run(config, device)
    claim_folder(run)
    if run.inputs.examples.dropped:
        on_main(run.folder.write_dropped, run.inputs.examples.dropped)
    say_what_differs(run)
    show_header(run)

    # Load, and measure what the model is before training.
    engine, guard = load_engine(run)
    scorer = Scorer(engine, config.loss.pool, device)
    reference = open_reference(run, scorer)
    mismatched = MismatchedAnswers(scorer, reference, run.mismatched)
    before = measured_before(run, scorer)

    # Go on where a checkpoint is, or begin.
    done = _resume(run, engine)
    if done is None:
        self_check(run, scorer, reference, mismatched)
    if lost := on_main(run.folder.truncate_metrics, done or 0):
        run.progress.log(f"WARNING: {lost}")

    batches = Batches(run.examples, run.schedule, config)
    stepper = Stepper(run, engine, guard, reference, mismatched, batches)
    _take_steps(run, stepper, done or 0, interruption)
    interruption.heed()

    # Measure, export, result.
    after = measure(run, scorer, "Gaps after training")
    on_main(after.save, run.folder.after)
    if config.checkpoint.export:
        export_engine(
            engine, run.inputs.tokenizer, run.folder.model, config.zero.stage, run.inputs.model
        )
    result = on_main(
        RunResult.of, run.measured, before, after, config.loss.gap_scale, config.loss.name
    )
    on_main(_finish, run, result)
    return result.as_dict()


def _resume(run: Run, engine: deepspeed.DeepSpeedEngine) -> int | None:
    """Restores the newest checkpoint. Returns how many steps it has done, or None without one."""
    newest = on_main(checkpoint_folder.newest, run.folder.checkpoints, run.progress.log)
    if newest is None:
        return None
    done = checkpoint.load(engine, newest, run.config.zero.stage)
    steps = run.schedule.steps
    run.progress.log(f"Going on from {newest.folder} ({done} of {steps} steps done)")
    return done


def _take_steps(run: Run, stepper: Stepper, done: int, interruption: Interruption) -> None:
    """The optimizer steps that are left.

    Raises:
        UserError: repeated non-finite gradients.
        Interrupted: a rank was asked to stop.
    """

    def is_to_stop() -> bool:
        return interruption.requested or launcher_is_gone()

    steps = run.schedule.steps
    with (
        interruption.deferred("after this step, with a checkpoint"),
        run.progress.steps(steps, done, run.config.log_every) as show,
    ):
        for number in range(done, steps):
            metrics = stepper.step(number, is_to_stop)
            _record(run, stepper.engine, metrics)
            show(metrics.step, metrics.in_words(), metrics.skipped)
            _stop_if_skipped_too_often(run, stepper.guard.skipped_in_a_row, metrics)
            _checkpoint_if_due(run, stepper.engine, metrics)
            _stop_if_asked(run, metrics)


def _record(run: Run, engine: deepspeed.DeepSpeedEngine, metrics: StepMetrics) -> None:
    """Hands the numbers to the trackers and, where they are due, to metrics.jsonl."""
    track(engine, metrics)
    is_last = metrics.step == run.schedule.steps
    if not is_main() or not (
        metrics.step % run.config.log_every == 0 or metrics.skipped or is_last
    ):
        return
    if failure := run.folder.append_metrics(metrics.as_row()):
        run.progress.log(f"WARNING: {failure} Training goes on.")


def _stop_if_skipped_too_often(run: Run, in_a_row: int, metrics: StepMetrics) -> None:
    if in_a_row >= run.config.train.max_skipped_steps:
        raise UserError(
            f"{in_a_row} steps in a row had non-finite gradients (last: step"
            f" {metrics.step}, loss {metrics.loss}). The weights are as they were before them."
            " Lower train.learning_rate, or use model.dtype=float32."
        )


def _checkpoint_if_due(run: Run, engine: deepspeed.DeepSpeedEngine, metrics: StepMetrics) -> None:
    """After the last step always, before anything else: what comes after it may be interrupted or
    fail, and is done again."""
    stop, options = metrics.totals.stop_requested, run.config.checkpoint
    is_last = metrics.step == run.schedule.steps
    if not (stop or is_last or (options.every is not None and metrics.step % options.every == 0)):
        return
    failure = checkpoint.save(
        engine, run.folder.checkpoints, metrics.step, run.config.zero.stage, options.keep
    )
    if failure and stop:
        raise UserError(failure)
    if failure:
        run.progress.log(f"WARNING: {failure} The run goes on.")


def _stop_if_asked(run: Run, metrics: StepMetrics) -> None:
    if metrics.totals.stop_requested:
        raise Interrupted(
            f"Stopped after step {metrics.step} of {run.schedule.steps}. The same command goes on"
            f" from {run.folder.checkpoints}."
        )


def _finish(run: Run, result: RunResult) -> None:
    """Picture, result, table. A run with a result is finished, so that is written when all else is
    on the disk.

    Where no checkpoints were asked for and the model is exported, those for going on have served.
    """
    folder, options = run.folder, run.config.checkpoint
    folder.flush_metrics()
    plot_run(folder.metrics, result.as_dict(), folder.plot)
    write_json(folder.result, result.as_dict())
    if options.every is None and options.export:
        checkpoint_folder.remove_all(folder.checkpoints)
    result.show(run.progress.console)
    run.progress.log(f"Written to {folder.root}: " + ", ".join(folder.listing()))
