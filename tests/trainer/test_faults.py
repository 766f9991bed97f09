"""One table of what can be wrong before training starts, and the message that each gives: what,
where, and how to mend it."""

import json
import shutil
import socket

import pytest
import yaml
from conftest import make_tokenizer
from tiny import mpo_command, native_rows, save_model, write_rows

from mpo.config import load_config
from mpo.models import lora
from mpo.models.inputs import load_inputs
from mpo.models.loading import load_model, resolve_model
from mpo.runtime.errors import UserError
from mpo.runtime.files import write_json
from mpo.training import checkpoint_folder, export, reference
from mpo.training.engine import deepspeed_settings
from mpo.training.portable import convert
from mpo.training.run_folder import OutputFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    save_model(root / "model", make_tokenizer())
    write_rows(root / "train.jsonl", native_rows(dominants=2))
    sections = {
        "output_dir": str(root / "run"),
        "model": {"path": "model"},
        "data": {"train": ["train.jsonl"]},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    return root


def begin(folder, *overrides):
    """Everything that `mpo train` does before it loads weights."""
    config = load_config(folder / "run.yaml", list(overrides))
    deepspeed_settings(config)
    inputs = load_inputs(config, lambda line: None)
    return OutputFolder(folder / "run").open(
        config, reference.rows_digest(inputs.examples.train), {}, 1
    )


def rows_file(folder, change, **options):
    rows = native_rows(dominants=2)
    change(rows[1])
    return [f"data.train=[{write_rows(folder / 'changed.jsonl', rows).name}]"]


def put(side, key, value):
    def change(row):
        row[side][key] = value

    return change


CONFIGURATION = [
    (["loss.betta=1"], "loss.betta: unknown field; did you mean 'beta'"),
    (["los.beta=1"], "los: unknown field; did you mean 'loss'"),
    (["loss.beta=0"], r"loss.beta: .*greater than 0 \(given: 0\)"),
    (["loss.beta=wide"], "loss.beta: .*valid number"),
    (["loss.retention_weight=-1"], "loss.retention_weight: .*greater than or equal to 0"),
    (["loss.head=quadratic"], "loss.head: .*'linear' or 'logits'"),
    (["loss.pool=last"], "loss.pool: .*'response' or 'all'"),
    (["loss.chunk_bytes=0"], "loss.chunk_bytes: .*greater than or equal to 1"),
    (["zero.stage=4"], "zero.stage: .*0, 1, 2 or 3"),
    (
        ["zero.stage=0", "model.dtype=bfloat16"],
        "zero.stage=0 with model.dtype=bfloat16 has no fp32 copy.*Set zero.stage=1",
    ),
    (
        ["zero.deepspeed={gradient_clipping: 5}"],
        "gradient_clipping=5 contradicts 1.0.*set the field it belongs to",
    ),
    (["zero.deepspeed={bf16: {enabled: false}}"], "bf16.enabled=False contradicts True"),
    (
        ["train.pairs_per_step=2", "train.pairs_per_micro_batch=3"],
        r"pairs_per_micro_batch \(3\) is larger than .*lower it or raise",
    ),
    (["train.schedule=staircase"], "train.schedule: .*'cosine', 'linear' or 'constant'"),
    (["train.warmup_ratio=1.5"], "train.warmup_ratio: .*less than or equal to 1"),
    (["train.epochs=0"], "train.epochs: .*greater than 0"),
    (["train.learning_rate=-1e-6"], "train.learning_rate: .*greater than 0"),
    (
        ["train.tokens_per_micro_batch=0"],
        "train.tokens_per_micro_batch: .*greater than or equal to 1",
    ),
    (["model.dtype=float16"], "model.dtype: .*'bfloat16' or 'float32'"),
    (["model.quantize=nf4"], "model.quantize=nf4 needs model.lora"),
    (["reference.mode=live"], "reference.mode=live needs model.lora.*Set model.lora.rank=16"),
    (["model.lora.rank=0"], "model.lora.rank: .*greater than or equal to 1"),
    (["checkpoint.keep=0"], "checkpoint.keep: .*greater than or equal to 1"),
    (["data.weights=[1,2]"], "2 numbers for 1 sources"),
    (["output_dir="], "output_dir: .*"),
    (["loss.beta"], "'loss.beta' is not of the form section.field=value"),
    (["track.comet=true"], "track.comet=true needs the package comet_ml: pip install comet-ml"),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    CONFIGURATION,
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_configuration(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        begin(folder, *overrides)


ROWS = [
    (lambda row: row.pop("language"), "changed.jsonl:2: missing_field: has no 'language'"),
    (lambda row: row.update(language=" "), "empty_language: .*a code such as sw"),
    (lambda row: row.pop("dominant"), "missing_field: has no 'dominant'"),
    (put("target", "chosen", 7), "wrong_type: target.chosen"),
    (put("target", "chosen", "  "), "empty_chosen: the target chosen answer is empty"),
    (put("dominant", "rejected", ""), "empty_rejected: the dominant rejected answer is empty"),
    (put("target", "prompt", []), "empty_prompt: the target prompt is empty"),
    (
        put("target", "prompt", [{"role": "robot", "content": "?"}]),
        "wrong_type: target.prompt.0.role",
    ),
    (
        put("target", "prompt", [{"role": "assistant", "content": "?"}]),
        "prompt_not_ending_with_user",
    ),
    (put("target", "rejected", "zh no, rather not ."), "chosen_equals_rejected"),
    (
        put("target", "prompt", [{"role": "user", "content": "long " * 300}]),
        "response_truncated_away: .*raise it or shorten",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), ROWS, ids=[message.split(":")[0] for _, message in ROWS]
)
def test_rows(folder, change, message):
    with pytest.raises(UserError, match=message):
        begin(folder, *rows_file(folder, change))


FILES = [
    ("gone.jsonl", None, "No data file at .*gone.jsonl. Check data.train"),
    ("empty.jsonl", "\n", "empty.jsonl is empty"),
    ("broken.jsonl", '{"language": "sw"\n', "broken.jsonl, line 1, column 18: no valid JSON"),
    ("broken.json", "[{]", "broken.json, line 1, column 3: no valid JSON"),
    ("numbers.jsonl", "7\n", "not_an_object: holds int"),
    ("latin.jsonl", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
    ("none.json", "[]", "No usable row is left"),
    ("bad.parquet", "no", "no readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
def test_files(folder, name, content, message):
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        begin(folder, f"data.train=[{name}]")


def model_folder(folder, name, change):
    copy = folder / name
    if not copy.exists():
        shutil.copytree(folder / "model", copy)
        change(copy)
    return [f"model.path={copy}"]


def edit(file, **changes):
    def change(copy):
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, **changes}))

    return change


MODELS = [
    ("nowhere", None, "neither a model folder nor a hub id"),
    (
        "no-config",
        lambda copy: (copy / "config.json").unlink(),
        "it has no config.json. Point model.path at",
    ),
    ("bert", edit("config.json", model_type="bert"), "is of type 'bert'; supported are gemma"),
    (
        "no-tokenizer",
        lambda copy: [(copy / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "No tokenizer at|no chat template",
    ),
    (
        "no-template",
        lambda copy: (copy / "chat_template.jinja").unlink(),
        "has no chat template. Use the instruction-tuned model",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), MODELS, ids=[name for name, *_ in MODELS])
def test_models(folder, name, change, message):
    overrides = ["model.path=nowhere"] if change is None else model_folder(folder, name, change)
    with pytest.raises(UserError, match=message):
        begin(folder, *overrides)


def test_weights_and_adapters(folder, monkeypatch):
    model = load_config(folder / "run.yaml", ["model.dtype=float32"]).model
    lost = model_folder(folder, "no-weights", lambda copy: (copy / "model.safetensors").unlink())
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(model.model_copy(update={"path": lost[0].split("=")[1]}))
    wrong = load_config(folder / "run.yaml", ["model.lora.target_modules=[query]"]).model
    with pytest.raises(UserError, match=r"linear modules are .*q_proj"):
        lora.attach(load_model(model), wrong.lora)
    quantized = load_config(folder / "run.yaml", ["model.lora.rank=2", "model.quantize=nf4"]).model
    monkeypatch.setattr("mpo.models.quantized.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(UserError, match=r"needs bitsandbytes .* or newer: pip install"):
        load_model(quantized)
    with pytest.raises(UserError, match="pypi:SmolLM2-135M-Instruct"):
        resolve_model("pypi:unknown", lambda line: None)


def test_output_folders(folder, tmp_path):
    config = load_config(folder / "run.yaml")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(
        UserError, match=r"is not empty and holds no MPO run. Choose another output_dir"
    ):
        OutputFolder(tmp_path).open(config, "rows", {}, 1)
    out = OutputFolder(tmp_path / "run")
    assert not out.open(config, "rows", {}, 1) and out.open(config, "rows", {}, 1)
    with pytest.raises(
        UserError, match="holds another run: the training or the measured rows differ"
    ):
        out.open(config, "other rows", {}, 1)
    with pytest.raises(UserError, match=r"holds another run: loss.beta is 1.0 there and 2.0 here"):
        out.open(load_config(folder / "run.yaml", ["loss.beta=2"]), "rows", {}, 1)
    with pytest.raises(
        UserError, match=r"Another process \(pid \d+ on .*\) is at work in output_dir"
    ):
        OutputFolder(tmp_path / "run").open(config, "rows", {}, 1)
    out.config.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        out.open(config, "rows", {}, 1)


def test_ranks_that_cannot_meet():
    """A port that someone else has, as ranks keep it whose launcher was killed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
        }
        result = mpo_command("precompute", "demo", **address)
    assert (
        result.returncode == 2
        and "The ranks cannot meet at 127.0.0.1" in result.stderr
        and "--master_port" in result.stderr
    )


def test_checkpoints_and_exports(folder, tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        convert(tmp_path, print)
    with pytest.raises(UserError, match="holds no MPO run"):
        export.export_checkpoint(tmp_path, None, tmp_path / "x", False, print)
    config = load_config(folder / "run.yaml")
    write_json(tmp_path / "config.json", {"config": config.model_dump(mode="json")})
    with pytest.raises(UserError, match="there are no adapters to merge"):
        export.export_checkpoint(tmp_path, None, tmp_path / "x", True, print)
    with pytest.raises(UserError, match=r"holds no whole checkpoint. Set checkpoint.every"):
        export.export_checkpoint(tmp_path, None, tmp_path / "x", False, print)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"Every checkpoint in .* is damaged: step-00000004 \(state.json is missing\)",
    ):
        checkpoint_folder.newest(tmp_path / "checkpoints")


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
def test_an_export_wants_every_trained_weight_and_no_other(folder, tmp_path, monkeypatch, adapters):
    if adapters:
        pytest.importorskip("peft")
    options = ["model.dtype=float32", *(["model.lora.rank=2"] if adapters else [])]
    config = load_config(folder / "run.yaml", options)
    write_json(tmp_path / "config.json", {"config": config.model_dump(mode="json")})
    monkeypatch.setattr(
        checkpoint_folder,
        "newest",
        lambda *_: checkpoint_folder.Checkpoint(tmp_path / "step-00000004", 4, 1, 2),
    )
    trained = {
        name: p.detach()
        for name, p in load_model(config.model).named_parameters()
        if p.requires_grad
    }
    for name in (min(trained), max(trained)):
        for state in (
            {key: value for key, value in trained.items() if key != name},
            {**trained, "other.weight": trained[name]},
        ):
            monkeypatch.setattr(export, "_weights", lambda found, state=state: state)
            with pytest.raises(
                UserError, match=f"step-00000004 does not fit the model .*(other.weight|{name})"
            ):
                export.export_checkpoint(tmp_path, None, tmp_path / "out", False, print)
            assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export, "_weights", lambda found: trained)
    export.export_checkpoint(tmp_path, None, tmp_path / "out", False, print)
    assert list((tmp_path / "out").glob("*.safetensors"))
