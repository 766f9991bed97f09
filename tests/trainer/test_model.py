"""The bound forward against the Hugging Face forward of one sequence at a time, in float64."""

import collections
import gc

import pytest
import torch
from tiny import ARCHITECTURES, build_model, save_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mpo.config import ModelConfig
from mpo.data.examples import TokenizedResponse
from mpo.loss_config import MPOLoss
from mpo.models import attention
from mpo.models.forward import bind_mpo_forward
from mpo.models.loading import check_model, load_model
from mpo.models.packing import Batch, pack, pack_for_scoring
from mpo.runtime.errors import UserError

VOCAB = 61
SHAPES = [(3, 4), (3, 1), (9, 8), (9, 5), (1, 2)]
"""Tokens of prompt and response; the first two have one prompt, and so have the next two."""


def some_sequences(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(2, VOCAB, (SHAPES[i // 2 * 2][0],), generator=generator).tolist()
        for i in (0, 0, 2, 2, 4)
    ]
    prompts[1], prompts[3] = prompts[0], prompts[2]
    responses = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for _, n in SHAPES]
    return [
        TokenizedResponse((*prompt, *response), len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ][:count]


def model_of(architecture, implementation=attention.NAME):
    model = build_model(architecture, VOCAB)
    model.set_attn_implementation(implementation)
    return model


def plain_scores(architecture, sequences, pool="response"):
    """Mean log-probabilities and pooled states of each sequence on its own, with the model's own
    eager forward in float64."""
    model = model_of(architecture, "eager").double()
    logps, pooled = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state[0]
            log_probs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        start = sequence.response_start
        logps.append(log_probs[start - 1 : -1].gather(1, ids[0, start:, None]).mean())
        pooled.append(hidden[start if pool == "response" else 0 :].mean(0))
    return torch.stack(logps), torch.stack(pooled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("implementation", "share"), [(attention.NAME, True), (attention.NAME, False), ("eager", False)]
)
def test_packed_scores_equal_separate_ones(architecture, implementation, share):
    sequences = some_sequences(count=5)
    model = bind_mpo_forward(model_of(architecture, implementation), MPOLoss())
    with torch.no_grad():
        scores = model(batch=pack_for_scoring(sequences, "response", share))
    logps, pooled = plain_scores(architecture, sequences)
    torch.testing.assert_close(scores.mean_logp.double(), logps, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(scores.pooled.double(), pooled, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_neighbour_changes_nothing(architecture):
    """Neither another document nor the other response to the same prompt."""
    sequences, others = some_sequences(), some_sequences(seed=1)
    model = bind_mpo_forward(model_of(architecture), MPOLoss())
    with torch.no_grad():
        one = model(batch=pack_for_scoring(sequences, "all", True))
        two = model(batch=pack_for_scoring([*others[:2], sequences[2], others[3]], "all", True))
        changed = TokenizedResponse(
            (*sequences[3].input_ids[:-2], 7, 8), sequences[3].response_start
        )
        three = model(batch=pack_for_scoring([*sequences[:3], changed], "all", True))
    for other in (two, three):
        torch.testing.assert_close(one.mean_logp[2], other.mean_logp[2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.pooled[2], other.pooled[2], rtol=1e-5, atol=1e-6)
    assert (one.mean_logp[0] - two.mean_logp[0]).abs() > 1e-3 and (
        one.mean_logp[3] - three.mean_logp[3]
    ).abs() > 1e-3


def mpo_batch(sequences, weights=(1.0,), pool="response", share=True):
    """One pair: sequences 0 and 1 are the target's, 2 and 3 the dominant ones."""
    generator = torch.Generator().manual_seed(3)
    return Batch(
        packed=pack(sequences, scored=[0, 1], pooled=[2, 3], pool=pool, share_prompts=share),
        constants=(torch.tensor([0.7]),),
        weights=torch.tensor(weights),
        pooled_reference=torch.randn(2, 32, generator=generator),
        pooled_weights=torch.tensor([weights[0] / 2] * 2),
    )


@pytest.mark.parametrize(
    "architecture", ["llama", "llama-tied", "mistral-sliding", "gemma2", "qwen2"]
)
@pytest.mark.parametrize("head", ["linear", "logits"])
@pytest.mark.parametrize("pool", ["response", "all"])
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_equal_plain_autograd(architecture, head, pool, share):
    sequences = some_sequences()
    options = MPOLoss(beta=1.5, retention_weight=0.3, head=head, pool=pool)
    batch = mpo_batch(sequences, pool=pool, share=share)
    model = bind_mpo_forward(model_of(architecture), options)
    output = model(batch=batch)
    output.loss.backward()

    oracle = model_of(architecture, "eager").double()
    terms = []
    for sequence in sequences:
        ids, start = torch.tensor([sequence.input_ids]), sequence.response_start
        hidden = oracle.model(ids, use_cache=False).last_hidden_state[0]
        log_probs = oracle(ids, use_cache=False).logits[0].log_softmax(-1)
        logp = log_probs[start - 1 : -1].gather(1, ids[0, start:, None]).mean()
        terms.append((logp, hidden[start if pool == "response" else 0 :].mean(0)))
    gap = terms[0][0] - terms[1][0]
    l1 = (1.5 * gap - 0.7) ** 2
    l2 = torch.stack(
        [(terms[2 + i][1] - batch.pooled_reference[i]).square().mean() for i in range(2)]
    ).mean()
    (l1 + 0.3 * l2).backward()

    torch.testing.assert_close(output.loss.double(), l1 + 0.3 * l2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.l2.double(), l2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.reward_gap[0].double(), gap, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-4, (name, error)


def test_a_filler_pair_adds_nothing_but_reaches_every_parameter():
    model = bind_mpo_forward(model_of("llama"), MPOLoss())
    output = model(batch=mpo_batch(some_sequences(), weights=(0.0,)))
    output.loss.backward()
    assert output.loss == 0 and output.l1.sum() == 0 and output.l2 == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_activation_checkpointing_changes_nothing(tmp_path, tokenizer):
    folder = save_model(tmp_path / "model", tokenizer)
    gradients = []
    for checkpointing in (False, True, "selective"):
        config = ModelConfig(
            path=str(folder), dtype="float32", activation_checkpointing=checkpointing
        )
        model = bind_mpo_forward(load_model(config), MPOLoss()).train()
        model(batch=mpo_batch(some_sequences())).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two, three in zip(*gradients, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


class Count(TorchDispatchMode):
    """Operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator] += 1
        return operator(*args, **(kwargs or {}))


def test_the_head_takes_three_products():
    """It goes through the operator that makes gradients in the forward pass, not through token
    log-probabilities, which take four."""
    model = bind_mpo_forward(model_of("llama"), MPOLoss())
    with Count() as count:
        model(batch=mpo_batch(some_sequences())).loss.backward()
    names = {operator.name() for operator in count.calls if operator.namespace == "mpo_kernels"}
    assert "mpo_kernels::linear_pair_loss" in names and not any(
        "token_logprobs" in name for name in names
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_selective_checkpointing_repeats_no_product(architecture, tmp_path, tokenizer):
    """Norms and activation functions are computed again, linear layers are not."""
    folder = save_model(tmp_path / "model", tokenizer, architecture)

    products, norms = {}, {}
    for how in (False, "selective", True):
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="float32", activation_checkpointing=how)
        )
        model = bind_mpo_forward(loaded, MPOLoss()).train()
        with Count() as count:
            model(batch=mpo_batch(some_sequences())).loss.backward()
        products[how], norms[how] = (
            count.calls[torch.ops.aten.mm.default],
            count.calls[torch.ops.aten.rsqrt.default],
        )
    assert products[False] == products["selective"] < products[True]
    assert norms[False] < norms["selective"] == norms[True]


def test_refused_models(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no Hugging Face model folder"):
        check_model(ModelConfig(path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="neither a model folder nor a hub id"):
        check_model(ModelConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is of type 'gpt2'; supported are gemma"):
        check_model(ModelConfig(path=str(tmp_path / "gpt2")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match="neither a model folder nor a hub id"):
        check_model(ModelConfig(path=str(tmp_path / "broken")))


class Living(TorchDispatchMode):
    """The linear layers' products, and whether the memory of each is still held."""

    def __init__(self):
        super().__init__()
        self._products = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if (
            operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            and out.shape[-1] != VOCAB
        ):
            self._products.append(
                (args[-2].shape[-1], out.shape[-1], StorageWeakRef(out.untyped_storage()))
            )
        return out

    def widths(self):
        """(in, out) of the products that are held, counted."""
        gc.collect()
        return collections.Counter(
            (width, made) for width, made, memory in self._products if not memory.expired()
        )


def test_selective_checkpointing_holds_each_product_that_a_gradient_needs_and_no_other(
    tmp_path, tokenizer
):
    """Between forward and backward. The way down from the wide layer is added to the residual and
    then needed by nothing, unless a norm stands behind it."""
    # q and o, k and v, gate and up of two blocks
    narrow = {(32, 32): 2 * 2, (32, 16): 2 * 2, (32, 64): 2 * 2}
    for architecture, how, expected in (
        ("llama", "selective", narrow),
        ("gemma2", "selective", {**narrow, (64, 32): 2}),
        ("llama", True, {}),
    ):
        folder = save_model(tmp_path / f"{architecture}-{how}", tokenizer, architecture)
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="float32", activation_checkpointing=how)
        )
        model = bind_mpo_forward(loaded, MPOLoss()).train()
        with Living() as living:
            loss = model(batch=mpo_batch(some_sequences())).loss
        assert living.widths() == expected, (architecture, how)
        loss.backward()
        del loss
        assert not living.widths()
