"""Weights that do not fit their model: whatever is missing, unknown, misshapen or damaged is
refused with its name, never left random."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import with_adapters
from tiny import mpo_command, native_rows, save_model, write_rows

from mpo.config import ModelConfig
from mpo.models import lora
from mpo.models.loading import check_model, load_model, load_tokenizer
from mpo.runtime.errors import UserError

QUERY = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A model, one with tied embeddings, and adapters of the first."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ("llama", "llama-tied"):
        save_model(root / architecture, tokenizer, architecture)
    (root / "adapters").mkdir()
    lora.save(
        with_adapters(load_model(ModelConfig(path=str(root / "llama"), dtype="float32"))),
        root / "adapters",
        None,
    )
    tokenizer.save_pretrained(root / "adapters")
    return root


def damaged(models, name, tmp_path, damage):
    folder = tmp_path / name
    shutil.copytree(models / name, folder)
    damage(folder)
    return folder


def tensors(change):
    """Damages the tensors of a folder's file."""

    def damage(folder):
        (file,) = folder.glob("*.safetensors")
        values = load_file(file)
        change(values)
        save_file(values, file, metadata={"format": "pt"})

    return damage


def renamed(old, new):
    def change(values):
        for name in list(values):
            if old in name:
                values[name.replace(old, new)] = values.pop(name)

    return tensors(change)


MISFITS = {
    "missing": (
        "llama",
        tensors(lambda t: t.pop(QUERY)),
        rf"1 tensor\(s\) missing from its files: {QUERY}",
    ),
    "missing_norm": (
        "llama-tied",
        tensors(lambda t: t.pop("model.norm.weight")),
        "missing from its files: model.norm.weight",
    ),
    "missing_head": (
        "llama",
        tensors(lambda t: t.pop("lm_head.weight")),
        "missing from its files: lm_head.weight",
    ),
    "unknown": (
        "llama",
        tensors(lambda t: t.update(score=torch.zeros(2))),
        "in its files, but not in the model: score",
    ),
    "shape": (
        "llama",
        tensors(lambda t: t.update({QUERY: torch.zeros(5, 32)})),
        rf"{QUERY} \(\[5, 32\] there, \[32, 32\] in the model\)",
    ),
    "another": (
        "llama",
        renamed("self_attn", "attention"),
        r"8 tensor\(s\) missing.*and 3 more.*not in the model: model.layers.0.attention",
    ),
    "two_heads": (
        "llama-tied",
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "tie_word_embeddings",
    ),
    "adapter_missing": (
        "adapters",
        tensors(lambda t: t.pop(LORA_A)),
        rf"missing from its files: {LORA_A}",
    ),
    "adapter_unknown": (
        "adapters",
        renamed("up_proj", "gate"),
        "28|in its files, but not in the model: .*mlp.gate.lora_A",
    ),
    "adapter_names": (
        "adapters",
        renamed("base_model.model.model", "base_model.model.backbone"),
        r"28 tensor\(s\) missing",
    ),
    "adapter_shape": (
        "adapters",
        tensors(lambda t: t.update({LORA_A: torch.zeros(9, 32)})),
        r"\[9, 32\] there, \[4, 32\] in the model",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused_with_their_names(models, tmp_path, case):
    """Before anything is loaded, and once more by the loading itself, which is all that a model of
    the hub goes through."""
    name, damage, message = MISFITS[case]
    config = ModelConfig(
        path=str(damaged(models, name, tmp_path, damage)), dtype="float32", attention="eager"
    )
    with pytest.raises(UserError, match=message):
        check_model(config)
    if case != "two_heads":
        with pytest.raises(UserError, match=message):
            load_model(config)


def test_what_fits_is_taken(models, tmp_path):
    """Names without the backbone's prefix, a tied head that is stored beside its embeddings,
    torch's own file."""

    def pickled(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    expected = load_file(models / "llama" / "model.safetensors")
    for place, (name, damage) in enumerate(
        [
            ("llama", lambda folder: None),
            ("llama", renamed("model.", "")),
            ("llama", pickled),
            (
                "llama-tied",
                tensors(
                    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
                ),
            ),
        ]
    ):
        config = ModelConfig(
            path=str(damaged(models, name, tmp_path / str(place), damage)), dtype="float32"
        )
        check_model(config)
        state = load_model(config).state_dict()
        assert name == "llama-tied" or all(
            torch.equal(state[key], value) for key, value in expected.items()
        )
    check_model(ModelConfig(path=str(models / "adapters")))


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "pointer": lambda file: file.write_bytes(POINTER),
    "page": lambda file: file.write_text("<html>not found</html>"),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "loop": lambda file: (file.unlink(), file.symlink_to(file)),
}
FILES = [
    ("llama", "model.safetensors"),
    ("llama", "config.json"),
    ("llama", "tokenizer.json"),
    ("adapters", "adapter_model.safetensors"),
    ("adapters", "adapter_config.json"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "file"), FILES)
def test_damaged_files_of_a_model_are_named(models, tmp_path, name, file, damage):
    folder = damaged(models, name, tmp_path, lambda folder: DAMAGES[damage](folder / file))
    config = ModelConfig(path=str(folder), dtype="float32")
    with pytest.raises(UserError) as error:
        check_model(config)
        load_tokenizer(config)
    words = str(error.value)
    assert str(folder) in words and "\n" not in words
    assert damage != "pointer" or "git lfs pull" in words
    assert damage != "empty" or f"{folder / file} is empty" in words


def config_json(**changes):
    def damage(folder):
        file = next(
            p for p in (folder / "adapter_config.json", folder / "config.json") if p.exists()
        )
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("llama", config_json(hidden_size="wide"), "hidden_size"),
        ("llama", config_json(hidden_size=64), "of another shape"),
        ("llama", config_json(num_hidden_layers=3), "missing from its files: model.layers.2"),
        ("llama", config_json(num_hidden_layers=1), "not in the model: model.layers.1"),
        ("llama", config_json(vocab_size=100), "lm_head.weight .*, model.embed_tokens.weight"),
        ("llama", config_json(num_attention_heads=0), "cannot be read|can be read"),
        (
            "llama",
            config_json(quantization_config={"quant_method": "fp8"}),
            "quantized already.*model.quantize",
        ),
        ("adapters", config_json(base_model_name_or_path=None), "names no base_model_name_or_path"),
        ("adapters", config_json(base_model_name_or_path="/nowhere"), "holds adapters of /nowhere"),
        ("adapters", config_json(target_modules=["no_such_layer"]), "no_such_layer"),
        ("adapters", config_json(peft_type="PROMPT_TUNING"), "only LoRA|cannot be read"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(models, tmp_path, name, damage, message):
    with pytest.raises(UserError, match=message):
        check_model(ModelConfig(path=str(damaged(models, name, tmp_path, damage)), dtype="float32"))


def test_adapters_of_adapters_end(models, tmp_path):
    folder = damaged(
        models,
        "adapters",
        tmp_path,
        lambda folder: config_json(base_model_name_or_path=str(folder))(folder),
    )
    with pytest.raises(UserError, match="holds adapters itself"):
        check_model(ModelConfig(path=str(folder)))


def test_adapters_name_their_model_from_any_folder(models, tmp_path, monkeypatch):
    """A run that was told of its model by a relative path leaves adapters that another folder can
    open."""
    monkeypatch.chdir(models)
    (tmp_path / "made").mkdir()
    lora.save(
        with_adapters(load_model(ModelConfig(path="llama", dtype="float32"))),
        tmp_path / "made",
        None,
    )
    monkeypatch.chdir(tmp_path)
    assert lora.base_of("made") == str(models / "llama")
    check_model(ModelConfig(path="made"))


def test_a_run_does_not_train_random_numbers(models, tmp_path):
    """Not with one tensor short, under the stage whose partitioned loading is another."""
    folder = damaged(models, "llama", tmp_path, tensors(lambda t: t.pop(QUERY)))
    rows = write_rows(tmp_path / "rows.jsonl", native_rows(1))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'out'}\nmodel: {{path: {folder}, dtype: float32}}\ndata: {{train:"
        f" [{rows}]}}\n"
    )
    done = mpo_command("train", str(recipe), "zero.stage=3")
    assert done.returncode == 2 and QUERY in done.stderr and "Traceback" not in done.stderr, (
        done.stderr[-2000:]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role",
        "{% if %}",
        "{{ messages | no_such_filter }}",
        "{% endfor %}",
    ],
)
def test_a_broken_chat_template_is_the_models_fault(models, tmp_path, template):
    folder = damaged(
        models,
        "llama",
        tmp_path,
        lambda folder: (folder / "chat_template.jinja").write_text(template),
    )
    with pytest.raises(UserError, match=rf"No tokenizer at {folder}"):
        load_tokenizer(ModelConfig(path=str(folder)))
