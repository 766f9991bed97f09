"""Packed attention: one call of a kernel for a row equals a call for each span, and plain causal
attention of each sequence on its own."""

from types import SimpleNamespace

import flash
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import Count, model_of, mpo_batch, plain_scores, some_sequences
from tiny import save_model

from mpo.config import ModelConfig
from mpo.loss_config import MPOLoss
from mpo.models import attention
from mpo.models.documents import Documents
from mpo.models.forward import bind_mpo_forward
from mpo.models.loading import load_model
from mpo.models.packing import pack_for_scoring

SPANS = "SDPA, span by span"
KERNELS = (flash.PYTORCHS, flash.FLASH_ATTN)
ATTENTION_OPERATORS = {"aten::_flash_attention_forward", "flash_attn::_flash_attn_varlen_forward"}


def plain_attention(q, k, v, documents, softcap, window):
    """From the definition: the rows of each sequence, written out."""
    out, start = torch.zeros_like(q), 0
    for prompt, *responses in documents.lengths:
        end = start + prompt
        for response in responses:
            rows = torch.tensor([*range(start, start + prompt), *range(end, end + response)])
            end += response
            x, y, z = (t[:, rows].repeat_interleave(len(q) // len(t), 0) for t in (q, k, v))
            scores = x @ y.mT * q.shape[-1] ** -0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            places = torch.arange(len(rows))
            back = places[:, None] - places
            unseen = (back < 0) | (back >= (window or len(rows)))
            weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
            # the prompt's rows come out the same for each response
            out = out.index_copy(1, rows, weights @ z)
        start = end
    return out.transpose(0, 1)


def attend(kernel, tensors, documents, softcap, window, upstream):
    """The output and the gradients of all tensors."""
    with flash.standing_in(kernel):
        out = attention.packed_attention(
            None,
            *(x[None] for x in tensors),
            None,
            documents=documents,
            softcap=softcap,
            sliding_window=window,
        )[0][0]
        return out, *torch.autograd.grad(out, tensors, upstream)


@settings(max_examples=25)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5))
        | st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=4,
    ),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.just(1.5),
    groups=st.sampled_from([1, 2]),
)
def test_every_kernel_equals_each_sequence_on_its_own(lengths, window, softcap, groups):
    documents, generator = Documents.of(lengths), torch.Generator().manual_seed(0)
    rows = sum(map(sum, lengths))
    tensors = [
        torch.randn(heads, rows, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (2 * groups, 2, 2)
    ]
    upstream = torch.randn(rows, 2 * groups, 8, generator=generator, dtype=torch.float64)
    out = plain_attention(*tensors, documents, softcap, window)
    wanted = (out, *torch.autograd.grad(out, tensors, upstream))
    for kernel in (SPANS, flash.FLASH_ATTN, *([] if softcap else [flash.PYTORCHS])):
        # where soft-caps are written out, the softmax is one in float32
        error = 1e-5 if softcap and kernel == SPANS else 1e-9
        found = attend(kernel, tensors, documents, softcap, window, upstream)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=error, atol=error)


def test_documents_as_a_kernel_takes_them():
    documents = Documents.of([(2, 3, 1), (1, 1), (1, 2, 2)])
    assert documents.query_offsets.tolist() == [0, 5, 6, 8, 11, 13]
    assert documents.key_offsets.tolist() == [0, 5, 8, 10, 13, 16]
    assert documents.key_rows.tolist() == [*range(5), 0, 1, 5, 6, 7, 8, 9, 10, 8, 11, 12]
    assert (documents.longest_query, documents.longest_key) == (5, 5)
    assert Documents.of([(2, 3), (1, 1)]).key_rows is None
    assert Documents.of([(4, 1, 3)]).longest_key == 7


ARCHITECTURES = [
    ("llama", flash.PYTORCHS),
    ("qwen2", flash.PYTORCHS),
    ("qwen3", flash.PYTORCHS),
    ("mistral-sliding", flash.PYTORCHS),
    ("mistral-sliding", flash.FLASH_ATTN),
    ("gemma2", flash.FLASH_ATTN),
    ("gemma3", flash.PYTORCHS),
]


@pytest.mark.parametrize(("architecture", "kernel"), ARCHITECTURES)
def test_a_model_scores_as_each_sequence_on_its_own(architecture, kernel):
    sequences = some_sequences(count=5)
    model = bind_mpo_forward(model_of(architecture), MPOLoss())
    logps, pooled = plain_scores(architecture, sequences)
    for share in (True, False):
        with torch.no_grad(), flash.standing_in(kernel):
            scores = model(batch=pack_for_scoring(sequences, "response", share))
        torch.testing.assert_close(scores.mean_logp.double(), logps, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(scores.pooled.double(), pooled, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("architecture", "kernel"), [("llama", flash.PYTORCHS), ("gemma2", flash.FLASH_ATTN)]
)
def test_recomputation_keeps_the_kernels_results(architecture, kernel, tmp_path, tokenizer):
    """`selective` calls it once per block, and gradients are those of kept activations."""
    folder = save_model(tmp_path / "model", tokenizer, architecture)
    gradients, calls = [], []
    for how in (False, "selective", True):
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="float32", activation_checkpointing=how)
        )
        model = bind_mpo_forward(loaded, MPOLoss()).train()
        with flash.standing_in(kernel), Count() as count:
            model(batch=mpo_batch(some_sequences())).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(sum(n for op, n in count.calls.items() if op.name() in ATTENTION_OPERATORS))
    assert calls == [2, 2, 4]
    for kept, *others in zip(*gradients, strict=True):
        assert all(torch.equal(kept, other) for other in others)


def calls_per_block(architecture, kernel, documents):
    """Operators of the second of two blocks, in forward and backward."""
    rows = sum(map(sum, documents.lengths))
    counts = []
    for blocks in (1, 2):
        model = model_of(architecture).train().model
        model.layers = model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        ids = torch.randint(61, (1, rows), generator=torch.Generator().manual_seed(0))
        places = torch.arange(rows)[None]
        with flash.standing_in(kernel):
            with Count() as forward:
                out = model(ids, position_ids=places, documents=documents, use_cache=False)[0]
            with Count() as backward:
                out.sum().backward()
        counts.append((forward.calls, backward.calls))
    return [two - one for one, two in zip(*counts, strict=True)]


@pytest.mark.parametrize(("architecture", "kernel"), ARCHITECTURES)
def test_a_block_is_few_calls_however_many_sequences_there_are(architecture, kernel):
    """Fifty of them, which share prompts. Span by span they took hundreds."""
    fifty = calls_per_block(architecture, kernel, Documents.of([(3, 2, 4)] * 25))
    ten = calls_per_block(architecture, kernel, Documents.of([(3, 2, 4)] * 5))
    assert ten == fifty
    forward, backward = (calls.total() for calls in fifty)
    # what else a block's backward does: for Llama 145 calls in all, for Gemma's four norms more
    assert forward <= 150 and backward <= 230, (forward, backward)
    assert sum(n for op, n in fifty[0].items() if op.name() in ATTENTION_OPERATORS) == 1


def test_the_operators_that_the_documentation_counts():
    """docs/training.md, of Llama; another version of transformers may differ by a few."""
    fifty = Documents.of([(3, 2, 4)] * 25)
    counts = [
        calls.total()
        for kernel in (flash.PYTORCHS, SPANS)
        for calls in calls_per_block("llama", kernel, fifty)
    ]
    assert counts == pytest.approx([80, 148, 631, 721], rel=0.05)


def test_no_span_meets_a_backend_that_builds_a_plan_per_shape(monkeypatch):
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spied(*args, **options):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        return sdpa(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = bind_mpo_forward(model_of("llama"), MPOLoss())
    with torch.no_grad():
        model(batch=pack_for_scoring(some_sequences(), "response", True))
    assert set(seen) == {(False, True, True)} and len(seen) == 8
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "options", "has", "want"),
    [
        ("cpu", BF16, 128, {}, {"flash_attn": True}, SPANS),
        ("cuda", BF16, 128, {}, {}, flash.PYTORCHS),
        ("cuda", torch.float16, 256, {"dropout": True}, {"flash_attn": True}, flash.PYTORCHS),
        ("cuda", torch.float32, 128, {}, {"flash_attn": True}, SPANS),
        ("cuda", BF16, 128, {"softcap": True}, {}, SPANS),
        ("cuda", BF16, 128, {"softcap": True}, {"flash_attn": True}, flash.FLASH_ATTN),
        ("cuda", BF16, 128, {"softcap": True, "dropout": True}, {"flash_attn": True}, SPANS),
        ("cuda", BF16, 100, {}, {}, SPANS),
        ("cuda", BF16, 100, {}, {"flash_attn": True}, flash.FLASH_ATTN),
        ("cuda", BF16, 264, {}, {"flash_attn": True}, SPANS),
        ("cuda", BF16, 128, {}, {"flash_attn": True, "capability": (7, 5)}, SPANS),
        ("cuda", BF16, 128, {}, {"hip": "6.4"}, SPANS),
        ("cuda", BF16, 128, {}, {"hip": "6.4", "flash_attn": True}, flash.FLASH_ATTN),
        ("cuda", BF16, 128, {}, {"built": False}, SPANS),
        ("xpu", BF16, 128, {}, {"flash_attn": True}, SPANS),
    ],
)
def test_the_kernel_follows_from_device_and_dtype(
    device, dtype, head_dim, options, has, want, monkeypatch
):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: has.get("capability", (9, 0))
    )
    monkeypatch.setattr(torch.version, "hip", has.get("hip"))
    monkeypatch.setattr(
        torch.backends.cuda, "is_flash_attention_available", lambda: has.get("built", True)
    )
    found = flash.flash_attn_varlen_func if has.get("flash_attn") else None
    monkeypatch.setattr(attention, "flash_attn", lambda: found)
    assert attention.kernel_of(torch.device(device), dtype, head_dim, **options) == want


@pytest.mark.parametrize(
    ("installed", "loads", "is_there"),
    [("2.7.4.post1", True, True), ("2.6.3", True, False), ("2.8.3", False, False)],
)
def test_flash_attn_is_taken_where_it_is_new_enough_and_loads(
    installed, loads, is_there, monkeypatch
):
    module = SimpleNamespace(flash_attn_varlen_func=len) if loads else SimpleNamespace()
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", module)
    monkeypatch.setattr(attention, "version", lambda name: installed)
    assert (attention.flash_attn.__wrapped__() is len) == is_there


@pytest.mark.parametrize(
    ("architecture", "kernel"),
    [(a, k) for a in ("llama", "qwen2", "gemma3") for k in (flash.PYTORCHS, SPANS)]
    + [("gemma2", SPANS)],
)
def test_a_pass_reads_nothing_from_the_device(architecture, kernel, monkeypatch):
    """Forward and backward on tensors without values: to read one is an error, as a GPU's would be
    a wait."""
    monkeypatch.setattr(attention, "kernel_of", lambda *_, **__: kernel)
    model = model_of(architecture).train().model.to("meta")
    documents = Documents.of([(3, 2, 4), (2, 5)]).to(torch.device("meta"))
    ids = torch.zeros(1, 16, dtype=torch.int64, device="meta")
    out = model(ids, position_ids=ids, documents=documents, use_cache=False)[0]
    out.sum().backward()
    assert out.shape == (1, 16, 32)
    with pytest.raises(RuntimeError, match="meta"):
        bool(ids.any())
