"""The kernels compiled for four GPUs: no spills anywhere, 128-bit access to logits where the
vocabulary allows it, and no more registers and instructions than the committed table of this triton
says (compiled/*.json; see benchmarks/instruments/variants.py)."""

import json
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from cases import INTERPRETED  # noqa: E402

if INTERPRETED:
    pytest.skip("compiles, so not under the interpreter", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from benchmarks.instruments.machine_code import TARGETS  # noqa: E402
from benchmarks.instruments.variants import facts, variants  # noqa: E402

TABLES = {
    path.stem: json.loads(path.read_text())
    for path in Path(__file__).with_name("compiled").glob("*.json")
}
BARS = TABLES.get(triton.__version__) or TABLES[max(TABLES)]
VARIANTS = {variant.name: variant for variant in variants()}
SLACK = 1.0 if triton.__version__ in TABLES else 1.25  # other compilers, other registers


@pytest.mark.parametrize("version", TABLES)
def test_each_table_is_complete(version):
    assert set(TABLES[version]) == set(VARIANTS)
    assert all(set(row) == set(TARGETS) for row in TABLES[version].values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_code_holds_its_bars(name, target):
    variant, bars = VARIANTS[name], BARS[name][target]
    got = facts(variant.compiled(target))
    assert got["spilled"] == bars["spilled"] == 0
    if variant.tiled_as is not None and variant.aligned:
        assert got["widest_bits"] == bars["widest_bits"] == 128
    assert got["registers"] <= SLACK * bars["registers"]
    assert got["instructions_per_element"] <= SLACK * bars["instructions_per_element"]
    assert got["programs_per_multiprocessor"] * SLACK >= bars["programs_per_multiprocessor"] >= 2
