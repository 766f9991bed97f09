"""The training run, from a configuration to a table: one function that reads from top to bottom.

    reference store -> gaps before -> step-0 self-check -> steps -> checkpoint -> gaps after ->
    export -> report

Gradients are exact averages over the pairs of a step whatever the number of ranks and
micro-batches: each micro-batch's backward starts from (sum over its pairs) * world / (pairs of the
step), and DeepSpeed averages over ranks.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import deepspeed
import deepspeed.comm as dist
import torch
from transformers import set_seed
from transformers.integrations import HfDeepSpeedConfig

from mpo.config import Config, ReferenceConfig
from mpo.data.examples import Example
from mpo.data.run_date import with_date
from mpo.models.attention import shares_prompts
from mpo.models.forward import Outputs, Scores, bind_mpo_forward
from mpo.models.inputs import Inputs, load_inputs
from mpo.models.loading import load_model
from mpo.models.scoring import Measurement, distinct_sequences, measure_gaps
from mpo.runtime.errors import UserError
from mpo.runtime.files import write_json
from mpo.runtime.interruption import Interrupted, Interruption, interruptions
from mpo.runtime.progress import Progress
from mpo.runtime.ranks import is_main, launcher_is_gone, on_main, start
from mpo.training import checkpoint, checkpoint_folder, reference
from mpo.training.cpu_adam import compile_cpu_adam
from mpo.training.curves import plot_run
from mpo.training.engine import (
    build_engine,
    deepspeed_settings,
    learning_rate,
    peak_memory_gib,
    track,
)
from mpo.training.metrics import StepSums
from mpo.training.micro_batches import Batches, in_micro_batches, make_batch
from mpo.training.reference import LiveReference, Reference
from mpo.training.result import RunResult
from mpo.training.run_folder import OutputFolder
from mpo.training.schedule import Schedule, schedule_of


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
    with interruptions() as interruption:
        return _train(config, interruption)


def _train(config: Config, interruption: Interruption) -> dict[str, Any]:
    device = start()
    set_seed(config.train.seed)
    progress = Progress(enabled=is_main())

    # Everything that can be refused is refused before the weights are loaded.
    if config.model.attention == "flex_attention" and device.type == "cpu":
        raise UserError(
            "model.attention=flex_attention has no backward pass on a CPU. Set"
            " model.attention=packed, which runs anywhere."
        )
    settings = deepspeed_settings(config)
    config = on_main(lambda: with_date(config))
    inputs = load_inputs(config, progress.log)
    tokenizer, examples, measured, dropped = (
        inputs.tokenizer,
        inputs.examples.train,
        inputs.examples.measured,
        inputs.examples.dropped,
    )
    folder = OutputFolder(Path(config.output_dir))
    identity = on_main(lambda: reference.model_identity(inputs.model, tokenizer))
    digest, threads = reference.rows_digest(examples, measured), torch.get_num_threads()
    on_main(lambda: folder.open(config, digest, identity, threads))
    if dropped:
        on_main(lambda: folder.write_dropped(dropped))
    if (began_with := on_main(lambda: folder.other_threads(threads))) is not None:
        progress.log(
            f"WARNING: This run began with {began_with} CPU thread(s) a rank and goes on with"
            f" {threads}, which changes the last bits of a CPU's sums. Set"
            f" OMP_NUM_THREADS={began_with} to go on bit for bit."
        )
    if versions := on_main(folder.other_versions):
        progress.log(
            f"WARNING: This run began with {', '.join(versions)}. What it computes from here on may"
            " differ in its last bits."
        )

    schedule = schedule_of(config, len(examples))
    _show_header(config, inputs, schedule, progress)
    if config.zero.offload_optimizer:
        compile_cpu_adam(progress.log)
    # from_pretrained looks for it
    keep_alive = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None
    model = bind_mpo_forward(load_model(inputs.model), config.loss)
    engine, guard = build_engine(model, config, settings)
    del keep_alive

    values = _open_reference(engine, inputs, identity, config, folder, device, progress)
    before = on_main(lambda: Measurement.load(folder.before, len(measured)))
    if before is None:
        with progress.task("Gaps before training", len(distinct_sequences(measured))) as advance:
            before = measure_gaps(
                engine, measured, pool=config.loss.pool, device=device, advance=advance
            )
        measured_before = before
        on_main(lambda: measured_before.save(folder.before))

    first_step = 0
    latest = on_main(lambda: checkpoint_folder.newest(folder.checkpoints, progress.log))
    if latest is not None:
        first_step = checkpoint.load(engine, latest, config.zero.stage)
        progress.log(f"Going on from {latest.folder} ({first_step} of {schedule.steps} steps done)")
    else:
        _self_check(engine, examples, values, config, device)
    if lost := on_main(lambda: folder.truncate_metrics(first_step)):
        progress.log(f"WARNING: {lost}")

    batches = Batches(examples, schedule, config)
    languages = sorted({e.language for e in examples})
    skipped_in_a_row = 0
    with (
        interruption.deferred("after this step, with a checkpoint"),
        progress.steps(schedule.steps, first_step, config.log_every) as show,
    ):
        for step in range(first_step, schedule.steps):
            began = time.perf_counter()
            seed_step(config.train.seed, step)
            last = step + 1 == schedule.steps
            rate = learning_rate(config.train, step, schedule.steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            sums = StepSums(languages)
            pairs = len(schedule.positions(step))
            for part in batches.micro_batches(step, dist.get_rank(), dist.get_world_size()):
                batch = make_batch(part, values, config)
                output = engine(batch=batch.to(device))
                engine.backward(output.loss * (dist.get_world_size() / pairs), scale_wrt_gas=False)
                sums.add(batch, output)
            totals = sums.reduce(interruption.requested or launcher_is_gone(), device)
            engine.step()
            skipped = guard.skipped(engine)
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0

            seconds = time.perf_counter() - began
            means = totals.means(pairs, config.loss)
            row = {
                "step": step + 1,
                "epoch": schedule.positions(step).stop / schedule.rows,
                "pairs": pairs,
                **means,
                "learning_rate": rate,
                "grad_norm": guard.grad_norm(engine),
                "skipped": skipped,
                "seconds": seconds,
                "tokens_per_second": round(means["tokens"] / seconds, 1),
                "peak_memory_gib": peak_memory_gib(device),
            }
            track(engine, row)
            if (
                is_main()
                and ((step + 1) % config.log_every == 0 or skipped or last)
                and (failure := folder.append_metrics(row))
            ):
                progress.log(f"WARNING: {failure} Training goes on.")
            show(row)
            if skipped_in_a_row >= config.train.max_skipped_steps:
                raise UserError(
                    f"{skipped_in_a_row} steps in a row had non-finite gradients (last: step"
                    f" {step + 1}, loss {row['loss']}). The weights are as they were before them."
                    " Lower train.learning_rate, or use model.dtype=float32."
                )
            # After the last step always, before anything else: what comes after it may be
            # interrupted or fail, and is done again.
            stop, every = totals.stop_requested, config.checkpoint.every
            if stop or last or (every is not None and (step + 1) % every == 0):
                failure = checkpoint.save(
                    engine, folder.checkpoints, step + 1, config.zero.stage, config.checkpoint.keep
                )
                if failure and stop:
                    raise UserError(failure)
                if failure:
                    progress.log(f"WARNING: {failure} The run goes on.")
            if stop:
                raise Interrupted(
                    f"Stopped after step {step + 1} of {schedule.steps}. The same command goes on"
                    f" from {folder.checkpoints}."
                )
    interruption.heed()

    with progress.task("Gaps after training", len(distinct_sequences(measured))) as advance:
        after = measure_gaps(
            engine, measured, pool=config.loss.pool, device=device, advance=advance
        )
    if config.checkpoint.export:
        checkpoint.export(engine, tokenizer, folder.model, config.zero.stage, inputs.model)
    result = on_main(lambda: RunResult.of(measured, before, after, config.loss.beta))
    on_main(lambda: _finish(folder, result, config, progress))
    return result.as_dict()


def _show_header(config: Config, inputs: Inputs, schedule: Schedule, progress: Progress) -> None:
    """The run in a few lines: model, rows, dropped rows, batch arithmetic."""
    train, examples, dropped = config.train, inputs.examples.train, inputs.examples.dropped
    dominant = len({e.dominant for e in examples})
    progress.log(
        f"Model     {config.model.path} ({config.model.dtype}), ZeRO-{config.zero.stage},"
        f" {dist.get_world_size()} rank(s)"
    )
    progress.log(f"Training  {_by_language(examples)}, sharing {dominant} dominant pairs")
    progress.log(f"Measured  {_by_language(inputs.examples.measured)}")
    if dropped:
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in Counter(b.reason for b in dropped).most_common()
        )
        progress.log(f"Dropped   {len(dropped)} rows ({reasons}); see dropped_rows.jsonl")
    progress.log(
        f"Steps     {schedule.steps} of {train.pairs_per_step} pairs (micro-batches of"
        f" {train.pairs_per_micro_batch}), learning rate {train.learning_rate:g}"
        f" {train.schedule}, beta {config.loss.beta:g}, retention weight"
        f" {config.loss.retention_weight:g}"
    )


def _by_language(examples: Sequence[Example]) -> str:
    counts = Counter(e.language for e in examples)
    languages = ", ".join(f"{language} {n}" for language, n in sorted(counts.items()))
    return f"{len(examples)} rows ({languages})"


def seed_step(seed: int, step: int) -> None:
    """Makes what a step draws (dropout) a function of seed, step and rank, so that a run that goes
    on draws what it would have drawn."""
    torch.manual_seed(random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63))


def _finish(folder: OutputFolder, result: RunResult, config: Config, progress: Progress) -> None:
    """Picture, result, table. A run with a result is finished, so that is written when all else is
    on the disk.

    Where no checkpoints were asked for and the model is exported, those for going on have served.
    """
    folder.flush_metrics()
    plot_run(folder.metrics, result.as_dict(), folder.plot)
    write_json(folder.result, result.as_dict())
    if config.checkpoint.every is None and config.checkpoint.export:
        checkpoint_folder.remove_all(folder.checkpoints)
    result.show(progress.console)
    progress.log(f"Written to {folder.root}: " + ", ".join(folder.listing()))


def precompute(config: Config) -> Path:
    """Builds the reference store of a configuration, or finds it built, and returns its folder.

    Raises:
        UserError: bad configuration, data or model; or a store of something else is there.
    """
    device = start()
    progress = Progress(enabled=is_main())
    settings = deepspeed_settings(config)
    config = on_main(lambda: with_date(config))
    inputs = load_inputs(config, progress.log)
    folder = OutputFolder(Path(config.output_dir))
    identity = on_main(lambda: reference.model_identity(inputs.model, inputs.tokenizer))
    if config.reference.store is None:  # else nothing is written there
        rows = reference.rows_digest(inputs.examples.train, inputs.examples.measured)
        threads = torch.get_num_threads()
        on_main(lambda: folder.open(config, rows, identity, threads, may_be_finished=True))
    keep_alive = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None
    model = bind_mpo_forward(
        load_model(inputs.model.model_copy(update={"lora": None})), config.loss
    )
    # Scoring needs no optimizer; only ZeRO-3 needs an engine, which gathers the weights.
    engine: Any = (
        deepspeed.initialize(model=model, config=settings)[0]
        if keep_alive
        else cast(torch.nn.Module, model).to(device)
    )
    stored = config.model_copy(update={"reference": ReferenceConfig(store=config.reference.store)})
    _open_reference(engine, inputs, identity, stored, folder, device, progress)
    dist.barrier()
    return store_folder(config, folder)


def store_folder(config: Config, folder: OutputFolder) -> Path:
    """Where the run's reference store is."""
    return folder.reference if config.reference.store is None else Path(config.reference.store)


def _open_reference(
    engine: deepspeed.DeepSpeedEngine,
    inputs: Inputs,
    identity: dict[str, Any],
    config: Config,
    folder: OutputFolder,
    device: torch.device,
    progress: Progress,
) -> Reference:
    """The run's reference: the store, built on first use, or the model itself with its adapters
    off."""
    if config.reference.mode == "live":
        return LiveReference(engine, config.loss.pool, device)
    examples, path, pool = inputs.examples.train, store_folder(config, folder), config.loss.pool
    manifest = reference.identity(identity, examples, pool)

    def build(parts: reference.Parts) -> Scores:
        with progress.task(
            "Reference store", len(reference.dominant_sequences(examples))
        ) as advance:
            return reference.build(
                engine, examples, parts, pool=pool, device=device, advance=advance
            )

    return reference.open_store(path, manifest, examples, inputs.data.date, build, progress.log)


def _self_check(
    engine: deepspeed.DeepSpeedEngine,
    examples: Sequence[Example],
    values: Reference,
    config: Config,
    device: torch.device,
) -> None:
    """Before the first step the policy is the reference: L2 must vanish and the dominant gap must
    reproduce the store.

    A difference means that training would pull toward the wrong place: dropout that is on, a store
    of another model, a packed neighbour that leaks. Compared in training mode, packed with other
    sequences than the store's.
    """
    probe = examples[:2]
    first = probe[0]
    store = values.of(reference.dominant_sequences(probe))
    (part,) = in_micro_batches(
        probe, pairs=len(probe), tokens=None, share_prompts=shares_prompts(config.model.attention)
    )
    batch = make_batch(part, values, config).to(device)
    with torch.no_grad():
        output: Outputs = engine(batch=batch)
    size = float(batch.pooled_reference.square().mean())
    relative = float(output.l2) / len(probe) / max(size, 1e-30)
    gaps = measure_gaps(engine, [first], pool=config.loss.pool, device=device)
    gap, stored = float(gaps.dominant[0]), store.gap(first)
    bf16 = config.model.dtype == "bfloat16"
    if not relative <= (1e-3 if bf16 else 1e-6) or not abs(gap - stored) <= (0.1 if bf16 else 1e-3):
        raise UserError(
            f"Step-0 self-check failed on {first.source}: before any training, relative L2 is"
            f" {relative:.2e} (should be 0) and the dominant gap is {gap:.4f} while the reference"
            f" store holds {stored:.4f}. Turn off dropout in the model's config, try"
            " model.attention=packed, and delete the reference folder if the model changed."
        )
