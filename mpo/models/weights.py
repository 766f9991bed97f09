"""A model folder's files, compared with the model by name and shape: what does not fit would
otherwise be left at random numbers.

The loader itself is asked, with the model on the meta device: it reads the files' headers, renames
and ties as it always does, and moves no data. That takes less than a second, so that every command
does it first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from mpo.runtime.errors import UserError

LISTED = 5
"""Names of one kind that an error lists."""
_LFS_POINTER = b"version https://git-lfs"


def check_weights(
    path: str, *, kind: Any = AutoModelForCausalLM, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a local folder on the meta device, if the folder's files hold exactly its
    tensors.

    Raises:
        UserError: files are absent or cannot be read; or tensors are missing, unknown, or of
            another shape: with their names.
    """
    with _quietly():
        try:
            model, found = kind.from_pretrained(
                path,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
            head_differs = model.config.tie_word_embeddings and _head_is_another(Path(path))
        # a damaged file makes the libraries raise whatever they happen to trip over
        except Exception as error:
            raise UserError(
                f"The model at {path} cannot be read: {first_line(error)}.{damaged(Path(path))}"
            ) from error
    refuse_partial(path, found)
    if head_differs:
        raise UserError(
            f"{path} says tie_word_embeddings=true, but holds an lm_head.weight that differs from"
            " its embeddings. Set tie_word_embeddings to false in its config.json if the head was"
            " trained apart, else remove that tensor."
        )
    return model


def refuse_partial(path: str, found: Mapping[str, Any]) -> None:
    """Raises UserError with the names if the `loading_info` of from_pretrained tells of tensors
    that did not come from the files."""
    shapes = {
        name: f"{list(there)} there, {list(here)} in the model"
        for name, there, here in found["mismatched_keys"]
    }
    refuse_differences(
        f"The weights at {path}", found["missing_keys"], found["unexpected_keys"], shapes
    )


def refuse_differences(
    what: str, missing: Collection[str], unknown: Collection[str], shapes: Mapping[str, str]
) -> None:
    """Raises UserError if names are missing from `what`, unknown to its model, or of another shape
    ({name: in words})."""
    kinds = (
        ("missing from its files", sorted(missing)),
        ("in its files, but not in the model", sorted(unknown)),
        ("of another shape", [f"{name} ({words})" for name, words in sorted(shapes.items())]),
    )
    found = [f"{len(names)} tensor(s) {kind}: {_listed(names)}" for kind, names in kinds if names]
    if found:
        raise UserError(
            f"{what} do not fit the model that its configuration describes. {'; '.join(found)}."
            " Copy or download the folder again, or name the model that the weights belong to."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's words, or its kind where it has none, without a full stop."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (words or type(error).__name__).rstrip(".")


def damaged(folder: Path) -> str:
    """` FILE is ...` for the first file of the folder that is none at all: the usual reason why a
    library cannot read it."""
    for file in sorted(folder.glob("*")):
        if file.is_symlink() and not file.exists():
            return f" {file} is a link to nothing."
        if not file.is_file() or file.suffix not in (".safetensors", ".bin", ".json", ".model"):
            continue
        with open(file, "rb") as opened:
            start = opened.read(len(_LFS_POINTER))
        if not start:
            return f" {file} is empty."
        if start == _LFS_POINTER:
            return (
                f" {file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in"
                f" {folder}."
            )
    return " Copy or download the folder again."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (
        f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    )


def _head_is_another(folder: Path) -> bool:
    """Whether the files hold a head beside the embeddings, with other numbers."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = {
                name
                for name in file.keys()
                if name.endswith(("lm_head.weight", "embed_tokens.weight"))
            }
            found |= {name.rsplit(".", 2)[-2]: file.get_tensor(name) for name in names}
    return len(found) == 2 and not torch.equal(found["lm_head"], found["embed_tokens"])


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own report, whose place the error takes."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
