"""The reference store: what the model said of the rows before training.

The reference model is the policy before the first step, so its reward gaps and pooled hidden states
on the dominant pairs are constants of the data. They are computed once, kept as
`<output_dir>/reference/{manifest.json, values.safetensors}`, and no reference model is resident
while training.

Losses of log-ratios take log-probabilities of target pairs, too. Those have a store of their own
beside it, `<output_dir>/reference-target`. So have answers to other prompts, for KTO's KL:
`<output_dir>/reference-mismatched-target-SEED` and `-dominant-SEED`. What a store holds follows
from its name and the rows, and not from the loss, so that runs of any loss may share all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedTokenizerBase

from mpo.config import ModelConfig
from mpo.data.examples import Example, TokenizedResponse
from mpo.data.run_date import parts_folder
from mpo.models import lora
from mpo.models.forward import SequenceScores
from mpo.models.packing import FILLER, Pool
from mpo.models.scoring import Scorer
from mpo.runtime.claims import Claim
from mpo.runtime.errors import UserError
from mpo.runtime.files import (
    new_folder,
    read_json,
    read_object,
    remove,
    remove_incomplete,
    sha256_of_files,
    unfinished,
    write_json,
    writing,
)
from mpo.runtime.ranks import on_main

FORMAT = 2
PART = 256
"""Sequences of one piece of a store that is being built; what an interruption loses at most."""
PATIENCE = 1.0
"""Seconds between two looks at a store that another process is building."""


@dataclass(frozen=True)
class ReferenceStore:
    """Mean log-probability of K distinct (prompt, response) sequences, and the pooled hidden state
    of the dominant ones, which come first."""

    rows: dict[TokenizedResponse, int]
    scores: SequenceScores  # mean_logp (K,), pooled (K', D); of what is only scored (K, 0)

    def gap(self, example: Example) -> float:
        """RG of the example's dominant pair under the reference: the constant of L1."""
        chosen, rejected = (self.rows[sequence] for sequence in example.dominant)
        return float(self.scores.mean_logp[chosen] - self.scores.mean_logp[rejected])

    def pooled(self, sequence: TokenizedResponse) -> torch.Tensor:
        """(D,) fp32 pooled hidden state of one dominant sequence under the reference: the constant
        of L2."""
        return self.scores.pooled[self.rows[sequence]]

    def logp(self, sequence: TokenizedResponse) -> float:
        """Sum of the log-probabilities of a scored sequence's response under the reference."""
        return float(self.scores.mean_logp[self.rows[sequence]]) * len(sequence.response)

    @classmethod
    def of(cls, sequences: Sequence[TokenizedResponse], scores: SequenceScores) -> ReferenceStore:
        """The scores of these sequences, in their order."""
        return cls({sequence: i for i, sequence in enumerate(sequences)}, scores)

    @classmethod
    def joined(cls, *stores: ReferenceStore) -> ReferenceStore:
        """The stores of a run as one. Where one has pooled states, it is the first."""
        if not stores:
            return cls({}, SequenceScores(torch.zeros(0), torch.zeros(0, 0)))
        means: dict[TokenizedResponse, torch.Tensor] = {}
        for store in stores:
            for sequence, mean in zip(store.rows, store.scores.mean_logp, strict=True):
                means.setdefault(sequence, mean)
        return cls.of(
            list(means), SequenceScores(torch.stack(list(means.values())), stores[0].scores.pooled)
        )

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: dict[str, Any],
        sequences: Sequence[TokenizedResponse],
        date: datetime | None,
        build_values: Callable[[Parts], SequenceScores],
        log: Callable[[str], None],
    ) -> ReferenceStore:
        """The store at `folder`, built where there is none. Of several processes that want it at
        once one builds and the others wait for it.

        Called by all ranks. `build_values` gets the finished parts, which are kept beside the store
        until it is whole, so that an interrupted build goes on where it was.

        Args:
            manifest: what the values depend on, `identity`.
            sequences: whose values it holds, in their order.
            date: the date that the chat template may have printed, which the store keeps for
                whoever uses it later.
        Raises:
            UserError: the store is of something else or damaged, or cannot be written; or what
                `build_values` raises.
        """
        folder = Path(os.path.realpath(folder))  # of a link to itself too
        claim = Claim(folder.with_name(f".{folder.name}.lock"))
        try:
            store = cls._find_or_claim(folder, manifest, sequences, claim, log)
            if store is not None:
                log(f"Reference {folder} ({len(store.rows)} sequences)")
                return store
            kept = {**manifest, "date": None if date is None else date.isoformat()}
            parts = Parts(parts_folder(folder), kept)
            store = cls.of(sequences, build_values(parts))
            on_main(store._publish, folder, kept, sequences, claim)
            on_main(parts.remove)
            return store
        finally:
            claim.release()

    @classmethod
    def _find_or_claim(
        cls,
        folder: Path,
        manifest: dict[str, Any],
        sequences: Sequence[TokenizedResponse],
        claim: Claim,
        log: Callable[[str], None],
    ) -> ReferenceStore | None:
        """The store, once nobody builds it; or None, when it is ours to build."""
        store = on_main(cls.load, folder, manifest, sequences)
        said = False
        while store is None:
            holder = on_main(claim.take)
            if holder is None:
                # another process may have built it until now
                return on_main(cls.load, folder, manifest, sequences)
            if not said:
                log(
                    f"Another process ({holder}) builds the reference store {folder}. Waiting for"
                    " it."
                )
                said = True
            time.sleep(PATIENCE)
        return store

    def _publish(
        self,
        folder: Path,
        manifest: dict[str, Any],
        sequences: Sequence[TokenizedResponse],
        claim: Claim,
    ) -> None:
        if claim.is_held:
            remove_incomplete(folder.parent, folder.name)
        # one that does not see the lock may have been faster
        if ReferenceStore.load(folder, manifest, sequences) is None:
            self.save(folder, manifest)

    def save(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Writes the store; an interruption leaves no store or a whole one. Raises UserError where
        it cannot be written."""
        with new_folder(folder) as temporary:
            _write_scores(temporary / "values.safetensors", self.scores)
            write_json(temporary / "manifest.json", manifest)

    @classmethod
    def load(
        cls, folder: Path, manifest: dict[str, Any], sequences: Sequence[TokenizedResponse]
    ) -> ReferenceStore | None:
        """The store at `folder`, or None where there is none.

        Raises:
            UserError: the store belongs to another model, attention, dtype, pooling or data; or it
                is damaged, or something else lies there.
        """
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        again = (
            f"Name another reference.store, or delete {folder}: the same command then builds it"
            " again."
        )
        if not (folder / "manifest.json").is_file():
            raise UserError(
                f"{folder} holds no whole reference store: there is no file manifest.json in it."
                f" {again}"
            )
        try:
            stored = read_object(folder / "manifest.json")
        except UserError as error:
            raise UserError(f"The reference store {folder} is damaged: {error}") from error
        if changes := _differing(stored, manifest):
            raise UserError(
                f"The reference store {folder} was built for something else"
                f" ({'; '.join(changes)}). Train into another output_dir, name another"
                f" reference.store, or delete {folder} and run `mpo precompute` with this"
                " configuration to build it again."
            )
        try:
            scores = _read_scores(folder / "values.safetensors", len(sequences))
        except _Damaged as problem:
            raise UserError(
                f"The reference store {folder} is damaged: {problem}. {again}"
            ) from problem
        return cls.of(sequences, scores)


def dominant_sequences(examples: Sequence[Example]) -> list[TokenizedResponse]:
    """The distinct dominant sequences of the examples, in order of appearance."""
    return list(dict.fromkeys(s for e in examples for s in e.dominant))


def identity(
    model: dict[str, Any], sequences: Sequence[TokenizedResponse], pool: Pool | None
) -> dict[str, Any]:
    """What the stored values depend on: `model_identity`, the sequences and the pooling; no pool
    where only log-probabilities are kept. A store is used only where all of it agrees."""
    return {"format": FORMAT, **model, "pool": pool, "sequences": digest(sequences)}


def model_identity(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes it this model, wherever it lies: the contents of its files, and how they are read.

    Raises:
        UserError: a file cannot be read.
    """
    return {
        **_files_of(model),
        "chat_template": _sha256(str(tokenizer.chat_template)),
        "vocabulary": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()), allow_nan=False)),
        "attention": model.attention,
        "dtype": model.dtype,
        "quantized": model.quantize,
    }


def _files_of(model: ModelConfig) -> dict[str, Any]:
    """Digests of a local model's weights and settings; a hub model is identified by its commit."""
    folder = Path(model.path)
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        return {"weights": _sha256_of(weights), "config": _sha256_of([folder / "config.json"])}
    config = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return {"weights": str(getattr(config, "_commit_hash", None))}


def _sha256_of(files: list[Path]) -> str:
    try:
        return sha256_of_files(files)
    except OSError as error:
        raise UserError(
            f"The model's files cannot be read: {error}. Restore the file, or its permissions."
        ) from error


def rows_digest(*groups: Sequence[Example]) -> str:
    """SHA-256 of what is trained on and what is measured: every example's language and token ids,
    in order, group by group."""
    places: dict[TokenizedResponse, int] = {}
    listed = [
        [[e.language, *(places.setdefault(s, len(places)) for s in e.sequences())] for e in group]
        for group in groups
    ]
    return _sha256(json.dumps([listed, digest(list(places))], allow_nan=False))


def digest(sequences: Sequence[TokenizedResponse]) -> str:
    """SHA-256 of token ids and response starts, in order."""
    return _sha256(
        json.dumps([[s.response_start, *s.input_ids] for s in sequences], allow_nan=False)
    )


def build(
    scorer: Scorer,
    sequences: Sequence[TokenizedResponse],
    examples: Sequence[Example],
    parts: Parts,
    advance: Callable[[int], None],
    *,
    pools: bool,
) -> SequenceScores:
    """Scores every sequence with the model as it is now, the ranks sharing the work; finished parts
    are not done again.

    Args:
        sequences: distinct ones, with prompts of the examples, which errors name.
        pools: keep the pooled hidden states too.
    Raises:
        UserError: the model gives numbers that are not finite, or a part cannot be written.
    """
    pieces = [sequences[first : first + PART] for first in range(0, len(sequences), PART)]
    done = on_main(parts.finished, [len(piece) for piece in pieces])
    scores = []
    for number, mine in enumerate(pieces):
        if number in done:
            part = done[number]
            advance(len(mine))
        else:
            part = scorer.scores(mine, advance, pools=pools)
            on_main(parts.keep, number, part)
        scores.append(part)
    whole = SequenceScores(
        torch.cat([part.mean_logp for part in scores]), torch.cat([part.pooled for part in scores])
    )
    if (bad := _not_finite(whole, sequences, examples)) is not None:
        on_main(parts.remove)
        raise UserError(bad)
    return whole


def _not_finite(
    scores: SequenceScores, sequences: Sequence[TokenizedResponse], examples: Sequence[Example]
) -> str | None:
    """What is wrong with the scores of these sequences, or None."""
    finite = scores.mean_logp.isfinite() & scores.pooled.isfinite().all(1)
    bad = [sequence for sequence, good in zip(sequences, finite.tolist(), strict=True) if not good]
    if not bad:
        return None
    prompts = {sequence.prompt for sequence in bad}
    first = next(e.source for e in examples if prompts & {s.prompt for s in e.sequences()})
    return (
        f"The model gives non-finite log-probabilities or hidden states for {len(bad)} sequence(s),"
        f" e.g. in {first}. Check the model's weights, or train with model.dtype=float32."
    )


class Parts:
    """Finished pieces of a store that is being built: `<folder>/{manifest.json, 00000.safetensors,
    ...}`. Used by rank 0 alone.

    Each piece names its store, so that one which could not be removed, or which another process
    wrote, is not taken for one of this store.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest
        self._store = _sha256(
            json.dumps({**manifest, "date": None}, sort_keys=True, allow_nan=False)
        )

    def finished(self, lengths: Sequence[int]) -> dict[int, SequenceScores]:
        """Pieces of an interrupted build of the same store, of so many sequences each; those of
        another and damaged ones are removed."""
        if not self._are_of_this_store():
            self.remove()
            write_json(self._folder / "manifest.json", self._manifest)
        remove_incomplete(self._folder)
        done = {}
        for number, length in enumerate(lengths):
            try:
                done[number] = _read_scores(self._place_of(number), length, self._store)
            except _Damaged:
                continue  # computed again
        return done

    def _are_of_this_store(self) -> bool:
        try:
            kept = read_json(self._folder / "manifest.json")
        except UserError:
            return False
        return isinstance(kept, dict) and not _differing(kept, self._manifest)

    def keep(self, number: int, scores: SequenceScores) -> None:
        """Writes one piece, whole or not at all."""
        place = self._place_of(number)
        temporary = unfinished(place)
        with writing(place):
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_scores(temporary, scores, self._store)
            os.replace(temporary, place)

    def remove(self) -> None:
        """Removes everything."""
        remove(self._folder)

    def _place_of(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"


class Reference(Protocol):
    """Where the reference's values come from."""

    def look_up(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """Values that hold these sequences. It may run the model, which under ZeRO-3 is a
        collective: every rank looks up as often as the others."""

    def mean_logps(self, sequences: Sequence[TokenizedResponse]) -> torch.Tensor:
        """(S,) float32 log-probability per token of these sequences, the same ones on every rank,
        which share the work."""


@dataclass(frozen=True)
class StoredReference:
    """The reference whose values were computed before training. A look-up waits for no rank."""

    store: ReferenceStore

    def look_up(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """The whole store."""
        return self.store

    def mean_logps(self, sequences: Sequence[TokenizedResponse]) -> torch.Tensor:
        """From the store."""
        return self.store.scores.mean_logp[[self.store.rows[sequence] for sequence in sequences]]


@dataclass(frozen=True)
class LiveReference:
    """The reference of a model with adapters: the same model with them off, computed where it is
    needed and never stored."""

    scorer: Scorer

    def look_up(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """The values of these sequences: one forward pass on every rank, each on its own, where a
        rank without any runs on the filler."""
        distinct = list(dict.fromkeys(sequences)) or [FILLER]
        engine = self.scorer.engine
        was_training = engine.training
        engine.eval()
        with torch.no_grad(), lora.adapters_off(self.scorer.model):
            scores = engine(batch=self.scorer.pack(distinct))
        engine.train(was_training)
        return ReferenceStore.of(
            distinct, SequenceScores(scores.mean_logp.float().cpu(), scores.pooled.float().cpu())
        )

    def mean_logps(self, sequences: Sequence[TokenizedResponse]) -> torch.Tensor:
        """In batches of the scorer's."""
        with lora.adapters_off(self.scorer.model):
            return self.scorer.scores(sequences, pools=False).mean_logp


def _differing(stored: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """What of a manifest is not as it is stored. The date is none of it: where a template prints
    it, the sequences tell."""
    keys = [key for key in manifest if key != "date" and stored.get(key) != manifest[key]]
    return [f"{key}: {stored.get(key)} stored, {manifest[key]} now" for key in keys]


class _Damaged(Exception):
    """A file of values that is not what was written."""


def _write_scores(path: Path, scores: SequenceScores, store: str = "") -> None:
    save_file(
        {"mean_logp": scores.mean_logp.contiguous(), "pooled": scores.pooled.contiguous()},
        path,
        metadata={"store": store},
    )


def _read_scores(path: Path, length: int, store: str | None = None) -> SequenceScores:
    """The scores of so many sequences, of that store. Raises _Damaged where the file does not hold
    them."""
    try:
        with safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}
            of = (file.metadata() or {}).get("store")
    except (OSError, SafetensorError, ValueError) as error:
        raise _Damaged(f"{path.name} cannot be read ({error})") from error
    if store is not None and of != store:
        raise _Damaged(f"{path.name} is of another store")
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if (
        set(shapes) != {"mean_logp", "pooled"}
        or shapes["mean_logp"] != (length,)
        or shapes["pooled"][:-1] != (length,)
    ):
        raise _Damaged(
            f"{path.name} does not hold the values of {length} sequences (it has {shapes})"
        )
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise _Damaged(f"{path.name} holds numbers that are not finite")
    return SequenceScores(values["mean_logp"], values["pooled"])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
