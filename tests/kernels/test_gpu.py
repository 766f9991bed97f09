"""The Triton kernels on a real GPU. Skipped where there is none; nothing stands in for it."""

import pytest
import torch
from cases import labels_of, regime

import mpo_kernels
from benchmarks.instruments.accuracy import relative_error
from mpo_kernels import oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GAP = torch.tensor([0.3, -0.2])


@pytest.fixture(autouse=True)
def _real_backend(backend, monkeypatch):
    monkeypatch.setenv("MPO_KERNELS_BACKEND", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [127, 128256, 151936, 256001])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits(dtype, vocab, softcap):
    labels = labels_of((4, 9), vocab)
    logits = regime("normal", (4, 9, vocab), labels).to(dtype)
    ours, theirs = logits.cuda().requires_grad_(), logits.double().requires_grad_()
    output = mpo_kernels.mpo_loss(ours, labels.cuda(), GAP.cuda(), softcap=softcap)
    expected = oracle.mpo_loss(theirs, labels, GAP.double(), softcap=softcap)[0]
    output.loss.backward()
    expected.backward()
    torch.testing.assert_close(output.loss.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    best = relative_error(theirs.grad.float().to(dtype), theirs.grad)
    assert relative_error(ours.grad.cpu(), theirs.grad) < max(1e-5, 1.25 * best)


def test_more_than_two_billion_logits():
    """Rows times vocabulary beyond 2^31: offsets must be 64 bits wide. 4.4 GB of bf16 and as much
    of gradient."""
    rows, vocab = 17_000, 131_072
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda").requires_grad_()
    labels = torch.full((rows,), -100, device="cuda")
    labels[-1] = 7
    logp = mpo_kernels.token_logprobs(logits, labels)
    assert float(logp[-1]) == pytest.approx(-torch.tensor(float(vocab)).log().item(), rel=1e-5)
    logp.sum().backward()
    assert float(logits.grad[-1, 7]) == pytest.approx(1, rel=1e-2) and not logits.grad[0].any()


def test_linear_without_a_host_sync():
    """With labels on the CPU nothing waits for the GPU between launch and return."""
    labels = labels_of((4, 9), 1000)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(4, 9, 64, generator=generator),
        torch.randn(1000, 64, generator=generator),
    )
    h, w, gap = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_(), GAP.cuda()
    mpo_kernels.linear_mpo_loss(h, w, labels, gap).loss.backward()  # compiles
    h.grad = w.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = mpo_kernels.linear_mpo_loss(h, w, labels, gap).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ho, wo = hidden.double().requires_grad_(), weight.double().requires_grad_()
    oracle.linear_mpo_loss(ho, wo, labels, GAP.double())[0].backward()
    assert (
        relative_error(h.grad.cpu(), ho.grad) < 5e-3
        and relative_error(w.grad.cpu(), wo.grad) < 5e-3
    )


def test_reruns_are_bitwise_equal():
    labels = labels_of((4, 9), 128256)
    logits = regime("normal", (4, 9, 128256), labels).bfloat16().cuda()
    results = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        mpo_kernels.mpo_loss(leaf, labels.cuda(), GAP.cuda()).loss.backward()
        results.append(leaf.grad)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
