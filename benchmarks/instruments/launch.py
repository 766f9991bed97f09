"""Runs a package's own launch code on CPU tensors as if a GPU were there.

    # with MPO_KERNELS_BACKEND=triton
    with gpu_on_cpu("sm_90") as launches:
        loss = mpo_kernels.mpo_loss(logits, labels, reference_gap).loss
    launches[0].kernel, launches[0].grid, launches[0].findings

    # nothing runs: tensors may be on the meta device
    with recorded("gfx942") as launches:
        loss = any_library(logits, labels)
    launches[0].report(elements_per_program=None)

Each launch is specialised as Triton's own launcher does it (arguments that 16 divides, integers
that are 1, None). `gpu_on_cpu` compiles it for that GPU and emulates the PTX on the tensors'
memory. Nothing here tells how fast it would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.instruments import machine_code
from benchmarks.instruments.emulator import Findings, emulate
from benchmarks.instruments.ptx import parse

TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Launch:
    """One launch that was emulated."""

    kernel: str
    grid: tuple[int, ...]
    num_warps: int
    ptx: str
    findings: Findings


@contextlib.contextmanager
def gpu_on_cpu(
    target: str, *, strict: bool = True, programs: Collection[int] | None = None
) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel is emulated for `target`, one of TARGETS; the list
    gets each as it ends.

    Args:
        strict: a launch with a finding raises at once.
        programs: of each launch only these programs run. None: all.

    Raises:
        ValueError: another target.
        RuntimeError: triton was imported under TRITON_INTERPRET=1.
        AssertionError: a finding, if strict.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}.")
    if knobs.runtime.interpret:
        raise RuntimeError(
            "Under TRITON_INTERPRET=1 nothing is compiled; start another process without it."
        )
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        special = _specialise(kernel, target, args, kwargs)
        compiled = special.compiled()
        bound, signature, num_warps = special.bound, special.signature, special.num_warps
        shape = tuple(grid(bound) if callable(grid) else grid)
        values = [
            float(value) if signature[name] == "fp32" else value
            for name, value in bound.items()
            if signature[name] != "constexpr"
        ]
        text = compiled.asm["ptx"]
        findings = emulate(
            parse(text), shape, values, num_warps, compiled.metadata.shared, programs
        )
        launches.append(Launch(kernel.__name__, shape, num_warps, text, findings))
        if strict and not findings.clean:
            raise AssertionError(f"{kernel.__name__} compiled for {target}: {findings}")
        return compiled

    with _launching_by(run):
        yield launches


@dataclass(frozen=True)
class Specialised:
    """One launch as Triton would compile it."""

    kernel: Any
    target: str
    bound: dict[str, Any]  # arguments by name
    signature: dict[str, str]  # their types
    constants: dict[tuple[int, ...], Any]  # by position
    attributes: dict[tuple[int, ...], list]
    options: Any  # of the compiler
    given: dict[str, Any]  # those options that the launch named

    @property
    def num_warps(self) -> int:
        return self.options.num_warps

    def compiled(self) -> Any:
        """What Triton's launcher would load."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=_gpu(self.target), options=self.options.__dict__)

    def report(self, elements_per_program: int | None) -> machine_code.Report:
        """`machine_code.report` of it. What AMD's launcher adds for tensors below 2 GiB is left
        out: the logits of a step are larger."""
        names = self.kernel.arg_names
        return machine_code.report(
            self.kernel,
            self.signature,
            {names[place[0]]: value for place, value in self.constants.items()},
            {
                names[place[0]]
                for place, marks in self.attributes.items()
                if ["tt.divisibility", 16] in marks
            },
            self.target,
            self.num_warps,
            elements_per_program=elements_per_program,
            options={name: value for name, value in self.given.items() if name != "num_warps"},
        )


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Specialised]]:
    """Inside, launches of Triton kernels are specialised for `target`, one of
    `machine_code.TARGETS`, and run nothing; the list gets each.

    Raises:
        ValueError: another target.
        RuntimeError: triton was imported under TRITON_INTERPRET=1.
    """
    from triton import knobs

    if target not in machine_code.TARGETS:
        raise ValueError(
            f"target is {target!r}; it must be one of {', '.join(machine_code.TARGETS)}."
        )
    if knobs.runtime.interpret:
        raise RuntimeError(
            "Under TRITON_INTERPRET=1 nothing is compiled; start another process without it."
        )
    launches: list[Specialised] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(_specialise(kernel, target, args, kwargs))

    with _launching_by(run):
        yield launches


@contextlib.contextmanager
def _launching_by(run: Callable) -> Iterator[None]:
    """Every launch of a Triton kernel goes to `run`."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return (
        GPUTarget("hip", target, 64)
        if target.startswith("gfx")
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )


def _specialise(
    kernel: Any, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Specialised:
    """What Triton's launcher would compile for these arguments."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_gpu(target))
    given = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    kwargs = {"debug": False, **kwargs}
    bound, specialised, _ = create_function_from_signature(
        kernel.signature, kernel.params, backend
    )(*args, **kwargs)
    # `specialised` holds (type, marks) of each argument. Triton's own packing of it has another
    # name in each version.
    kinds = [kind for kind, _ in specialised]
    return Specialised(
        kernel,
        target,
        bound,
        signature=dict(zip(kernel.arg_names, kinds, strict=True)),
        constants={
            (i,): value
            for i, (kind, value) in enumerate(zip(kinds, bound.values(), strict=True))
            if kind == "constexpr"
        },
        attributes={
            (i,): backend.parse_attr(marks)
            for i, (kind, marks) in enumerate(specialised)
            if kind != "constexpr" and marks
        },
        options=backend.parse_options(kwargs),
        given=given,
    )
