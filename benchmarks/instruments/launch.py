"""Runs a package's own launch code on CPU tensors as if a GPU were there.

    with gpu_on_cpu("sm_90") as launches:
        loss = mpo_kernels.mpo_loss(logits, labels, reference_gap).loss     # MPO_KERNELS_BACKEND=triton
    launches[0].kernel, launches[0].grid, launches[0].findings

Each launch is specialised as Triton's own launcher does it (arguments that 16 divides, integers that are 1, None), compiled for that GPU,
and the PTX is emulated on the tensors' memory. Nothing here tells how fast it would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

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
def gpu_on_cpu(target: str, *, strict: bool = True, programs: Collection[int] | None = None) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel is emulated for `target`, one of TARGETS; the list gets each as it ends.

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
        raise RuntimeError("Under TRITON_INTERPRET=1 nothing is compiled; start another process without it.")
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled, bound, signature, num_warps = _compile(kernel, target, args, kwargs)
        shape = tuple(grid(bound) if callable(grid) else grid)
        values = [float(value) if signature[name] == "fp32" else value for name, value in bound.items() if signature[name] != "constexpr"]
        text = compiled.asm["ptx"]
        findings = emulate(parse(text), shape, values, num_warps, compiled.metadata.shared, programs)
        launches.append(Launch(kernel.__name__, shape, num_warps, text, findings))
        if strict and not findings.clean:
            raise AssertionError(f"{kernel.__name__} compiled for {target}: {findings}")
        return compiled

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _compile(kernel: Any, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, str], int]:
    """What Triton's launcher would compile for these arguments; also the arguments by name, and their types."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    backend = make_backend(gpu)
    kwargs = {"debug": False, **kwargs}
    bound, specialisation, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialisation, options)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options.__dict__)
    return compiled, bound, signature, options.num_warps
