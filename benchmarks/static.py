"""What can be known without a GPU: `python -m benchmarks.static [--quick]`.

Bytes per logit from Triton's interpreter, FLOPs and peak allocations of the linear loss, and for
each GPU what the compiler makes of every kernel of this package and of its peers: registers,
spills, access width, instructions per logit, occupancy. No time is measured; the times that
`benchmarks.model` predicts are printed last, labelled MODEL.

Peers are compiled as their own launch code specialises them, and read by the same report. One that
is missing, that changed or that does not compile is shown as absent with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

# triton's default until 3.10; it decides about instruction counts
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks import bars, model
from benchmarks.instruments import moved_bytes, peer_bytes
from benchmarks.instruments.machine_code import TARGETS
from benchmarks.instruments.machine_code import Report as CodeReport
from benchmarks.instruments.peers import PEERS, Peer
from benchmarks.instruments.variants import Variant, facts, variants
from benchmarks.options import Out, Quick, Threads, set_up
from benchmarks.output import OURS, Machine

Vocabulary = Literal["aligned", "odd"]
VOCABULARIES: dict[Vocabulary, int] = {"aligned": 128256, "odd": 50257}
"""Triton specialises on nothing but whether 16 divides the vocabulary."""
DOES = {
    "stats": (
        "one read: log-probability, peak and sum; in all blocks of a row but the label's and an"
        " incomplete last one, which are masked"
    ),
    "stats with moments": "the same read: entropy, arg-max, sum of squares and mean besides",
    "grad": "one read, one write: gradient for any upstream gradient",
}
"""What one launch of our kernels does, by their entry in TILES."""
CANDIDATES = {
    "mpo_kernels": ("mpo_kernels", ("stats plain", "grad plain")),
    "mpo_kernels with entropy": ("mpo_kernels", ("stats token outputs plain", "grad plain")),
    **{
        name: (name, None)
        for name in (
            "Liger cross-entropy",
            "Liger GRPO",
            "TRL selective log-softmax",
            "TRL chunked log-probs",
        )
    },
}
"""Kernels that make log-probabilities and their gradient together, by library and name; None: all
of the peer's."""
COLORS = (OURS, "#7fb2d9", "#c8553d", "#e0a458", "#588157", "#a3b18a")


Access = Literal["read", "write", "read and write"]


class Body(BaseModel):
    """A trip through an innermost loop over logits, or a kernel without such a loop."""

    access: Access
    instructions_per_element: float
    main_path_per_element: float
    """Without the branches for ignored rows and for the block with the label, which a loop's count
    has outside of it."""


def _access_of(loaded: int, stored: int) -> Access:
    if loaded and stored:
        return "read and write"
    return "read" if loaded else "write"


class Code(BaseModel):
    """One kernel compiled for one GPU.

    The first five are those of tests/kernels/compiled/*.json.
    """

    registers: int
    spilled: int
    widest_bits: int
    instructions_per_element: float | None
    """Of the body with the least work per logit that reads; None where the kernel does not read
    logits."""
    programs_per_multiprocessor: int
    num_warps: int
    spilled_bytes: int
    """Per thread, with its stack."""
    logit_bits: int
    """Of one access."""
    occupancy: float
    bodies: list[Body]

    @classmethod
    def of(cls, made: CodeReport, has_logits: bool = True) -> Code:
        """From the report on a kernel; `has_logits` false leaves out what is counted per logit."""
        bodies = [
            Body(
                access=_access_of(body.bytes_loaded, body.bytes_stored),
                instructions_per_element=body.instructions_per_element,
                main_path_per_element=body.main_path_per_element,
            )
            for body in made.bodies
        ]
        return cls(
            **{**facts(made), **({} if has_logits else {"instructions_per_element": None})},  # type: ignore[arg-type]
            num_warps=made.num_warps,
            spilled_bytes=made.local_bytes,
            logit_bits=made.main_width,
            occupancy=made.occupancy,
            bodies=bodies if has_logits else [],
        )

    def per_logit(self, access: Literal["read", "read and write"]) -> float | None:
        """Instructions on the main path of the body with the least work of this kind; None without
        one."""
        return min(
            (body.main_path_per_element for body in self.bodies if body.access == access),
            default=None,
        )


class Row(BaseModel):
    """One kernel for one GPU and vocabulary."""

    library: str
    kernel: str
    vocabulary: Vocabulary
    target: str
    does: str = ""
    block: int | None = None
    """Columns at a time, where it steps over columns."""
    code: Code | None = None
    reason: str = ""
    """Why there is no code."""


class Counted(BaseModel):
    """A bar of `benchmarks.bars`."""

    what: str
    promised: str
    measured: str
    holds: bool | None


class StaticResult(BaseModel):
    """What the command found."""

    benchmark: Literal["static"] = "static"
    machine: Machine
    seed: int = 0
    """Of the logits and labels whose bytes are counted."""
    quick: bool
    bytes: dict[str, dict[str, float]]
    bytes_beside_peers: peer_bytes.Moved
    counted: list[Counted]
    kernels: list[Row]


def main(quick: Quick = False, threads: Threads = 2, out: Out = None) -> None:
    """Bytes, FLOPs, memory and compiled code of this package's kernels and of their peers."""
    _, machine, folder, console = set_up(threads, out, on_cpu=True)
    targets = ("sm_90",) if quick else TARGETS
    with console.status("bytes, in the interpreter"):
        moved = moved_bytes.in_interpreter([8192] if quick else [8192, 20011, 49152])
        beside = peer_bytes.in_interpreter([8192] if quick else [8192, 20011])
    with console.status("FLOPs and memory"):
        counted = [Counted(**bar._asdict()) for bar in (*bars.work(quick), *bars.memory(quick))]
    with console.status("compiling"):
        kernels = [*own_rows(variants(), targets), *peer_rows(PEERS, targets)]
    result = StaticResult(
        machine=machine,
        quick=quick,
        bytes=moved,
        bytes_beside_peers=beside,
        counted=counted,
        kernels=kernels,
    )
    show(result, console)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "static.json"
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    picture(result, path.with_suffix(".png"))
    console.print(f"{path} and static.png")
    model.main(quick, threads, out)


def own_rows(chosen: Iterable[Variant], targets: Sequence[str]) -> Iterator[Row]:
    """Our kernels."""
    for variant in chosen:
        vocabulary: Vocabulary = "aligned" if variant.aligned else "odd"
        for target in targets:
            yield Row(
                library="mpo_kernels",
                kernel=variant.name.removesuffix(f" {vocabulary}"),
                vocabulary=vocabulary,
                target=target,
                does=DOES.get((variant.tiled_as or "").removeprefix("wide "), ""),
                block=variant.tile(target).block if variant.tiled_as else None,
                code=Code.of(variant.compiled(target)),
            )


def peer_rows(peers: Iterable[Peer], targets: Sequence[str]) -> Iterator[Row]:
    """Kernels of peers; one row without code for a peer that is absent on a target."""
    for peer in peers:
        for vocabulary, vocab in VOCABULARIES.items():
            for target in targets:
                row = Row(library=peer.name, kernel="", vocabulary=vocabulary, target=target)
                try:
                    found = list(peer.kernels(vocab, target))
                except Exception as reason:  # a peer may fail in any way; its row says how
                    line = f"{type(reason).__name__}: {reason}".splitlines()[0]
                    yield row.model_copy(update={"reason": f"{peer.package}: {line}"})
                    continue
                for kernel in found:
                    code = Code.of(kernel.report, peer.has_logits)
                    yield row.model_copy(
                        update={
                            "kernel": kernel.name,
                            "does": kernel.does,
                            "block": kernel.block,
                            "code": code,
                        }
                    )


def show(result: StaticResult, console: Console) -> None:
    """Tables of everything."""
    console.print(_counted_bytes(result))
    console.print(_beside_peers(result))
    for bar in result.counted:
        console.print(f"{bar.what}: {bar.measured} (bar {bar.promised})", markup=False)
    for target in _targets(result):
        console.print(_compiled(result, target))
    console.print(
        "instr.: instructions per logit, of the body with the least work per logit;"
        " forward+gradient where one kernel does both. A kernel\nwithout a loop: of the path that"
        " most programs take, and in brackets of all code. regs, spill: registers and spilled bytes"
        " of a\nthread. bits: of one access to logits. occ.: warps that a multiprocessor holds, of"
        " those it could. What one launch does:"
    )
    for (library, does), names in _grouped(
        (row.library, row.does, row.kernel) for row in result.kernels if row.does
    ).items():
        console.print(f"  {library}, {', '.join(names)}: {does}", markup=False)


def _counted_bytes(result: StaticResult) -> Table:
    table = Table(title="bf16 logits, bytes counted in the interpreter", title_justify="left")
    for column in (
        "vocabulary",
        "per logit, forward and backward",
        "ignored rows, forward",
        "new memory in place",
    ):
        table.add_column(column, justify="right")
    for vocab, values in result.bytes.items():
        table.add_row(
            vocab,
            f"{values['bytes_per_element']:.3f}",
            f"{values['bytes_of_ignored_rows']:.0f}",
            f"{values['in_place_share']:.2%}",
        )
    return table


def _beside_peers(result: StaticResult) -> Table:
    table = Table(
        title="beside peers, bytes per bf16 logit, forward and backward", title_justify="left"
    )
    for column in (
        "",
        "vocabulary",
        "its kernels",
        "torch's operations",
        "together",
        "of an ignored row",
    ):
        table.add_column(column, justify="right" if column else "left")
    for vocab, by_candidate in result.bytes_beside_peers.items():
        for name, found in by_candidate.items():
            if found.kernels is None or found.torch is None or found.ignored is None:
                table.add_row(name, vocab, f"absent: {found.reason}", style="dim")
                continue
            numbers = (found.kernels, found.torch, found.kernels + found.torch, found.ignored)
            table.add_row(
                name,
                vocab,
                *(f"{number:.2f}" for number in numbers),
                style="bold" if name.startswith("mpo_kernels") else None,
            )
    return table


def _targets(result: StaticResult) -> list[str]:
    return list(dict.fromkeys(row.target for row in result.kernels))


def _grouped(triples: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], list[str]]:
    """The third of each, once, by the first two."""
    groups: dict[tuple[str, str], list[str]] = {}
    for first, second, third in triples:
        group = groups.setdefault((first, second), [])
        if third not in group:
            group.append(third)
    return groups


def _compiled(result: StaticResult, target: str) -> Table:
    """One line per kernel: what both vocabularies share, then five facts of each."""
    table = Table(
        title=f"{target}, vocabularies {' and '.join(map(str, VOCABULARIES.values()))}",
        title_justify="left",
    )
    table.add_column("")
    for column in (
        "columns",
        "warps",
        *("instr.", "regs", "spill", "bits", "occ.") * len(VOCABULARIES),
    ):
        table.add_column(column, justify="right")
    rows = [row for row in result.kernels if row.target == target]
    for library, kernel in dict.fromkeys((row.library, row.kernel) for row in rows):
        found = {
            row.vocabulary: row for row in rows if (row.library, row.kernel) == (library, kernel)
        }
        one = next(iter(found.values()))
        if one.code is None:
            table.add_row(f"{library}: absent, {one.reason}", style="dim")
            continue
        cells = [
            cell
            for vocabulary in VOCABULARIES
            for cell in (_cells(found[vocabulary].code) if vocabulary in found else [""] * 5)
        ]
        name = f"{library}: {kernel.strip('_').removesuffix('_kernel')}"
        style = "bold" if library == "mpo_kernels" else None
        table.add_row(name, str(one.block or ""), str(one.code.num_warps), *cells, style=style)
    return table


def _cells(code: Code | None) -> list[str]:
    if code is None:
        return ["absent"] + [""] * 4
    passes = [
        per for per in (code.per_logit("read"), code.per_logit("read and write")) if per is not None
    ]
    text = "+".join(f"{per:.1f}" for per in passes) or "-"
    whole = code.instructions_per_element
    if len(passes) == 1 and whole is not None and whole > round(passes[0], 1):
        text += f" ({whole:.1f})"
    return [
        text,
        str(code.registers),
        str(code.spilled_bytes),
        str(code.logit_bits),
        f"{code.occupancy:.0%}",
    ]


def candidate_rows(
    result: StaticResult, candidate: str, vocabulary: str, target: str
) -> list[Code]:
    """The compiled kernels that together make log-probabilities and their gradient; empty where the
    peer is absent."""
    library, names = CANDIDATES[candidate]
    return [
        row.code
        for row in result.kernels
        if row.code
        and (row.library, row.vocabulary, row.target) == (library, vocabulary, target)
        and (names is None or row.kernel in names)
    ]


def picture(result: StaticResult, path: Path) -> None:
    """Instructions per logit, registers and occupancy of every candidate and GPU, for an aligned
    and an odd vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(14, 10), sharey="row", layout="constrained")
    labels = (
        "instructions per logit:\nforward (solid) and gradient (pale)",
        "registers per thread,\nthe greater of its kernels",
        "occupancy, %,\nthe lesser of its kernels",
    )
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=9)
    named: set[str] = set()
    for column, vocabulary in enumerate(VOCABULARIES):
        _draw_vocabulary(result, vocabulary, axes[:, column], named)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(CANDIDATES),
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(
        f"Compiled code, triton {result.machine.versions['triton']}, nothing run. "
        "Lower is better, except for occupancy. "
        "Not in Liger cross-entropy: torch's multiplication by the upstream gradient.",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_vocabulary(
    result: StaticResult, vocabulary: Vocabulary, axes: Any, named: set[str]
) -> None:
    """One column of the picture; candidates that are not yet `named` get an entry in the legend."""
    targets = _targets(result)
    width = 0.86 / len(CANDIDATES)
    for number, (candidate, color) in enumerate(zip(CANDIDATES, COLORS, strict=True)):
        for group, target in enumerate(targets):
            codes = candidate_rows(result, candidate, vocabulary, target)
            if not codes:
                continue
            x = group + (number - (len(CANDIDATES) - 1) / 2) * width
            label = None if candidate in named else candidate
            named.add(candidate)
            _draw_codes(codes, axes, x, {"width": width * 0.92, "color": color}, label)
    axes[0].set_title(f"vocabulary {VOCABULARIES[vocabulary]}", fontsize=11, loc="left")
    for axis in axes:
        axis.set_xticks(range(len(targets)), targets)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)


def _draw_codes(
    codes: Sequence[Code], axes: Any, x: float, look: dict[str, Any], label: str | None
) -> None:
    """A candidate's kernels for one GPU: a rectangle on each axis, at `x`."""
    instructions, registers, occupancy = axes
    text = {"ha": "center", "va": "bottom", "fontsize": 7}
    read = sum(code.per_logit("read") or 0.0 for code in codes)
    gradient = sum(code.per_logit("read and write") or 0.0 for code in codes)
    instructions.bar(x, read, **look, label=label)
    instructions.bar(x, gradient, bottom=read, **look, alpha=0.55)
    instructions.text(x, read + gradient, f"{read + gradient:.0f}", **text)
    most = max(code.registers for code in codes)
    registers.bar(x, most, **look)
    if spilled := max(code.spilled_bytes for code in codes):
        registers.text(x, most, f"spills\n{spilled} B", **text, color="#b00020")
    occupancy.bar(x, 100 * min(code.occupancy for code in codes), **look)


if __name__ == "__main__":
    typer.run(main)
