"""LoRA and QLoRA: what adapters compute, what their folders hold, quantized weights, and whole runs
on a CPU."""

import json
import shutil

import peft
import pytest
import torch
from test_train import losses, project, run  # noqa: F401  (project is a fixture)
from tiny import mpo_command, save_model
from transformers import AutoModelForCausalLM

from mpo.config import LoraConfig, ModelConfig, load_config
from mpo.models import lora, quantized
from mpo.models.loading import check_model, load_model
from mpo.runtime.errors import UserError
from mpo.training.export import export_checkpoint
from mpo.training.reference import identity, model_identity

KINDS = ["nf4", "int8"]
LAYER = "model.layers.0.self_attn.v_proj"


def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="pip install 'mpo-kernels[qlora]'")


def with_adapters(model, **options):
    """The model with adapters that do something; fresh ones do not."""
    lora.attach(model, LoraConfig(rank=4, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def logits(model):
    tokens = torch.arange(24, device=model.device)[None] * 7 % 200
    with torch.no_grad():
        return model(tokens).logits.cpu()


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2"])
def folder(request, tmp_path_factory, tokenizer):
    """A model folder; hidden size 32, so that no row of weights is a multiple of nf4's block of
    64."""
    return save_model(tmp_path_factory.mktemp(request.param), tokenizer, request.param)


def test_adapters_off_is_the_model_before(folder):
    model = load_model(ModelConfig(path=str(folder), dtype="float32", attention="eager"))
    before = logits(model)
    with_adapters(model)
    assert (logits(model) - before).abs().max() > 0.1
    with lora.adapters_off(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert (
        trained
        and all("lora_" in name for name in trained)
        and not any("lm_head" in name or "embed" in name for name in trained)
    )
    # what a checkpoint holds, a tied head not among it
    assert sorted(model.state_dict()) == sorted(trained)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (2, 1), (1, 3)])
def test_an_update_is_scaled_by_alpha_over_rank(folder, tmp_path, rank, alpha):
    """x A^T B^T alpha / rank is added to what the layer gives, in the model and in the folder that
    is opened again."""
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager")
    model = load_model(
        config.model_copy(
            update={"lora": LoraConfig(rank=rank, alpha=alpha, target_modules=("v_proj",))}
        )
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora.save(model, tmp_path, None)
    plain = load_model(config).get_submodule(LAYER)
    layer = model.get_submodule(LAYER).eval()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape == (rank, 32) and up.shape == (16, rank)
    x = torch.randn(5, 32)
    expected = plain(x) + x @ down.T @ up.T * (alpha / rank)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    whole = load_model(config.model_copy(update={"path": str(tmp_path)}))
    torch.testing.assert_close(whole.get_submodule(LAYER)(x), expected, rtol=1e-5, atol=1e-4)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}


def test_dropout_of_adapters_is_the_configured_one(folder):
    model = load_model(
        ModelConfig(path=str(folder), dtype="float32", lora=LoraConfig(rank=4, dropout=0.25))
    )
    rates = {
        module.p
        for name, module in model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    }
    assert rates == {0.25}


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "down_proj")])
def test_an_adapter_folder_opens_with_peft_and_merged_is_the_same(folder, tmp_path, modules):
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager")
    trained = with_adapters(load_model(config), target_modules=modules)
    lora.save(trained, tmp_path, None)
    assert lora.is_adapter(str(tmp_path)) and lora.base_of(str(tmp_path)) == str(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = logits(trained)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base, tmp_path).eval()),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    whole = load_model(config.model_copy(update={"path": str(tmp_path)}))
    assert not any("lora" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", ["[lm_head]", "[q_proj,lm_head]", "[model.embed_tokens]"])
def test_adapters_on_the_head_are_refused_at_once(names):
    with pytest.raises(UserError, match=r"model\.lora.*head and embeddings get no adapters"):
        load_config("demo", [f"model.lora.target_modules={names}"])
    assert load_config("demo", ["model.lora.target_modules=[q_proj,o_proj]"]).model.lora is not None


def test_unknown_modules_are_refused_with_the_known_ones(folder):
    with pytest.raises(UserError, match=r"query_key_value.*linear modules are .*q_proj"):
        load_model(
            ModelConfig(
                path=str(folder),
                dtype="float32",
                lora=LoraConfig(target_modules=("query_key_value",)),
            )
        )


def test_new_adapters_on_top_of_adapters_are_refused(folder, tmp_path):
    lora.save(
        with_adapters(load_model(ModelConfig(path=str(folder), dtype="float32"))), tmp_path, None
    )
    with pytest.raises(UserError, match=r"holds adapters.*--merge"):
        load_model(ModelConfig(path=str(tmp_path), lora=LoraConfig()))


def test_without_bitsandbytes_quantization_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda oldest: False)
    with pytest.raises(UserError, match=r"needs bitsandbytes .*pip install 'bitsandbytes>="):
        check_model(ModelConfig(path="/nowhere", quantize="nf4", lora=LoraConfig()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers_compute_with_the_numbers_they_hold(folder, kind, dtype):
    """Forward and gradient; the same in training and evaluation; each row by itself, whatever is
    beside it."""
    needs_bitsandbytes()
    plain = load_model(ModelConfig(path=str(folder), dtype=dtype))
    model = load_model(
        ModelConfig(path=str(folder), dtype=dtype, quantize=kind, lora=LoraConfig(rank=4))
    )
    assert quantized.kind_of(model) == kind and quantized.kind_of(plain) is None
    assert (
        model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (
        plain.lm_head.weight is plain.model.embed_tokens.weight
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, dtype)}
    layers = quantized._layers(model)
    assert len(layers) == 14  # seven linear modules in each of two blocks
    name, layer = layers[-1]
    weight = quantized._weight(layer, torch.float32)
    original = plain.get_submodule(name.replace(".base_layer", "")).weight.to(weight)
    assert 0 < (weight - original).norm() < {"nf4": 0.15, "int8": 0.015}[kind] * original.norm()

    torch.manual_seed(0)
    x = 4 * torch.randn(5, layer.in_features, dtype=getattr(torch, dtype), device=weight.device)
    x[2] *= 10  # int8's own outliers
    x.requires_grad_()
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-1}
    for mode in (True, False):
        layer.train(mode)
        out = layer(x)
        expected = x.float() @ weight.T + (0 if layer.bias is None else layer.bias.float())
        torch.testing.assert_close(out.float(), expected, **tolerance)
        torch.testing.assert_close(layer(x[:1].detach()).float(), out[:1].float(), **tolerance)
        upstream = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        torch.testing.assert_close(gradient.float(), upstream.float() @ weight, **tolerance)
        with torch.no_grad():  # where bitsandbytes would repack the weights on some CPUs
            layer(x)
    assert all("lora_" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_what_was_trained_on_quantized_weights(folder, tmp_path, kind):
    needs_bitsandbytes()
    config = ModelConfig(path=str(folder), dtype="float32", attention="eager", quantize=kind)
    trained = with_adapters(load_model(config))
    lora.save(trained, tmp_path, None)
    expected = logits(trained)
    beside = load_model(config.model_copy(update={"path": str(tmp_path)}))
    assert quantized.kind_of(beside) == kind
    torch.testing.assert_close(logits(beside), expected, rtol=0, atol=0)
    whole = lora.merged(load_model(config), str(tmp_path))
    assert quantized.kind_of(whole) is None
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)
    # merged into the unquantized weights
    other = load_model(config.model_copy(update={"path": str(tmp_path), "quantize": None}))
    assert (logits(other) - expected).abs().max() > 1e-2
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_a_reference_store_knows_how_its_weights_were_quantized(folder, tokenizer):
    stores = [
        identity(
            model_identity(
                ModelConfig(path=str(folder), dtype="float32", quantize=kind), tokenizer
            ),
            [],
            "response",
        )
        for kind in (None, *KINDS)
    ]
    assert [store["quantized"] for store in stores] == [None, *KINDS]
    assert all(
        {key for key in store if store[key] != stores[0][key]} == {"quantized"}
        for store in stores[1:]
    )


OPTIONS = ["model.lora.rank=4", "train.learning_rate=3e-3", "train.epochs=4", "checkpoint.every=4"]
PARTITION_ALL = "zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"


def gap_after(out):
    return json.loads((out / "result.json").read_text())["all"]["target_gap"]["after"]


def measured(project, *arguments):  # noqa: F811
    process = mpo_command("gaps", str(project / "run.yaml"), "--json", *arguments)
    assert process.returncode == 0, process.stderr[-2000:]
    return [rows["all"]["target_gap"] for rows in json.loads(process.stdout)["models"].values()]


@pytest.fixture(scope="module")
def nf4(project):  # noqa: F811
    needs_bitsandbytes()
    return run(project, "nf4", *OPTIONS, "model.quantize=nf4", "zero.stage=2")[0]


def test_nf4_trains_and_its_checkpoints_hold_what_trains(nf4):
    result = json.loads((nf4 / "result.json").read_text())
    assert result["all"]["distance"]["after"] < result["all"]["distance"]["before"]
    assert sorted(path.name for path in (nf4 / "checkpoints").glob("step-*")) == [
        "step-00000008",
        "step-00000011",
    ]
    saved = torch.load(
        nf4 / "checkpoints" / "step-00000011" / "mp_rank_00_model_states.pt",
        map_location="cpu",
        weights_only=False,
    )
    assert saved["module"] and all("lora_" in name for name in saved["module"])


def test_nf4_goes_on_from_a_checkpoint_bit_for_bit(project, nf4):  # noqa: F811
    """As after a kill between the last two checkpoints."""
    kept = project / "nf4-whole"
    shutil.copytree(nf4, kept)
    shutil.rmtree(nf4 / "checkpoints" / "step-00000011")
    shutil.rmtree(nf4 / "model")
    (nf4 / "result.json").unlink()
    _, process = run(project, "nf4", *OPTIONS, "model.quantize=nf4", "zero.stage=2")
    assert "8 of 11 steps done" in process.stdout
    name = "model/adapter_model.safetensors"
    assert (nf4 / name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        ("live-z3x2", 2, ["reference.mode=live", "zero.stage=3", PARTITION_ALL]),
        pytest.param("stored-z2x2", 2, ["zero.stage=2"], marks=pytest.mark.slow),
        pytest.param("live-z1", 1, ["reference.mode=live", "zero.stage=1"], marks=pytest.mark.slow),
        pytest.param(
            "recomputed-z0",
            1,
            ["zero.stage=0", "model.activation_checkpointing=true"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nf4_is_the_same_however_the_work_is_split(project, nf4, name, ranks, overrides):  # noqa: F811
    out, _ = run(project, f"nf4-{name}", *OPTIONS, "model.quantize=nf4", *overrides, ranks=ranks)
    torch.testing.assert_close(losses(out), losses(nf4), rtol=2e-2, atol=1e-4)
    assert (out / "reference").exists() == ("reference.mode=live" not in overrides)


def test_adapters_of_nf4_merged_have_the_gaps_that_the_run_reported(project, nf4):  # noqa: F811
    merged = project / "nf4-merged"
    export_checkpoint(nf4, None, merged, merge=True, log=print)
    (gap,) = measured(project, "--model", str(merged))
    assert gap == pytest.approx(gap_after(nf4), abs=1e-5)


@pytest.mark.slow
def test_adapters_beside_nf4_have_the_gaps_that_the_run_reported(project, nf4):  # noqa: F811
    (gap,) = measured(
        project, "model.quantize=nf4", "model.lora.rank=4", "--model", str(nf4 / "model")
    )
    assert gap == pytest.approx(gap_after(nf4), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "dtype", "overrides"),
    [
        (1, "float32", ["zero.stage=2"]),
        (2, "float32", ["zero.stage=3", PARTITION_ALL]),
        (2, "bfloat16", ["zero.stage=2"]),
    ],
)
def test_int8_trains_and_its_merged_model_has_the_same_gaps(project, ranks, dtype, overrides):  # noqa: F811
    needs_bitsandbytes()
    dtype_option = f"model.dtype={dtype}"
    options = [
        *OPTIONS,
        "model.quantize=int8",
        "model.lora.export=merged",
        dtype_option,
        *overrides,
    ]
    out, _ = run(project, f"int8-{dtype}-{ranks}", *options, ranks=ranks)
    result = json.loads((out / "result.json").read_text())
    assert result["all"]["distance"]["after"] < result["all"]["distance"]["before"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    (gap,) = measured(project, dtype_option, "--model", str(out / "model"))
    # A weight in bfloat16 is off by 2^-9 of itself at most; in float32 only the order of sums
    # differs.
    assert gap == pytest.approx(gap_after(out), abs=1e-5 if dtype == "float32" else 5e-3)
