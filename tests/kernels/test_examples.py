"""The examples of public docstrings run, and say what they print."""

import doctest
import sys

import pytest
import torch
from cases import INTERPRETED

import mpo_kernels

if INTERPRETED:
    pytest.skip("they are the other backend's too", allow_module_level=True)


@pytest.mark.parametrize("name", mpo_kernels.__all__)
def test_example(name):
    thing = getattr(mpo_kernels, name)
    assert "    Example:\n" in thing.__doc__
    (example,) = [
        found
        for found in doctest.DocTestFinder(recurse=False).find(
            thing, name, globs={**vars(sys.modules[thing.__module__]), "torch": torch}
        )
        if found.examples
    ]
    result = doctest.DocTestRunner().run(example)
    assert result.attempted >= 2 and not result.failed
