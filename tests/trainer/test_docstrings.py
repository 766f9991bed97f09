"""Examples in docstrings that show a result give it."""

import doctest
import importlib
from pathlib import Path

import pytest

import mpo

ROOT = Path(mpo.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_give_what_they_show(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed
