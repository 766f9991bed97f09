"""What can be known without a GPU: `python -m benchmarks.static [--quick]`.

Bytes per logit from Triton's interpreter, FLOPs and peak allocations of the linear loss, and for each GPU what the compiler makes of every
kernel: registers, spills, access width, instructions per element, programs per multiprocessor. No times: none is modelled.
"""

from __future__ import annotations

import json
import os

import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton's default until 3.10; it decides about instruction counts

from benchmarks import bars
from benchmarks.instruments import moved_bytes
from benchmarks.instruments.machine_code import TARGETS
from benchmarks.instruments.variants import facts, variants
from benchmarks.options import Out, Quick, Threads, set_up


def main(quick: Quick = False, threads: Threads = 2, out: Out = None) -> None:
    """Bytes, FLOPs, memory and compiled code of this package's kernels."""
    _, machine, folder, console = set_up(threads, out)
    vocabularies = [8192] if quick else [8192, 20011, 49152]
    moved = moved_bytes.in_interpreter(vocabularies)
    counted = [*bars.work(quick), *bars.memory(quick)]
    compiled = {v.name: {target: facts(v.compiled(target)) for target in (("sm_90",) if quick else TARGETS)} for v in variants()}
    _show(moved, counted, compiled, console)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "static.json"
    report = {
        "benchmark": "static",
        "machine": machine.model_dump(),
        "bytes": moved,
        "counted": [bar._asdict() for bar in counted],
        "compiled": compiled,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(str(path))


def _show(moved: dict, counted: list[bars.Bar], compiled: dict, console: Console) -> None:
    table = Table(title="bf16 logits, counted in the interpreter", title_justify="left")
    for column in ("vocabulary", "bytes per element, forward and backward", "bytes of ignored rows", "new memory in place"):
        table.add_column(column, justify="right")
    for vocab, values in moved.items():
        table.add_row(
            vocab, f"{values['bytes_per_element']:.3f}", f"{values['bytes_of_ignored_rows']:.0f}", f"{values['in_place_share']:.2%}"
        )  # fmt: skip
    console.print(table)
    for bar in counted:
        console.print(f"{bar.what}: {bar.measured} (bar {bar.promised})", markup=False)
    table = Table(title="compiled (registers / spilled / widest bits / instructions per element / programs per multiprocessor)")
    targets = list(next(iter(compiled.values())))
    for column in ("kernel", *targets):
        table.add_column(column)
    for name, by_target in compiled.items():
        table.add_row(name, *(" / ".join(str(value) for value in by_target[target].values()) for target in targets))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
