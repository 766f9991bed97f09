"""The reference store: what the model said of the dominant pairs before training.

The reference model is the policy before the first step, so its reward gaps and pooled hidden states on the dominant pairs are constants of
the data. They are computed once, kept as `<output_dir>/reference/{manifest.json, values.safetensors}`, and no reference model is resident
while training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo.batching import Pool
from mpo.errors import UserError
from mpo.files import new_folder, read_json, sha256_of_files, write_json
from mpo.scoring import Scores, score_sequences
from mpo.tokenizing import Example, TokenizedResponse

FORMAT = 1


@dataclass(frozen=True)
class ReferenceStore:
    """Mean log-probability and pooled hidden state of K distinct dominant (prompt, response) sequences."""

    rows: dict[TokenizedResponse, int]
    scores: Scores  # mean_logp (K,), pooled (K, D)

    def gap(self, example: Example) -> float:
        """RG of the example's dominant pair under the reference: the constant of L1."""
        chosen, rejected = self.rows[example.dominant_chosen], self.rows[example.dominant_rejected]
        return float(self.scores.mean_logp[chosen] - self.scores.mean_logp[rejected])

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
        "vocabulary": _sha256(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "pool": pool,
        "sequences": digest(dominant_sequences(examples)),
    }


def digest(sequences: Sequence[TokenizedResponse]) -> str:
    """SHA-256 of token ids and response starts, in order."""
    return _sha256(json.dumps([[s.response_start, *s.input_ids] for s in sequences]))


def build(
    engine: torch.nn.Module,
    examples: Sequence[Example],
    *,
    pool: Pool,
    device: torch.device,
    advance: Callable[[int], None],
) -> ReferenceStore:
    """Scores every distinct dominant sequence with the model as it is now, the ranks sharing the work."""
    sequences = dominant_sequences(examples)
    scores = score_sequences(engine, sequences, pool=pool, device=device, advance=advance)
    bad = torch.nonzero(~(scores.mean_logp.isfinite() & scores.pooled.isfinite().all(1)))[:, 0].tolist()
    if bad:
        names = [e.source for e in examples if {e.dominant_chosen, e.dominant_rejected} & {sequences[i] for i in bad}]
        raise UserError(
            f"The model gives non-finite log-probabilities or hidden states for {len(bad)} dominant sequence(s), e.g. in {names[0]}. "
            "Check the model's weights, or train with model.dtype=float32."
        )
    return ReferenceStore({sequence: i for i, sequence in enumerate(sequences)}, scores)


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
            f"The reference store {folder} was built for something else ({changes}). Train into another output_dir, or delete "
            f"{folder} to build it again."
        )
    values = load_file(folder / "values.safetensors")
    sequences = dominant_sequences(examples)
    return ReferenceStore({sequence: i for i, sequence in enumerate(sequences)}, Scores(values["mean_logp"], values["pooled"]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
