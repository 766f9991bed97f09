"""Vocabulary-parallel and context-parallel heads on real gloo processes against one process."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from cases import INTERPRETED

from mpo_kernels import Parallel
from mpo_kernels.parallel import from_handle

WORKER = Path(__file__).with_name("parallel_worker.py")


def run(ranks, tmp_path, backend="gloo", **environment):
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, str(WORKER), str(rank), str(ranks)),
                *(str(tmp_path / "rendezvous"), backend),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        for rank in range(ranks)
    ]
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=300)[0])
        finally:
            process.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)[-4000:]


@pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_results_as_one_process(ranks, tmp_path):
    """Uneven slices; both kinds, on four ranks also together; ranks without scored rows, or without
    rows; pairs in pieces; mean, sum, none; all dtypes; any ignore_index."""
    run(ranks, tmp_path, MPO_KERNELS_BACKEND="torch")


@pytest.mark.skipif(INTERPRETED, reason="starts its own processes")
def test_the_same_results_with_the_triton_kernels(tmp_path):
    run(2, tmp_path, MPO_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")


def test_groups_and_slices_go_together():
    with pytest.raises(ValueError, match="go together"):
        Parallel(vocab_slice=7)
    with pytest.raises(ValueError, match="needs a vocab_group, a context_group or both"):
        Parallel()
    with pytest.raises(ValueError, match="over the ranks of vocab_group; give one"):
        Parallel(context_group=object(), sequence_parallel=True)


def test_nothing_but_its_owner_keeps_a_parallel():
    parallel = Parallel(context_group=object())
    handle, gone = parallel.handle, weakref.ref(parallel)
    assert from_handle(handle) is parallel
    del parallel
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="The Parallel of this call is gone"):
        from_handle(handle)
    assert Parallel(context_group=object()).handle != handle
