"""`mpo_kernels.losses` beside TRL's and Liger's own code: the same log-probabilities, or the same
hidden states, give the same loss and the same slopes.

What neither of them has (MPO, LengthDPO, DPOP, CalDPO, SimPER) is in test_losses.py, beside its
formula alone.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import drawn

from mpo_kernels import losses, token_logprobs
from mpo_kernels.losses import BCO, DPO, KTO, SFT, Scores, Sum, coefficients
from mpo_kernels.sequence_losses import linear_sequence_loss

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # TRL's constants pass through float32


def leaf_of(scores):
    """The same scores with sums that collect gradients."""
    return scores._replace(logps=scores.logps.clone().requires_grad_())


def check_same(loss, theirs, scores, *constants):
    """Of their mean over the batch, made of the sums in `scores`: the value, and its slopes."""
    values, slopes = coefficients(loss, scores, *constants)
    (their_slopes,) = torch.autograd.grad(theirs, scores.logps)
    torch.testing.assert_close(values.mean(), theirs.detach().double(), **CLOSE)
    torch.testing.assert_close(slopes / len(values), their_slopes, **CLOSE)


def trl_rows(scores):
    """What TRL makes of a batch: its answers in rows behind one prompt token each, as a mask
    (S, T) of them, and log-probabilities (S, T - 1)."""
    tokens = scores.tokens.flatten().long()
    mask = torch.arange(int(tokens.max()) + 1) < tokens[:, None] + 1
    mask[:, 0] = False
    each = (scores.logps.flatten() / tokens)[:, None].expand(mask.shape[0], mask.shape[1] - 1)
    return mask.long(), each * mask[:, 1:]


def trl_outputs(per_token):
    """What a model with TRL's fused head returns."""
    zeros = torch.zeros_like(per_token)
    return SimpleNamespace(
        log_probs=per_token,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        label_mask=zeros.bool(),
    )


def trl_trainer(**settings):
    """What TRL's methods read of their trainer, on one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda t: t,
        gather_for_metrics=lambda t: t,
        num_processes=1,
        parallelism_config=None,
    )
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "get_tp_size": lambda: 1,
        "_metrics": {"train": defaultdict(list)},
    }
    return SimpleNamespace(**{**common, **settings})


DPO_TYPES = {
    "sigmoid": (losses.DPO(0.3), 0.0),
    "hinge": (losses.Hinge(0.3), 0.0),
    "ipo": (losses.IPO(0.3), 0.0),
    "exo_pair": (losses.EXO(0.3, 0.01), 0.01),
    "nca_pair": (losses.NCA(0.3), 0.0),
    "robust": (losses.RobustDPO(0.3, 0.2), 0.2),
    "bco_pair": (losses.BCO(0.3), 0.0),
    "sppo_hard": (losses.SPPO(0.3), 0.0),
    "apo_zero": (losses.APOZero(0.3), 0.0),
    "apo_down": (losses.APODown(0.3), 0.0),
    "discopop": (losses.DiscoPOP(0.3, 0.05), 0.0),
    "sigmoid_norm": (losses.NormalisedDPO(0.3), 0.0),
}


def trl_dpo(types, weights, smoothing, scores, reference):
    """The loss of TRL's DPOTrainer, whose model is replaced by one that has these
    log-probabilities."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    mask, per_token = trl_rows(scores)
    trainer = trl_trainer(
        args=SimpleNamespace(discopop_tau=0.05),
        beta=0.3,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        loss_types=types,
        loss_weights=weights,
        label_smoothing=smoothing,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    model = lambda **_: trl_outputs(per_token)  # noqa: E731
    return module.DPOTrainer._compute_loss(trainer, model, inputs, False)


@pytest.mark.parametrize("name", DPO_TYPES)
def test_equal_to_trls_dpo_trainer(name):
    loss, smoothing = DPO_TYPES[name]
    scores, (reference,) = drawn(11, loss, groups=7)
    scores = leaf_of(scores)
    theirs = trl_dpo([name], [1.0], smoothing, scores, reference)
    check_same(loss, theirs, scores, reference)


def test_equal_to_trls_mixed_preference_optimization():
    loss = Sum((0.8, DPO(0.3)), (0.2, BCO(0.3)), (1.0, SFT()))
    scores, (reference, _) = drawn(12, loss, groups=7)
    scores = leaf_of(scores)
    theirs = trl_dpo(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0.0, scores, reference)
    check_same(loss, theirs, scores, reference, scores.tokens[0].mean().expand(7))


def trl_cpo(scores, **settings):
    """The loss of each pair, of TRL's CPOTrainer."""
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    defaults = {"beta": 0.3, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0}
    return module.CPOTrainer.cpo_loss(trl_trainer(**{**defaults, **settings}), *scores)[0]


def trl_nll(scores):
    """As its trainer adds it: per token of the chosen answers of the batch."""
    return -scores.logps[0].sum() / scores.tokens[0].sum()


# TRL's loss of a batch of scores, and ours
OF_TRLS_CPO = {
    "CPO": (
        losses.CPO(0.3, 0.7),
        lambda s: trl_cpo(s.logps, loss_type="sigmoid").mean() + 0.7 * trl_nll(s),
    ),
    "SLiC": (
        losses.SLiC(2.5, 0.2),
        lambda s: 2.5 * trl_cpo(s.logps, loss_type="hinge", beta=0.4).mean() + 0.2 * trl_nll(s),
    ),
    "SimPO": (
        losses.SimPO(0.3, 0.5),
        lambda s: trl_cpo(s.means(), loss_type="simpo").mean(),
    ),
    "AlphaPO": (
        losses.AlphaPO(0.3, 0.5, 0.25),
        lambda s: trl_cpo(s.means(), loss_type="simpo", alpha=0.25).mean(),
    ),
}


@pytest.mark.parametrize("name", OF_TRLS_CPO)
def test_equal_to_trls_cpo_trainer(name):
    loss, theirs = OF_TRLS_CPO[name]
    scores = leaf_of(drawn(13, loss, groups=7)[0])
    constants = [scores.tokens[0].mean().expand(7)] if loss.constants else []
    check_same(loss, theirs(scores), scores, *constants)


def test_cdpo_is_trls_smoothing_on_log_ratios():
    loss = losses.CDPO(0.3, 0.2)
    scores, (reference,) = drawn(14, loss, groups=7)
    scores = leaf_of(scores)
    theirs = trl_cpo(scores.logps - reference, loss_type="sigmoid", label_smoothing=0.2)
    check_same(loss, theirs.mean(), scores, reference)


def test_equal_to_trls_orpo_trainer():
    """Its likelihood is that of prompt and answer; ours is that of the answer, and is left out."""
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    scores = leaf_of(drawn(13, losses.ORPO(), groups=7)[0])
    theirs, *_ = orpo.odds_ratio_loss(trl_trainer(beta=0.3), *scores.means())
    check_same(losses.ORPO(0.3), (-scores.means()[0] - theirs).mean(), scores)


def test_equal_to_trls_sft_trainer():
    """Two micro-batches of one step, which share the number of its tokens."""
    sft = pytest.importorskip("trl.trainer.sft_trainer").SFTTrainer
    scores = leaf_of(drawn(15, SFT(), groups=7)[0])
    trainer = trl_trainer(
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=True),
        compute_loss_func=None,
        label_smoother=None,
    )
    theirs = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 7)):
        mask, per_token = trl_rows(Scores(*(each[:, part] for each in scores)))
        inputs = {"attention_mask": mask, "labels": mask}
        theirs = theirs + sft.compute_loss(
            trainer,
            lambda per_token=per_token, **_: trl_outputs(per_token),
            inputs,
            num_items_in_batch=int(scores.tokens.sum()),
        )
    check_same(SFT(), theirs, scores, scores.tokens.mean().expand(7))


@pytest.mark.parametrize("above", [2.0, -2.0], ids=["kl", "kl-clamped"])
def test_equal_to_trls_kto_trainer(above):
    """Its batch has mismatched answers too, which its model scores without gradient."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    loss = KTO(0.3, desirable_weight=1.5, undesirable_weight=0.5)
    scores, (reference, desirable, _) = drawn(16, loss, groups=7)
    scores, mismatched = leaf_of(scores), drawn(17, loss, groups=7)[0]
    mismatched_reference = mismatched.logps[0] - above * torch.linspace(0.5, 1.5, 7)
    trainer = trl_trainer(
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        loss_type="kto",
        calculate_KL=True,
    )
    trainer._compute_kl_logps = partial(module.KTOTrainer._compute_kl_logps, trainer)
    mask, per_token = trl_rows(scores)
    mismatched_mask, mismatched_per_token = trl_rows(mismatched)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(mismatched_mask),
        "KL_attention_mask": mismatched_mask,
        "KL_completion_mask": mismatched_mask,
        "label": desirable.bool(),
        "ref_logps": reference[0],
        "ref_KL_logps": mismatched_reference,
    }

    def model(input_ids, **_):
        return trl_outputs(mismatched_per_token if input_ids.any() else per_token)

    theirs = module.KTOTrainer._compute_loss(trainer, model, inputs, False)
    kl = torch.full((7,), max(0.0, above), dtype=torch.float64)
    assert 0 < desirable.sum() < 7
    check_same(loss, theirs, scores, reference, desirable, kl)


LIGERS = {
    "DPO": (DPO(0.3), ("dpo_loss", {"loss_type": "sigmoid"})),
    "Hinge": (losses.Hinge(0.3), ("dpo_loss", {"loss_type": "hinge"})),
    "EXO": (
        losses.EXO(0.3, 0.01),
        ("dpo_loss", {"loss_type": "exo_pair", "label_smoothing": 0.01}),
    ),
    "NCA": (losses.NCA(0.3), ("dpo_loss", {"loss_type": "nca_pair"})),
    "RobustDPO": (
        losses.RobustDPO(0.3, 0.2),
        ("dpo_loss", {"loss_type": "robust", "label_smoothing": 0.2}),
    ),
    "BCO": (BCO(0.3), ("dpo_loss", {"loss_type": "bco_pair"})),
    "SPPO": (losses.SPPO(0.3), ("dpo_loss", {"loss_type": "sppo_hard"})),
    "APOZero": (losses.APOZero(0.3), ("dpo_loss", {"loss_type": "apo_zero"})),
    "APODown": (losses.APODown(0.3), ("dpo_loss", {"loss_type": "apo_down"})),
    "DiscoPOP": (
        losses.DiscoPOP(0.3, 0.05),
        ("dpo_loss", {"loss_type": "discopop", "discopop_tau": 0.05}),
    ),
    "CPO": (losses.CPO(0.3, 0.7), ("cpo_loss", {"alpha": 0.7})),
    "ORPO": (losses.ORPO(0.3, per="tokens"), ("orpo_loss", {})),
    "SimPO": (
        losses.SimPO(0.3, 0.5),
        ("simpo_loss", {"gamma": 0.5, "compute_nll_loss": False, "alpha": 0.0}),
    ),
    "KTO": (KTO(0.3), ("kto_loss", {"use_ref_model": True})),
}


@pytest.mark.parametrize("name", LIGERS)
def test_equal_to_ligers_chunked_losses(name):
    """From hidden states to the gradients of states and head."""
    loss, (module, options) = LIGERS[name]
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{module}")
    names = [name for name in vars(module) if name.startswith("LigerFused") and "Base" not in name]
    kind = getattr(module, next(name for name in names if name.endswith("Loss")))
    theirs = kind(beta=0.3, compiled=False, **options)
    generator = torch.Generator().manual_seed(18)
    hidden, reference_hidden = torch.randn(2, 6, 5, 8, generator=generator)
    weight, reference_weight = torch.randn(2, 11, 8, generator=generator)
    labels = torch.randint(11, (6, 5), generator=generator)
    for row, length in enumerate((1, 4, 2, 3, 1, 2)):
        labels[row, :length] = -100
    k, tokens = loss.sequences, (labels != -100).sum(1).float()
    desirable, kl = torch.tensor([1.0, 0, 1, 1, 0, 0]), torch.tensor(0.25)
    reference = token_logprobs(reference_hidden @ reference_weight.T, labels).sum(1).view(k, -1)
    constants = {
        "reference_logps": reference,
        "mean_tokens": tokens.view(k, -1)[0].mean().expand(6 // k),
        "is_desirable": desirable,
        "kl": kl.expand(6),
    }

    def ours(hidden, weight):
        given = [constants[name] for name in loss.constants]
        return linear_sequence_loss(hidden, weight, labels, loss, *given).loss

    def of_liger(hidden, weight):
        with_reference = {"ref_input": reference_hidden, "ref_weight": reference_weight}
        if isinstance(loss, KTO):
            with_reference.update(preference_labels=desirable.bool(), kl=kl)
            return theirs(_input=hidden, lin_weight=weight, target=labels, **with_reference)[0]
        with_reference = with_reference if "reference_logps" in loss.constants else {}
        return theirs(_input=hidden, lin_weight=weight, target=labels, **with_reference)[0]

    results = []
    for function in (ours, of_liger):
        given = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*given)
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
