"""The model of a GPU's time: counts that a hand finds too, and MODEL wherever times are shown."""

import importlib.util
import os

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("launches are recorded, not interpreted", allow_module_level=True)

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rich.console import Console

from benchmarks import candidates, model
from benchmarks.harness import matrix_products
from benchmarks.instruments.passes import counted
from benchmarks.options import RESULTS
from benchmarks.workloads import FromHidden

N, D, V = 512, 4096, 128256
PRODUCTS = 3 * 2 * (N * D + V * D + N * V)  # bytes of three bf16 products with bf16 results
RATES = model.Rates(1e12, 1e9, True, "a test's")


def total(name, float32_products=True, rows=N):
    way = model.WAYS[name]
    passes = model.passes_of(way, model.workload(rows, D, V, drops=way.drops), float32_products)
    return sum(p.flops for p in passes), sum(p.bytes for p in passes)


def needs(module):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{module} is not installed"
    )


def test_a_pass_is_what_it_reads_and_writes():
    left, right, total_ = (
        torch.empty(*shape, device="meta", dtype=torch.bfloat16)
        for shape in ((3, 5), (5, 7), (3, 7))
    )
    rows = torch.zeros(2, dtype=torch.int64, device="meta")
    with counted(float32_products=True) as passes:
        left @ right
        torch.mm(left, right, out=total_)
        torch.addmm(total_, left, right, beta=0, out=total_)
        total_.add_(1)
        torch.zeros_like(total_)
        total_.t().contiguous()
        total_.index_select(0, rows)
        total_.view(7, 3)
    product = 2 * (15 + 35 + 21)
    assert [p.bytes for p in passes] == [product] * 3 + [84, 42, 84, 16 + 56]
    assert [p.flops for p in passes] == [2 * 3 * 5 * 7] * 3 + [0] * 4


def test_a_pass_takes_what_the_slower_rate_allows():
    passes = [model.Pass("product", int(3e12), 10), model.Pass("copy", 0, int(2e9))]
    assert model.seconds(passes, RATES) == pytest.approx(3 + 2)
    assert model.seconds([model.Pass("both", int(1e12), int(5e9))], RATES) == pytest.approx(5)


@pytest.mark.parametrize(
    ("name", "per_logit", "per_weight"),
    [
        # statistics read bf16, the gradient reads and writes it
        ("mpo_kernels, any loss", 6, 0),
        # dW as float32, 2 bytes more; read again, and written in bf16
        ("mpo_kernels", 6, 2 + 4 + 2),
        # to float32 2 + 4, log-softmax 4 + 4, its gradient 4 of zeros and 12, to bf16 4 + 2
        ("plain, scored rows only", 36, 0),
    ],
)
def test_bytes_are_those_that_a_hand_finds(name, per_logit, per_weight):
    flops, moved = total(name)
    assert flops == 3 * 2 * N * D * V
    # beside them rows of hidden units, which are few
    assert moved == pytest.approx(PRODUCTS + per_logit * N * V + per_weight * V * D, rel=0.01)


def test_who_keeps_unscored_rows_computes_them():
    flops, moved = total("plain PyTorch")
    rows = round(N / model.SCORED / 2) * 2
    assert flops == 3 * 2 * rows * D * V
    products = 3 * 2 * (rows * D + V * D + rows * V)
    assert moved == pytest.approx(products + 36 * rows * V, rel=0.01)
    _, of_compiled = total("torch.compile")
    assert of_compiled == pytest.approx(products + 6 * rows * V, rel=0.01)


@needs("trl")
def test_trl_makes_a_fourth_product_and_a_sum_in_float32():
    flops, moved = total("TRL chunked log-probs")
    assert flops == 4 * 2 * N * D * V
    # products: two of logits; dH in 16 sums, read and written; dW a sum, from zeros to bf16
    logits, hidden = 2 * 2 * (16 * N * D + V * D + N * V), 2 * (N * V + V * D) + 16 * 8 * N * D
    weight = 2 * (16 * N * D + N * V) + V * D * (4 + 8 + 4 + 2)
    assert moved == pytest.approx(logits + hidden + weight + 6 * N * V, rel=0.01)


@needs("liger_kernel")
def test_liger_adds_to_dw_once_a_chunk():
    (_, one), (_, two) = (total("Liger fused, chunk 1", rows=rows) for rows in (512, 1024))
    rows = 820  # with those that are not scored
    # another chunk: its products, its logits, and dW read, read and written
    another = 3 * 2 * (rows * D + V * D + rows * V) + 6 * rows * V + 6 * V * D
    assert two - one == pytest.approx(another, rel=0.01)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_products_are_those_that_a_real_run_makes(chunk_bytes):
    of = FromHidden(2, 96, 8, 40, scored=1.0, dtype=torch.bfloat16)
    loss = candidates.ours_from_hidden(of, chunk_bytes)
    made = matrix_products(of, loss)
    for float32_products in (True, False):
        way = model.Way(lambda w: candidates.ours_from_hidden(w, chunk_bytes), reads_labels=True)
        fake = FromHidden(
            2, 96, 8, 40, scored=1.0, dtype=torch.bfloat16, device=torch.device("meta")
        )
        passes = model.passes_of(way, fake, float32_products)
        assert sum(p.flops for p in passes) == made * of.product_flops


@pytest.mark.parametrize("rows", [256, 512, 1024])
@pytest.mark.parametrize("gpu", model.GPUS)
def test_one_chunk_is_predicted_near_its_products_and_ahead_of_plain_pytorch(gpu, rows):
    rates = model.GPUS[gpu]

    def seconds(name):
        passes = model.passes_of(
            model.WAYS[name], model.workload(rows, D, V), rates.float32_products
        )
        return model.seconds(passes, rates)

    bound = model.seconds(model.bound_of(model.workload(rows, D, V)), rates)
    ours, plain = seconds("mpo_kernels, any loss"), seconds("plain, scored rows only")
    assert bound / ours > 0.9 and ours < plain


@pytest.fixture(scope="module")
def result():
    return model.result_of(quick=True)


def test_every_figure_is_labelled(result, tmp_path):
    assert {row.label for row in result.rows} == {"MODEL"} and result.label == "MODEL"
    assert all(source for _, _, source in result.rates.values())
    path = model.save(result, tmp_path)
    assert model.ModelResult.model_validate_json(path.read_text()) == result
    for title, columns, lines in model.tables(result):
        assert title.startswith(("MODEL, not measured", "MODEL, counted"))
        assert all(len(line) == len(columns) for line in lines)
    assert path.with_suffix(".md").read_text().startswith("# MODEL")


@pytest.fixture(scope="module")
def filed():
    text = (RESULTS / "model" / "model.json").read_text(encoding="utf-8")
    return model.ModelResult.model_validate_json(text)


def test_what_is_filed_is_what_is_counted_now(result, filed):
    """Of ours and plain PyTorch: peers come in other versions. If not: `python -m benchmarks.model
    --out benchmarks/results/model`, with the peers installed."""

    def counts(of):
        return {
            (row.head, row.gpu, row.rows, row.candidate): (row.flops, row.bytes, row.model_seconds)
            for row in of.rows
            if row.candidate.startswith(("mpo_kernels", "plain"))
        }

    before, now = counts(filed), counts(result)
    assert now and {key: before[key] for key in now} == now
    assert not any(row.reason for row in filed.rows) and not filed.quick


def test_the_results_page_shows_what_is_filed(filed):
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    _, columns, lines = next(model.tables(filed))
    for line in (["MODEL, scored rows", *columns[1:]], *lines):
        assert f"| {' | '.join(line)} |" in page


def test_a_peer_that_is_absent_is_shown_so(monkeypatch, capsys):
    def absent(workload):
        raise ModuleNotFoundError("No module named 'a_peer'")

    ways = {"mpo_kernels": model.WAYS["mpo_kernels"], "a peer": model.Way(absent)}
    monkeypatch.setattr(model, "WAYS", ways)
    found = model.result_of(quick=True)
    model.show(found, Console(width=200))
    text = capsys.readouterr().out
    assert "a peer: absent, ModuleNotFoundError: No module named 'a_peer'" in text
    assert all(row.model_seconds > row.bound_seconds for row in found.rows if not row.reason)
