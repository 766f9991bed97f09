"""What the emulator found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What was found, in words. See the package's docstring."""

    out_of_bounds: list[str] = field(default_factory=list)
    misaligned: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.out_of_bounds or self.misaligned or self.races or self.undefined)

    def add(self, kind: str, message: str) -> None:
        found = getattr(self, kind)
        if message not in found:
            found.append(message)
