"""The harness itself: wrong and slow candidates show as such, missing ones as absent, results as
JSON that validates."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import engines, linear, logits, scaling, workloads
from benchmarks.candidates import from_hidden, from_logits
from benchmarks.harness import UPSTREAM, Absent, Candidate, Comparison, compare, peak_bytes
from benchmarks.instruments import accuracy
from benchmarks.instruments.accuracy import relative_error
from benchmarks.instruments.operators import Memory
from benchmarks.objectives import DPO, MPO, OBJECTIVES, ORPO, SIMPO
from benchmarks.options import RESULTS, set_up
from benchmarks.output import Machine, Result, save
from benchmarks.scaling import exponent
from benchmarks.workloads import FromHidden, FromLogits
from mpo_kernels import losses, oracle

LOGITS = FromLogits(1, 6, 300)
HIDDEN = FromHidden(1, 6, 16, 300)


def by_name(candidates, name):
    return next(candidate for candidate in candidates if candidate.name == name)


def planted(name, change):
    """Our loss with something done to it."""
    build = by_name(from_logits(), "mpo_kernels").build

    def broken(workload):
        loss = build(workload)
        return lambda inputs: change(loss, inputs)

    return Candidate(name, broken)


@pytest.fixture(scope="module")
def planted_comparison():
    def slow(loss, inputs):
        time.sleep(0.05)
        return loss(inputs)

    def wrong_gradient(loss, inputs):
        return loss(
            {
                "logits": (
                    inputs["logits"].detach()
                    + 0.99 * (inputs["logits"] - inputs["logits"].detach())
                )
            }
        )

    def absent(workload):
        raise Absent("it needs a machine that nobody has")

    def failing(loss, inputs):
        raise RuntimeError("no such kernel\non this device")

    candidates = [
        planted("slow", slow),
        planted("wrong loss", lambda loss, inputs: loss(inputs) * 1.001),
        planted("wrong gradient", wrong_gradient),
        Candidate("absent", absent),
        Candidate("not installed", lambda workload: __import__("a_peer_that_is_not_installed")),
        planted("failing", failing),
        *(c for c in from_logits() if c.ours or c.name == "plain PyTorch"),
    ]
    return compare(LOGITS, candidates, repetitions=4)


def test_wrong_candidates_are_flagged_and_rank_after_right_ones(planted_comparison):
    assert (
        planted_comparison.row("wrong loss").status
        == planted_comparison.row("wrong gradient").status
        == "wrong"
    )
    assert planted_comparison.row("wrong loss").errors["loss"] == pytest.approx(1e-3, rel=0.01)
    assert planted_comparison.row("wrong gradient").reason.startswith("logits is off by 1.0e-02")
    order = [row.status for row in planted_comparison.rows]
    assert order == sorted(order, key=["bound", "ok", "wrong", "failed", "absent"].index)


def test_a_slow_candidate_ranks_last_of_the_right_ones(planted_comparison):
    right = [row.candidate for row in planted_comparison.rows if row.status == "ok"]
    assert right[-1] == "slow" and len(right) == 4
    assert planted_comparison.fastest(ours=False).candidate == "plain PyTorch"
    assert planted_comparison.row("slow").both.median > 0.05
    least = planted_comparison.row("least work").both.median
    ratios = planted_comparison.times_least_work
    assert ratios["slow"] == planted_comparison.row("slow").both.median / least > 1
    assert "least work" not in ratios and "absent" not in ratios


def test_what_cannot_run_is_absent_or_failed_and_has_no_time(planted_comparison):
    assert planted_comparison.row("absent").reason == "it needs a machine that nobody has"
    assert planted_comparison.row("not installed").status == "absent"
    failed = planted_comparison.row("failing")
    assert (
        failed.status == "failed" and failed.reason == "RuntimeError: no such kernel on this device"
    )
    assert all(
        planted_comparison.row(name).both is None for name in ("absent", "not installed", "failing")
    )


def test_results_are_json_that_validates_and_a_picture(planted_comparison, tmp_path):
    result = Result(
        benchmark="logits",
        machine=Machine.here(torch.device("cpu")),
        quick=True,
        comparisons=[planted_comparison],
    )
    path = save(result, tmp_path, Console(quiet=True))
    assert Result.model_validate_json(path.read_text()) == result
    assert (tmp_path / "logits.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "logits.md").read_text().splitlines()[4:]
    assert {line.count("|") for line in table} == {11}
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [
        row.candidate for row in planted_comparison.rows if row.status != "absent"
    ]
    assert "| failed: RuntimeError: no such kernel on this device |" in table[-1]
    assert (
        result.machine.versions["torch"] == torch.__version__
        and result.machine.threads == torch.get_num_threads()
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize("trainable", [True, False])
def test_ours_and_plain_pytorch_are_right_from_hidden_states(trainable, objective):
    workload = FromHidden(2, 6, 16, 300, trainable=trainable, objective=objective)
    result = compare(
        workload, [c for c in from_hidden() if c.ours or c.name.startswith("plain")], repetitions=2
    )
    assert [row.status for row in result.rows] == ["bound", *["ok"] * 5]
    assert set(result.row("mpo_kernels").errors) == {
        "loss",
        "hidden",
        *(["weight"] if trainable else []),
    }


def test_matrix_products_are_counted_in_units_of_the_scored_rows():
    workload = FromHidden(1, 8, 16, 300, scored=0.5)
    result = compare(workload, from_hidden_without_compilers(), repetitions=1)
    counted = {row.candidate: row.products for row in result.rows}
    assert counted["mpo_kernels"] == counted["plain, scored rows only"] == 3
    assert counted["plain PyTorch"] == 6 and counted["least work"] is None
    half = FromHidden(1, 8, 16, 300, dtype=torch.bfloat16)
    names = ("mpo_kernels", "mpo_kernels token log-probs")
    ours = compare(half, [by_name(from_hidden(), name) for name in names], repetitions=1)
    assert [ours.row(name).products for name in names] == [3, 3]


def from_hidden_without_compilers():
    return [c for c in from_hidden() if c.ours or c.name.startswith("plain")]


@pytest.mark.parametrize(
    "changed",
    [
        replace(DPO, ours=losses.DPO(beta=0.11)),
        replace(DPO, constants=((-1000.0, -1004.0),)),
        replace(SIMPO, formula=lambda scores: SIMPO.formula(scores) * 1.001),
        replace(ORPO, ours=losses.ORPO(beta=0.11)),
    ],
    ids=["hyper-parameter", "constant", "formula", "odds"],
)
def test_a_loss_that_is_not_the_objectives_is_wrong(changed):
    workload = FromHidden(2, 6, 16, 300, objective=changed)
    names = ["mpo_kernels", "plain, scored rows only"]
    result = compare(workload, [by_name(from_hidden(), name) for name in names], repetitions=1)
    assert [result.row(name).status for name in names] == ["wrong", "ok"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
@pytest.mark.parametrize(
    "name",
    [
        "Liger fused, chunk 1",
        "TRL whole logits",
        "TRL chunked log-probs",
        "cut-cross-entropy",
        "torch linear_cross_entropy",
    ],
)
def test_peers_compute_the_same_loss_where_they_are_installed(name, objective):
    workload = FromHidden(2, 6, 16, 300, objective=objective)
    row = compare(workload, [by_name(from_hidden(), name)], repetitions=1).row(name)
    if row.status == "absent":
        pytest.skip(row.reason)
    assert row.status == "ok", row.reason


def test_memory_is_that_of_the_largest_moment():
    def loss(inputs):
        big = inputs["hidden"].new_zeros(1_000_000)
        again = big + 1
        del big, again
        return inputs["hidden"].new_zeros(500_000).sum() + inputs["hidden"].sum()

    assert 8_000_000 <= peak_bytes(FromHidden(1, 6, 16, 300, trainable=False), loss) < 8_100_000


def test_in_place_needs_no_second_copy_of_the_logits():
    workload = FromLogits(1, 64, 20_000)
    plain, inplace = (
        peak_bytes(workload, by_name(from_logits(), name).build(workload))
        for name in ("mpo_kernels", "mpo_kernels in place")
    )
    assert plain - inplace > 0.75 * 2 * 64 * 20_000 * 4


def test_every_loss_is_compared():
    compared = linear.workloads(torch.device("cpu"), quick=True)
    assert {workload.objective for workload in compared} == set(OBJECTIVES)


def test_engines_are_compared_below_at_and_above_one_chunk():
    """All right and counted; more rows than a chunk cost kept logits a fourth product."""
    compared = engines.workloads(torch.device("cpu"), quick=True)
    assert {workload.dtype for workload in compared} == {torch.float32, torch.bfloat16}
    products = {}
    for workload in compared[:4]:
        small = replace(workload, hidden=16, vocab=300)
        result = compare(small, engines.CANDIDATES, repetitions=1)
        assert [row.status for row in result.rows] == ["bound", *["ok"] * 5]
        rows = result.settings["rows"] / result.settings["chunk_rows"]
        products[rows] = {row.candidate: row.products for row in result.rows}
    assert list(products) == [0.5, 1, 2, 3]
    assert [counted["kept logits"] for counted in products.values()] == [3, 3, 4, 4]
    for name in ("chunk loop", "linear_sequence_loss", "linear_mpo_loss"):
        # of pairs in pieces some rows are computed again
        *whole, in_pieces = (counted[name] for counted in products.values())
        assert whole == [3, 3, 3] and 3 <= in_pieces < 4


def test_exponents():
    assert exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)


def test_a_command_ends_with_its_files(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.logits",
            "--quick",
            "--repetitions",
            "2",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mpo_kernels in place" in done.stdout
    comparisons = Result.model_validate_json((tmp_path / "logits.json").read_text()).comparisons
    assert all(
        isinstance(c, Comparison) and c.row("mpo_kernels").status == "ok" for c in comparisons
    )


@pytest.mark.parametrize(
    "path",
    sorted(RESULTS.glob("*/l*.json")) + sorted(RESULTS.glob("*/scaling.json")),
    ids=lambda path: path.stem,
)
def test_committed_results_validate_and_none_is_wrong(path):
    result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    assert not result.quick
    for comparison in result.comparisons:
        ours = comparison.row("mpo_kernels")
        assert ours.status == "ok" and comparison.times_least_work["mpo_kernels"] >= 1


def gpu_workloads():
    """All that a GPU is given, without their data."""
    meta = torch.device("meta")
    yield from linear.workloads(meta, False)
    yield from logits.workloads(meta, False)
    yield from engines.workloads(meta, False)
    for sizes in scaling.workloads(meta, False).values():
        yield from sizes


def test_the_exact_result_of_every_gpu_workload_fits_beside_its_inputs(monkeypatch):
    """Counted: what lies on the device at once. It is less than half of 80 GB, so that no
    fragmentation matters."""
    monkeypatch.setattr(workloads, "_on_host", lambda blocks, shape: [0 for _ in blocks])
    largest = 0
    for workload in gpu_workloads():
        workload.labels = workload.labels.to("meta")
        given = sum(t.nbytes for t in vars(workload).values() if isinstance(t, torch.Tensor))
        with Memory() as memory:
            workload.exact()
        largest = max(largest, given + memory.peak)
    assert 20e9 < largest < 40e9


@pytest.mark.parametrize("workload", [LOGITS, HIDDEN, replace(HIDDEN, objective=ORPO)])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_exact_result_is_that_of_all_rows_at_once(workload, rows, monkeypatch):
    monkeypatch.setattr(workloads, "EXACT_BYTES", 8 * workload.vocab * rows)
    inputs = workload.inputs()
    if "logits" in inputs:
        leaves = {"logits": inputs["logits"].detach().double().requires_grad_()}
        logps = oracle.token_logprobs(leaves["logits"], workload.labels)
        objective = MPO
    else:
        leaves = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
        logps = oracle.linear_token_logprobs(*leaves.values(), workload.labels)
        objective = workload.objective
    loss = objective.of_tokens(logps, workload.labels)
    (loss * UPSTREAM).backward()
    exact = workload.exact()
    assert set(exact) == {"loss", *leaves}
    for name, want in {"loss": loss, **{name: t.grad for name, t in leaves.items()}}.items():
        torch.testing.assert_close(exact[name], want.detach(), rtol=1e-12, atol=1e-15)


def test_commands_of_the_cpu_are_filed_under_it_on_a_machine_with_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    device, machine, folder, _ = set_up(torch.get_num_threads(), None, on_cpu=True)
    assert device.type == "cpu" and "nvidia" not in folder.name and machine.device.startswith("CPU")
    device, machine, folder, _ = set_up(torch.get_num_threads(), None)
    assert device.type == "cuda" and folder.name.startswith("nvidia-test-")


def test_an_error_is_one_number_however_many_parts_it_is_found_in(monkeypatch):
    exact = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    found = exact + 0.1
    want = relative_error(found, exact)
    assert want == pytest.approx(float((found - exact).norm() / exact.norm()))
    monkeypatch.setattr(accuracy, "AT_ONCE", 7)
    assert relative_error(found, exact) == pytest.approx(want)
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
