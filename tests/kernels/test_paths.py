"""Import paths that an earlier release's README showed."""

import importlib

import pytest

from mpo_kernels import oracle


def test_the_old_name_of_the_oracle_serves_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"mpo_kernels\.oracle"):
        reference = importlib.import_module("mpo_kernels.reference")
    assert reference.linear_mpo_loss is oracle.linear_mpo_loss
    assert reference.retention_loss is oracle.retention_loss
