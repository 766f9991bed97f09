"""What every picture of this package shares: names in letters that the machine has, legends, and a
file that is whole.

Names are shown as they are, whatever letters and signs they hold, and as far as the machine's fonts
have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.cells import cell_len, chop_cells

from mpo.runtime.errors import UserError
from mpo.runtime.files import new_file

FONT = "DejaVu Sans"
"""The font that comes with matplotlib."""
LINE, CODE = 140, 30
"""Columns of a line of a run's name, and of a language's."""
MARKERS = "os^DvPX*<>"


def check_target(path: Path) -> None:
    """Refuses a name that says no format, before anything is drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UserError(
            f"{path} names no format that can be drawn. Give the picture a name that ends with"
            " .png, .svg or .pdf."
        )


def write_picture(path: Path, names: Iterable[str], figure_of: Callable[[Letters], Any]) -> None:
    """Writes the figure that `figure_of` makes of the names' letters; its format is that of the
    path's ending. A user's own style changes nothing.

    Raises:
        UserError: the ending is no format, or the file cannot be written.
    """
    check_target(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    letters = Letters(names)
    with plt.style.context("default"), matplotlib.rc_context({"font.family": letters.fonts}):
        figure = figure_of(letters)
        try:
            with new_file(path) as file:
                figure.savefig(file.buffer, dpi=130, format=path.suffix.removeprefix(".").lower())
        finally:
            plt.close(figure)


class Letters:
    """Names as the machine's fonts can show them: letters that none has become a question mark, and
    names stay different."""

    def __init__(self, names: Iterable[str]) -> None:
        different = list(dict.fromkeys(names))
        self.fonts, missing = _fonts_with({character for name in different for character in name})
        shown = [
            "".join("?" if c in missing else c for c in " ".join(name.split()))
            for name in different
        ]
        numbered = [
            f"{text} [{place}]" if shown.count(text) > 1 else text
            for place, text in enumerate(shown, 1)
        ]
        self._shown = dict(zip(different, numbered, strict=True))
        self.note = (
            ""
            if not missing
            else "?: a letter that no font of this machine has; fonts such as Noto Sans have it"
        )

    def of(self, name: str, columns: int = LINE) -> str:
        """The name in lines of at most so many columns."""
        return "\n".join(chop_cells(self._shown[name], columns))

    def width(self, name: str) -> int:
        """Columns that the name takes in one line."""
        return cell_len(self._shown[name])


def _fonts_with(characters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Font families that together have the characters, matplotlib's own first, and the characters
    that none has."""
    from matplotlib import font_manager, ft2font

    families, missing = [FONT], {c for c in characters if not c.isspace()}
    for path, family in [
        (font_manager.findfont(FONT), FONT),
        *((f.fname, f.name) for f in font_manager.fontManager.ttflist),
    ]:
        if not missing:
            break
        # it has a box for each
        if "last resort" in family.lower() or "lastresort" in family.lower():
            continue
        try:
            font = ft2font.FT2Font(path)
            found = {c for c in missing if font.get_char_index(ord(c))} if font.scalable else set()
        except (OSError, RuntimeError):  # listed, but gone or of a kind that cannot be drawn
            continue
        if found:
            missing -= found
            families += [family] if family not in families else []
    return families, missing


def legend(where: Any, entries: dict[str, Any], **options: Any) -> None:
    """A legend whose texts are texts: no formula between two dollar signs, and none that is left
    out for beginning with an underscore."""
    legend = where.legend(
        list(entries.values()),
        [str(place) for place in range(len(entries))],
        fontsize=8,
        frameon=False,
        **options,
    )
    for text, name in zip(legend.get_texts(), entries, strict=True):
        text.set(text=name, parse_math=False)


def look_of(place: int, of: int) -> dict[str, Any]:
    """Colour and mark of the language at that place of so many: after ten of them colours come
    again, with other marks."""
    mark = MARKERS[place // 10 % len(MARKERS)] if of > 10 else None
    return {"color": f"C{place % 10}", "marker": mark}


def as_number(value: Any) -> float:
    """What is no number is not drawn: JSON has null for one that is not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
