"""The section `loss` of a run. Its class follows from the name of the loss: that of mpo is here,
those of the others are made by `mpo.losses`, which brings torch and is imported where one is named.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)

from mpo.runtime.errors import UserError
from mpo.runtime.settings import Section


class LossConfig(Section):
    """What a run makes small. Beside these fields a section has those of its loss."""

    name: str = Field(default="mpo", min_length=1)
    """mpo, or one of the others: sft, dpo, ipo, robust_dpo, cpo, kto, orpo, length_dpo, simpo,
    every other loss of docs/losses.md in small letters, or `package.module:function` for your own.
    `mpo fields loss=dpo` shows the fields of one."""
    retention_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight lambda of L2, which keeps the dominant representation where the reference has it. 1
    for mpo, 0 for the others, whose dominant pairs then take no work."""
    pairs: Literal["target", "both"] = "target"
    """Which pairs of a row a loss other than mpo sees: the target one, or the dominant one too,
    each with half the weight."""
    pool: Literal["response", "all"] = "response"
    """Positions averaged for L2: those of the response, or every position of the sequence (as
    published)."""
    head: Literal["linear", "logits"] = "linear"
    """`linear`: loss from hidden states, the logits never exist as a whole. `logits`: the head
    makes all scored rows' logits first."""
    chunk_bytes: int | None = Field(default=None, ge=1, lt=2**63)
    """Byte budget of one chunk of logits under `linear`. null: the kernel's default."""

    template: ClassVar[Any] = None
    """The loss with its defaults, in the section of every loss but mpo."""

    def own(self) -> dict[str, Any]:
        """The loss's own hyper-parameters."""
        common = {*LossConfig.model_fields, "code_sha256"}
        return {name: getattr(self, name) for name in type(self).model_fields.keys() - common}

    def build(self) -> Any:
        """The loss itself, a `mpo_kernels.losses.SequenceLoss`, with these hyper-parameters."""
        own = self.own()
        return dataclasses.replace(self.template, **own) if own else self.template

    def __reduce__(self) -> Any:
        """A section that was made for a loss has a class that no name leads to."""
        made = self.template is not None
        return (_unpickled, (self.model_dump(),)) if made else super().__reduce__()

    @property
    def pools_dominant(self) -> bool:
        """Whether dominant pairs go through the model for L2."""
        return self.retention_weight > 0

    @property
    def gap_scale(self) -> float:
        """What the target gap is multiplied with where its distance from the dominant one is
        told."""
        return 1.0

    @property
    def label(self) -> str:
        """What curves and logs call the loss's own value, which L2 is added to."""
        return self.name

    def total(self, value: Any, l2: Any) -> Any:
        """L of the loss's own value and L2, numbers or tensors."""
        return value + self.retention_weight * l2

    def in_words(self) -> str:
        """The loss, its hyper-parameters, and what goes through the model for it."""
        own = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in sorted(self.own().items())
        )
        sides = "target and dominant" if self.pairs == "both" else "target"
        loss, what = self.build(), f"{sides} pairs"
        if loss.sequences == 1:
            which = "chosen and rejected" if "is_desirable" in loss.constants else "chosen"
            what = f"{which} {sides} answers"
        l2 = f", dominant pairs for L2 (weight {self.retention_weight:g})"
        return (
            f"{self.name}{f' ({own})' if own else ''}, trains on {what}"
            f"{l2 if self.pools_dominant else ''}"
        )


class MPOLoss(LossConfig):
    """L = mean((beta * RG_target - RG_dominant_reference)^2) + retention_weight * L2,
    arXiv 2505.16869. Another `name` has other fields: `mpo fields loss=dpo` shows those of dpo."""

    beta: float = Field(default=1.0, gt=0, le=1e6)
    """Scale of the target language's reward gap. Published: 1.0 for Llama-3.1, 1.5 for Gemma-2 and
    Qwen2.5."""
    retention_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight lambda of L2, which keeps the dominant representation where the reference has it. 1
    for mpo, 0 for the others, whose dominant pairs then take no work."""

    def build(self) -> Any:
        from mpo_kernels.losses import MPO

        return MPO(beta=self.beta)

    @property
    def pools_dominant(self) -> bool:
        return True  # L2 is told whatever its weight

    @property
    def gap_scale(self) -> float:
        return self.beta

    @property
    def label(self) -> str:
        return "L1"

    @model_validator(mode="after")
    def _compares_both_sides_anyway(self) -> MPOLoss:
        if self.pairs != "target":
            raise ValueError(
                f"pairs={self.pairs} is for the other losses: mpo pulls the target pair to the gap"
                " of the dominant one. Leave pairs out"
            )
        return self


class RecordedLoss(LossConfig):
    """Somebody's own loss as a run's config.json records it: imported when it is used, not when it
    is read."""

    model_config = ConfigDict(extra="allow")

    def own(self) -> dict[str, Any]:
        return {n: v for n, v in (self.model_extra or {}).items() if n != "code_sha256"}

    def build(self) -> Any:
        from mpo.losses import read_section

        try:
            return read_section(self.name, self.model_dump(), LossConfig, None).build()
        except ValidationError as error:
            (problem,) = error.errors()
            raise UserError(f"loss.name {self.name}: {problem['msg']}.") from error


def _unpickled(values: dict[str, Any]) -> LossConfig:
    """The section again of which these are the values."""
    from mpo.losses import read_section

    return read_section(values["name"], values, LossConfig, None)


def _loss_section(value: Any, _: Any, info: ValidationInfo) -> LossConfig:
    """The section of the loss that `name` says."""
    if isinstance(value, LossConfig):
        return value
    name = value.get("name", "mpo") if isinstance(value, dict) else "mpo"
    if not isinstance(name, str) or name in ("mpo", ""):
        return MPOLoss.model_validate(value, context=info.context)
    if ":" in name and not isinstance(info.context, Path):
        return RecordedLoss.model_validate(value)
    # it brings torch, which a configuration of mpo is read without
    from mpo.losses import read_section

    return read_section(name, value, LossConfig, info.context)


LossSection = SerializeAsAny[Annotated[MPOLoss | LossConfig, WrapValidator(_loss_section)]]
"""The field `loss` of a run."""


def of_the_same_loss(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What of a file stands beside overrides: where they name another loss, none of the numbers
    that the file has for its own."""
    mine, theirs = (
        part["loss"] if isinstance(part.get("loss"), dict) else {} for part in (file, given)
    )
    if theirs.get("name") in (None, mine.get("name", "mpo")):
        return file
    kept = {name: value for name, value in mine.items() if name in ("pool", "head", "chunk_bytes")}
    return {**file, "loss": kept}
