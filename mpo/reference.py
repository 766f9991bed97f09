"""The reference store: what the model said of the dominant pairs before training.

The reference model is the policy before the first step, so its reward gaps and pooled hidden states on the dominant pairs are constants of
the data. They are computed once, kept as `<output_dir>/reference/{manifest.json, values.safetensors}`, and no reference model is resident
while training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo import quantized
from mpo.attention import shares_prompts_of
from mpo.batching import FILLER, Pool, pack_for_scoring
from mpo.distributed import on_main
from mpo.errors import UserError
from mpo.files import new_folder, read_json, sha256_of_files, write_json
from mpo.lora import adapters_off
from mpo.model import Scores
from mpo.scoring import score_sequences
from mpo.tokenizing import Example, TokenizedResponse

FORMAT = 1
PART = 256
"""Sequences of one piece of a store that is being built; what an interruption loses at most."""


@dataclass(frozen=True)
class ReferenceStore:
    """Mean log-probability and pooled hidden state of K distinct dominant (prompt, response) sequences."""

    rows: dict[TokenizedResponse, int]
    scores: Scores  # mean_logp (K,), pooled (K, D)

    def gap(self, example: Example) -> float:
        """RG of the example's dominant pair under the reference: the constant of L1."""
        chosen, rejected = self.rows[example.dominant_chosen], self.rows[example.dominant_rejected]
        return float(self.scores.mean_logp[chosen] - self.scores.mean_logp[rejected])

    def of(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """The store that holds these sequences: itself."""
        return self

    def pooled(self, sequence: TokenizedResponse) -> torch.Tensor:
        """(D,) fp32 pooled hidden state of one dominant sequence under the reference: the constant of L2."""
        return self.scores.pooled[self.rows[sequence]]


def dominant_sequences(examples: Sequence[Example]) -> list[TokenizedResponse]:
    """The distinct dominant sequences of the examples, in order of appearance."""
    return list(dict.fromkeys(s for e in examples for s in (e.dominant_chosen, e.dominant_rejected)))


def identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_path: str, examples: Sequence[Example], pool: Pool
) -> dict[str, Any]:
    """What the stored values depend on. A store is used only where all of it agrees."""
    folder = Path(model_path)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {
        "format": FORMAT,
        # A hub model is identified by its commit, a local one by the contents of its files.
        "weights": sha256_of_files(weights) if weights else str(getattr(model.config, "_commit_hash", None)),
        "chat_template": _sha256(str(tokenizer.chat_template)),
        "vocabulary": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()), allow_nan=False)),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantized": quantized.kind_of(model),
        "pool": pool,
        "sequences": digest(dominant_sequences(examples)),
    }


def digest(sequences: Sequence[TokenizedResponse]) -> str:
    """SHA-256 of token ids and response starts, in order."""
    return _sha256(json.dumps([[s.response_start, *s.input_ids] for s in sequences], allow_nan=False))


def build(
    engine: torch.nn.Module,
    examples: Sequence[Example],
    *,
    pool: Pool,
    device: torch.device,
    advance: Callable[[int], None],
    folder: Path,
    manifest: dict[str, Any],
) -> ReferenceStore:
    """Scores every distinct dominant sequence with the model as it is now, the ranks sharing the work, and writes the store to `folder`.

    Finished parts are kept beside it until then, so that an interrupted build goes on where it was.
    """
    sequences = dominant_sequences(examples)
    parts = _Parts(folder.with_name(f".{folder.name}.parts"), manifest)
    done = on_main(parts.finished)
    scores = []
    for number, first in enumerate(range(0, len(sequences), PART)):
        mine = sequences[first : first + PART]
        if number in done:
            part = done[number]
            advance(len(mine))
        else:
            part = score_sequences(engine, mine, pool=pool, device=device, advance=advance)
            on_main(functools.partial(parts.keep, number, part))
        scores.append(part)
    whole = Scores(torch.cat([part.mean_logp for part in scores]), torch.cat([part.pooled for part in scores]))
    bad = torch.nonzero(~(whole.mean_logp.isfinite() & whole.pooled.isfinite().all(1)))[:, 0].tolist()
    if bad:
        on_main(parts.remove)
        names = [e.source for e in examples if {e.dominant_chosen, e.dominant_rejected} & {sequences[i] for i in bad}]
        raise UserError(
            f"The model gives non-finite log-probabilities or hidden states for {len(bad)} dominant sequence(s), e.g. in {names[0]}. "
            "Check the model's weights, or train with model.dtype=float32."
        )
    store = ReferenceStore({sequence: i for i, sequence in enumerate(sequences)}, whole)

    def finish() -> None:
        save(store, folder, manifest)
        parts.remove()

    on_main(finish)
    return store


class _Parts:
    """Finished pieces of a store that is being built: `<folder>/{manifest.json, 00000.safetensors, ...}`. Used by rank 0 alone."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest

    def finished(self) -> dict[int, Scores]:
        """Pieces of an interrupted build of the same store; those of another are removed."""
        path = self._folder / "manifest.json"
        if not path.is_file() or read_json(path) != self._manifest:
            self.remove()
            write_json(path, self._manifest)
            return {}
        files = {int(file.stem): load_file(file) for file in self._folder.glob("*.safetensors") if file.stem.isdecimal()}
        return {number: Scores(values["mean_logp"], values["pooled"]) for number, values in files.items()}

    def keep(self, number: int, scores: Scores) -> None:
        """Writes one piece, whole or not at all."""
        temporary = self._folder / f".{number:05d}"
        save_file({"mean_logp": scores.mean_logp.contiguous(), "pooled": scores.pooled.contiguous()}, temporary)
        os.replace(temporary, self._folder / f"{number:05d}.safetensors")

    def remove(self) -> None:
        """Removes everything."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Reference(Protocol):
    """Where the reference's values come from."""

    def of(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """A store that holds these dominant sequences. On every rank as often as on the others: it may run the model."""


class LiveReference:
    """The reference of a model with adapters: the same model with them off, computed where it is needed and never stored."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pool: Pool, device: torch.device) -> None:
        self._engine, self._pool, self._device = engine, pool, device

    def of(self, sequences: Sequence[TokenizedResponse]) -> ReferenceStore:
        """The values of these sequences: one forward pass on every rank, each on its own, where a rank without any runs on the filler."""
        distinct = list(dict.fromkeys(sequences)) or [FILLER]
        was_training = self._engine.training
        self._engine.eval()
        with torch.no_grad(), adapters_off(self._engine.module):
            scores = self._engine(batch=pack_for_scoring(distinct, self._pool, shares_prompts_of(self._engine.module)).to(self._device))
        self._engine.train(was_training)
        return ReferenceStore({s: i for i, s in enumerate(distinct)}, Scores(scores.mean_logp.float().cpu(), scores.pooled.float().cpu()))


def save(store: ReferenceStore, folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the store; an interruption leaves no store or a whole one."""
    with new_folder(folder) as temporary:
        save_file(
            {"mean_logp": store.scores.mean_logp.contiguous(), "pooled": store.scores.pooled.contiguous()},
            temporary / "values.safetensors",
        )
        write_json(temporary / "manifest.json", manifest)


def load(folder: Path, manifest: dict[str, Any], examples: Sequence[Example]) -> ReferenceStore | None:
    """The store at `folder`, or None where there is none.

    Raises:
        UserError: the store belongs to other weights, another template, tokenizer, attention, dtype, pooling or data.
    """
    if not (folder / "manifest.json").is_file():
        return None
    stored = read_json(folder / "manifest.json")
    differing = [key for key in manifest if stored.get(key) != manifest[key]]
    if differing:
        changes = "; ".join(f"{key}: {stored.get(key)} stored, {manifest[key]} now" for key in differing)
        raise UserError(
            f"The reference store {folder} was built for something else ({changes}). Train into another output_dir, name another "
            f"reference.store, or delete {folder} and run `mpo precompute` with this configuration to build it again."
        )
    values = load_file(folder / "values.safetensors")
    sequences = dominant_sequences(examples)
    return ReferenceStore({sequence: i for i, sequence in enumerate(sequences)}, Scores(values["mean_logp"], values["pooled"]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
