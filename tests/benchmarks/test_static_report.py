"""What is known without a GPU: peers beside our kernels, absent ones with their reason, and results
as JSON that validates."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not under the interpreter", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rich.console import Console  # noqa: E402

from benchmarks import static  # noqa: E402
from benchmarks.instruments import peer_bytes  # noqa: E402
from benchmarks.instruments.launch import recorded  # noqa: E402
from benchmarks.instruments.peers import PEERS, Peer  # noqa: E402
from benchmarks.instruments.variants import variants  # noqa: E402
from benchmarks.output import Machine  # noqa: E402
from mpo_kernels.backends.results import RowStats  # noqa: E402
from mpo_kernels.backends.triton.logprob import logprob_grad, logprob_stats  # noqa: E402

TABLE = Path(__file__).parents[1] / "kernels" / "compiled" / f"{triton.__version__}.json"
OURS = [
    variant
    for variant in variants()
    if variant.name in ("stats plain aligned", "grad plain aligned", "grad plain odd")
]


def launch_ours(vocab, target):
    """Our launch code, as a peer's is called; it has so many rows that none is split."""
    logits = torch.empty(2, 512, vocab, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(1024, dtype=torch.int64, device="meta")
    row = torch.empty(1024, device="meta")
    options = {"logit_scale": 1.0, "softcap": None}
    logprob_stats(logits, labels, **options)
    stats = RowStats(row, row.new_empty(1024, 2), None, None)
    logprob_grad(logits, labels, stats, row, torch.empty_like(logits), **options)


PLANTED = Peer(
    "planted",
    "mpo-kernels",
    launch_ours,
    {"_logprob_stats_kernel": "reads", "_logprob_grad_kernel": "reads and writes"},
)
ABSENT = Peer(
    "not installed",
    "no-such-package",
    lambda vocab, target: __import__("a_peer_that_is_not_installed"),
    {"kernel": ""},
)
CHANGED = replace(PLANTED, name="changed", does={"a_kernel_of_an_older_version": ""})


@pytest.fixture(scope="module")
def result():
    kernels = [
        *static.own_rows(OURS, ["sm_90"]),
        *static.peer_rows([PLANTED, ABSENT, CHANGED], ["sm_90"]),
    ]
    found = peer_bytes.in_interpreter([1000])
    return static.StaticResult(
        machine=Machine.here(torch.device("cpu")),
        quick=True,
        bytes={},
        bytes_beside_peers=found,
        counted=[],
        kernels=kernels,
    )


def rows(result, library):
    return [row for row in result.kernels if row.library == library]


@pytest.mark.skipif(not TABLE.is_file(), reason="other compilers, other code")
def test_our_numbers_are_those_of_the_bars(result):
    table = json.loads(TABLE.read_text())
    for row in rows(result, "mpo_kernels"):
        bars = table[f"{row.kernel} {row.vocabulary}"][row.target]
        assert {name: getattr(row.code, name) for name in bars} == bars


def test_launches_are_compiled_as_their_code_specialises_them(result):
    """For both vocabularies: its blocks and warps, and wide accesses only where 16 divides the
    vocabulary."""
    stats, grad, odd_stats, odd_grad = rows(result, "planted")
    assert (stats.block, stats.code.num_warps, grad.block, grad.code.num_warps) == (
        8192,
        8,
        4096,
        4,
    )
    assert (
        stats.code.logit_bits == grad.code.logit_bits == 128
        and odd_stats.code.logit_bits == odd_grad.code.logit_bits == 16
    )
    assert {body.access for body in stats.code.bodies} == {"read"}
    assert [body.access for body in grad.code.bodies] == ["read and write"]
    ours = next(
        row
        for row in rows(result, "mpo_kernels")
        if row.kernel == "grad plain" and row.vocabulary == "aligned"
    )
    assert grad.code.per_logit("read and write") == pytest.approx(
        ours.code.per_logit("read and write"), rel=0.1
    )
    assert grad.code.per_logit("read") is None


def test_peers_that_are_missing_or_changed_are_absent_with_a_reason(result):
    assert (
        len(rows(result, "not installed"))
        == len(rows(result, "changed"))
        == len(static.VOCABULARIES)
    )
    for name, reason in (
        ("not installed", "no-such-package: ModuleNotFoundError"),
        ("changed", "a_kernel_of_an_older_version"),
    ):
        assert all(row.code is None and reason in row.reason for row in rows(result, name))


@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if "softcap" not in peer.name], ids=lambda peer: peer.name
)
def test_peers_are_reported_where_they_are_installed(peer, monkeypatch):
    monkeypatch.setattr(static, "VOCABULARIES", {"odd": 50257})
    found = list(static.peer_rows([peer], ["sm_90"]))
    if found[0].code is None:
        assert found[0].reason.startswith(f"{peer.package}: ")
        pytest.skip(found[0].reason)
    assert [row.kernel for row in found] == list(peer.does)
    for row in found:
        assert row.does and row.code.registers > 16 and row.code.widest_bits >= 16
        assert (
            bool(row.code.bodies) == peer.has_logits
            and (row.code.instructions_per_element is None) != peer.has_logits
        )


def test_bytes_of_ours_are_six_and_peers_have_theirs_or_a_reason(result):
    found = result.bytes_beside_peers["1000"]
    assert set(found) == set(peer_bytes.CANDIDATES)
    for name in ("mpo_kernels", "mpo_kernels in place"):
        assert 6 <= found[name].kernels + found[name].torch <= 6.2 and found[name].ignored < 2.1
    for of_peer in found.values():
        assert (of_peer.kernels is None and of_peer.reason) or of_peer.kernels >= 6


def test_results_are_json_that_validates_a_table_and_a_picture(result, tmp_path):
    assert static.StaticResult.model_validate_json(result.model_dump_json()) == result
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))
    static.show(result, console)
    text = console.export_text()
    assert (
        "not installed: absent, no-such-package: ModuleNotFoundError" in text
        and "mpo_kernels: stats plain" in text
    )
    static.picture(result, tmp_path / "static.png")
    assert (tmp_path / "static.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="sm_70"), recorded("sm_70"):
        pass
