"""The training run, from a configuration to a table: one function that reads from top to bottom.

    reference store -> gaps before -> step-0 self-check -> steps -> gaps after -> export -> report

Gradients are exact averages over the pairs of a step whatever the number of ranks and micro-batches: each micro-batch's backward starts
from (sum over its pairs) * world / (pairs of the step), and DeepSpeed averages over ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import HfDeepSpeedConfig

from mpo import checkpoint, reference, report
from mpo.batching import MPOBatch, Schedule, order_of_rows, pack
from mpo.config import Config
from mpo.data import BadRow, load_rows
from mpo.demo_model import resolve_model
from mpo.distributed import is_main, on_main, start
from mpo.engine import build_engine, deepspeed_settings, learning_rate
from mpo.errors import UserError
from mpo.files import write_json
from mpo.interruption import Interrupted, interruptions
from mpo.model import MPOForward, bind_mpo_forward, check_model, load_model, load_tokenizer
from mpo.output_folder import OutputFolder
from mpo.progress import Progress
from mpo.reference import ReferenceStore
from mpo.scoring import distinct_sequences, measure_gaps
from mpo.step_metrics import StepSums
from mpo.tokenizing import Example, tokenize_rows


def train(config: Config) -> dict[str, Any]:
    """Runs MPO training and returns the result that is also written to `<output_dir>/result.json`.

    Raises:
        UserError: bad configuration, data, model or output folder (before training starts), or repeated non-finite gradients.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    device = start()
    set_seed(config.train.seed)
    progress = Progress(enabled=is_main())

    # Everything that can be refused is refused before the weights are loaded.
    settings = deepspeed_settings(config)
    model_path = resolve_model(config.model.path, progress.log)  # on every rank: nodes have caches of their own
    model_config = config.model.model_copy(update={"path": model_path})
    check_model(model_config)
    tokenizer = load_tokenizer(model_config)
    examples, dropped = _read_examples(config.data.train, tokenizer, config)
    held_out, dropped_held_out = _read_examples(config.data.eval, tokenizer, config) if config.data.eval else (examples, [])
    measured = _evenly_spaced(held_out, config.data.eval_rows_per_language)
    folder = OutputFolder(Path(config.output_dir))
    on_main(lambda: folder.open(config, reference.digest(distinct_sequences([*examples, *measured]))))
    dropped += dropped_held_out
    if is_main() and dropped:
        folder.write_dropped(dropped)

    schedule = Schedule(
        rows=len(examples),
        pairs_per_step=config.train.pairs_per_step,
        pairs_per_micro_batch=config.train.pairs_per_micro_batch,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
    )
    progress.header(config, examples, measured, dropped, schedule, dist.get_world_size())
    keep_alive = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None  # from_pretrained looks for it
    model = bind_mpo_forward(load_model(model_config), config.loss)
    engine, guard = build_engine(model, config, settings)
    del keep_alive

    store = _open_reference_store(engine, tokenizer, model_path, examples, config, folder, device, progress)
    before = on_main(folder.load_gaps_before)
    if before is None:
        with progress.task("Gaps before training", len(distinct_sequences(measured))) as advance:
            before = measure_gaps(engine, measured, pool=config.loss.pool, device=device, advance=advance)
        measured_before = before
        on_main(lambda: folder.save_gaps_before(measured_before))

    first_step = 0
    latest = on_main(lambda: checkpoint.newest(folder.checkpoints))
    if latest is not None:
        first_step = checkpoint.load(engine, latest, config.zero.stage)
        progress.log(f"Going on from {latest.folder} ({first_step} of {schedule.steps} steps done)")
    else:
        _self_check(engine, examples, store, config, device)
    on_main(lambda: folder.truncate_metrics(first_step))

    batches = _BatchMaker(examples, store, schedule, config)
    languages = sorted({e.language for e in examples})
    skipped_in_a_row = 0
    with interruptions() as interruption, progress.steps(schedule.steps, first_step, config.log_every) as show:
        for step in range(first_step, schedule.steps):
            began = time.perf_counter()
            last = step + 1 == schedule.steps
            rate = learning_rate(config.train, step, schedule.steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            sums = StepSums(languages)
            pairs = len(schedule.positions(step))
            for positions in schedule.micro_batches(step, dist.get_rank(), dist.get_world_size()):
                batch = batches.make(positions)
                output = engine(batch=batch.to(device))
                engine.backward(output.loss * (dist.get_world_size() / pairs), scale_wrt_gas=False)
                sums.add(batch, output)
            totals = sums.reduce(interruption.requested, device)
            engine.step()
            skipped = guard.skipped(engine)
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0

            row = {
                "step": step + 1,
                "epoch": schedule.positions(step).stop / schedule.rows,
                "pairs": pairs,
                **totals.means(pairs, config.loss.retention_weight),
                "learning_rate": rate,
                "grad_norm": guard.grad_norm(engine),
                "skipped": skipped,
                "seconds": time.perf_counter() - began,
            }
            if is_main() and ((step + 1) % config.log_every == 0 or skipped or last):
                folder.append_metrics(row)
            show(row)
            if skipped_in_a_row >= config.train.max_skipped_steps:
                raise UserError(
                    f"{skipped_in_a_row} steps in a row had non-finite gradients (last: step {step + 1}, loss {row['loss']}). The "
                    "weights are as they were before them. Lower train.learning_rate, or use model.dtype=float32."
                )
            due = config.checkpoint.every is not None and (last or (step + 1) % config.checkpoint.every == 0)
            stop = totals.stop_requested and not last
            if due or stop:
                checkpoint.save(engine, folder.checkpoints, step + 1, config.zero.stage, config.checkpoint.keep)
            if stop:
                raise Interrupted(f"Stopped after step {step + 1} of {schedule.steps}. The same command goes on from {folder.checkpoints}.")

    with progress.task("Gaps after training", len(distinct_sequences(measured))) as advance:
        after = measure_gaps(engine, measured, pool=config.loss.pool, device=device, advance=advance)
    if config.checkpoint.export:
        checkpoint.export(engine, tokenizer, folder.model, config.zero.stage)
    result = on_main(lambda: report.summarise(measured, before, after, config.loss.beta))
    if is_main():
        write_json(folder.result, result)
        report.print_table(result, progress.console)
        report.plot(folder.metrics, result, folder.plot)
        progress.log(f"Written to {folder.root}: " + ", ".join(folder.listing()))
    dist.barrier()
    return result


def _read_examples(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: Config) -> tuple[list[Example], list[BadRow]]:
    rows, unreadable = load_rows(files, config.data)
    examples, untokenizable = tokenize_rows(rows, tokenizer, config.data)
    return examples, unreadable + untokenizable


def _evenly_spaced(examples: Sequence[Example], per_language: int | None) -> list[Example]:
    """At most `per_language` examples of each language, evenly spaced, in their order."""
    if per_language is None:
        return list(examples)
    chosen: set[int] = set()
    for language in {e.language for e in examples}:
        places = [i for i, e in enumerate(examples) if e.language == language]
        count = min(per_language, len(places))
        chosen.update(places[i * len(places) // count] for i in range(count))
    return [e for i, e in enumerate(examples) if i in chosen]


def _open_reference_store(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    model_path: str,
    examples: Sequence[Example],
    config: Config,
    folder: OutputFolder,
    device: torch.device,
    progress: Progress,
) -> ReferenceStore:
    """The run's reference store, built on first use."""
    manifest = on_main(lambda: reference.identity(engine.module, tokenizer, model_path, examples, config.loss.pool))
    store = on_main(lambda: reference.load(folder.reference, manifest, examples))
    if store is None:
        sequences = len(reference.dominant_sequences(examples))
        with progress.task("Reference store", sequences) as advance:
            store = reference.build(engine, examples, pool=config.loss.pool, device=device, advance=advance)
        built = store
        on_main(lambda: reference.save(built, folder.reference, manifest))
    return store


def _self_check(
    engine: deepspeed.DeepSpeedEngine,
    examples: Sequence[Example],
    store: ReferenceStore,
    config: Config,
    device: torch.device,
) -> None:
    """Before the first step the policy is the reference: L2 must vanish and the dominant gap must reproduce the store.

    A difference means that training would pull toward the wrong place: dropout that is on, a store of another model, a packed neighbour
    that leaks. Compared in training mode, packed with other sequences than the store's.
    """
    probe = examples[:2]
    first = probe[0]
    batch = make_batch(probe, [1.0] * len(probe), store, config).to(device)
    with torch.no_grad():
        output: MPOForward = engine(batch=batch)
    size = float(batch.pooled_reference.square().mean())
    relative = float(output.l2) / len(probe) / max(size, 1e-30)
    gaps = measure_gaps(engine, [first], pool=config.loss.pool, device=device)
    gap, stored = float(gaps.dominant[0]), store.gap(first)
    bf16 = config.model.dtype == "bfloat16"
    if not relative <= (1e-3 if bf16 else 1e-6) or not abs(gap - stored) <= (0.1 if bf16 else 1e-3):
        raise UserError(
            f"Step-0 self-check failed on {first.source}: before any training, relative L2 is {relative:.2e} (should be 0) and the "
            f"dominant gap is {gap:.4f} while the reference store holds {stored:.4f}. Turn off dropout in the model's config, try "
            "model.attention=packed, and delete the reference folder if the model changed."
        )


def make_batch(examples: Sequence[Example], weights: Sequence[float], store: ReferenceStore, config: Config) -> MPOBatch:
    """Packs weighted pairs: target chosen, target rejected, then each distinct dominant sequence once.

    L2 of a pair is the mean over its two dominant sequences, so each counts half of the weights of the pairs that share it.
    """
    shared: dict = {}
    for example, weight in zip(examples, weights, strict=True):
        for sequence in (example.dominant_chosen, example.dominant_rejected):
            shared[sequence] = shared.get(sequence, 0.0) + weight / 2
    targets = [e.target_chosen for e in examples] + [e.target_rejected for e in examples]
    packed = pack(
        targets + list(shared),
        scored=range(len(targets)),
        pooled=range(len(targets), len(targets) + len(shared)),
        pool=config.loss.pool,
    )
    return MPOBatch(
        packed=packed,
        reference_gap=torch.tensor([store.gap(e) for e in examples]),
        pair_weights=torch.tensor(weights),
        pooled_reference=torch.stack([store.pooled(sequence) for sequence in shared]),
        pooled_weights=torch.tensor(list(shared.values())),
        languages=tuple(e.language for e in examples),
    )


class _BatchMaker:
    """Turns positions in the concatenated epochs into packed micro-batches."""

    def __init__(self, examples: Sequence[Example], store: ReferenceStore, schedule: Schedule, config: Config) -> None:
        self._examples, self._store, self._config = examples, store, config
        self._orders: dict[int, list[int]] = {}

    def make(self, positions: Sequence[int | None]) -> MPOBatch:
        examples = [self._examples[0] if p is None else self._examples[self._row(p)] for p in positions]
        weights = [0.0 if p is None else 1.0 for p in positions]
        return make_batch(examples, weights, self._store, self._config)

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self._examples))
        if epoch not in self._orders:
            train = self._config.train
            self._orders[epoch] = order_of_rows(self._examples, epoch, train.seed, train.group_by_dominant)
        return self._orders[epoch][place]
