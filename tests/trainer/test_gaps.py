"""`mpo gaps`: each model reads the rows with its own tokenizer and template, or is refused with
what differs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TEMPLATES
from safetensors.torch import load_file, save_file
from tiny import native_rows, save_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo.config import LoraConfig, ModelConfig, load_config
from mpo.data.rows import Message
from mpo.data_build.answers import Answerer
from mpo.data_build.config import AnswersConfig
from mpo.evaluation.comparison import compare_models
from mpo.models import lora
from mpo.models.inputs import load_inputs
from mpo.models.loading import load_model, load_tokenizer
from mpo.models.scoring import Scorer
from mpo.runtime.errors import UserError
from mpo.runtime.files import write_json
from mpo.runtime.progress import Progress
from mpo.training import checkpoint_folder, export
from mpo.training.reference import model_identity

VOCABULARIES = ("model.embed_tokens.weight", "lm_head.weight")


def permuted(folder, to, rows):
    """The same function of text: token ids in another order, and the weights of embeddings and head
    with them (`rows`: both or one)."""
    shutil.copytree(folder, to)
    file = to / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = {
        **tokenizer["model"]["vocab"],
        **{token["content"]: token["id"] for token in tokenizer["added_tokens"]},
    }
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    tokenizer["model"]["vocab"] = {token: int(order[place]) for token, place in ids.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = int(order[token["id"]])
    file.write_text(json.dumps(tokenizer))
    values = load_file(to / "model.safetensors")
    save_file(
        {k: v[order.argsort()] if k in rows else v for k, v in values.items()},
        to / "model.safetensors",
        {"format": "pt"},
    )
    return to


def smaller(folder, to, tokens=True):
    """A model of 256 tokens, all of them bytes, with a template that needs no other; its tokenizer
    may still have them (`tokens` false)."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "vocab_size": 256}))
    values = load_file(to / "model.safetensors")
    save_file(
        {k: v[:256] if k in VOCABULARIES else v for k, v in values.items()},
        to / "model.safetensors",
        {"format": "pt"},
    )
    if tokens:
        for name, lost in (
            ("tokenizer.json", {"added_tokens": []}),
            ("tokenizer_config.json", {"extra_special_tokens": [], "eos_token": None}),
        ):
            (to / name).write_text(json.dumps({**json.loads((to / name).read_text()), **lost}))
        (to / "chat_template.jinja").write_text(TEMPLATES["no_end"])
    return to


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Models whose tokens or templates differ, and a configuration of the first."""
    root = tmp_path_factory.mktemp("gaps")
    rows = native_rows(dominants=2)
    rows[-1]["target"]["prompt"][0]["content"] *= 3
    write_rows(root / "rows.jsonl", rows)
    a = save_model(root / "a", tokenizer)
    permuted(a, root / "permuted", VOCABULARIES)
    permuted(
        save_model(root / "tied", tokenizer, "llama-tied"), root / "tied-permuted", VOCABULARIES[:1]
    )
    smaller(a, root / "smaller")
    shutil.copytree(a, root / "template")
    (root / "template" / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    adapted = load_model(ModelConfig(path=str(a), dtype="float32", lora=LoraConfig(rank=2)))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (root / "adapter").mkdir()
    lora.save(adapted, root / "adapter", None)
    shutil.copytree(root / "adapter", root / "adapter-with-tokenizer")
    tokenizer.save_pretrained(root / "adapter-with-tokenizer")
    shutil.copytree(root / "adapter", root / "adapter-of-other-tokens")
    load_tokenizer(ModelConfig(path=str(root / "permuted"))).save_pretrained(
        root / "adapter-of-other-tokens"
    )
    for name, lost in (
        ("no-tokenizer", "tokenizer*.json"),
        ("no-template", "chat_template.jinja"),
        ("no-vocabulary", "tokenizer.json"),
    ):
        shutil.copytree(a, root / name)
        for path in (root / name).glob(lost):
            path.unlink()
    settings = json.loads((a / "tokenizer_config.json").read_text())
    (root / "no-vocabulary" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"})
    )
    smaller(a, root / "more-tokens", tokens=False)
    sections = {
        "output_dir": str(root / "run"),
        "model": {"path": "a", "dtype": "float32"},
        "data": {"train": ["rows.jsonl"]},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    return root


def compare(folders, monkeypatch, *names, overrides=()):
    """`mpo gaps` in this process, which is the only rank."""
    monkeypatch.setattr("mpo.evaluation.comparison.start", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        "mpo.models.scoring.dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
    )
    monkeypatch.setattr("mpo.runtime.ranks.dist.get_world_size", lambda: 1)
    config = load_config(folders / "run.yaml", list(overrides))
    paths = [str(folders / name) for name in names]
    table = compare_models(
        config, load_inputs(config, lambda line: None), paths, Progress(enabled=False)
    )
    return [table.as_dict()["models"][path] for path in paths]


def plain_gap(folder, pairs, tokens=None):
    """Mean reward gap of the pairs: the model's own tokenizer, template and forward, one
    conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tokens or folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()

    def mean_logp(pair, kind):
        prompt = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        turn = {"role": "assistant", "content": pair[kind]}
        ids = tokenizer.apply_chat_template([*pair["prompt"], turn], return_dict=True)["input_ids"]
        while tokenizer.all_special_ids and ids[-1] not in tokenizer.all_special_ids:
            ids = ids[:-1]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))) / (
            len(ids) - len(prompt)
        )

    return sum(mean_logp(pair, "chosen") - mean_logp(pair, "rejected") for pair in pairs) / len(
        pairs
    )


def rows_of(folders):
    return [json.loads(line) for line in (folders / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("one", "other"), [("a", "permuted"), ("permuted", "a"), ("tied", "tied-permuted")]
)
def test_the_same_function_of_text_has_the_same_gaps(folders, monkeypatch, one, other):
    first, second = compare(folders, monkeypatch, one, other)
    expected = plain_gap(folders / one, [row["target"] for row in rows_of(folders)])
    assert abs(expected) > 1e-3 and first["all"]["target_gap"] == pytest.approx(expected, abs=1e-5)
    for language, row in first.items():
        for key, value in row.items():
            assert second[language][key] == pytest.approx(value, abs=1e-5), (language, key)


@pytest.mark.parametrize("name", ["smaller", "template", "permuted"])
def test_each_model_reads_its_own_tokens_and_template(folders, monkeypatch, name):
    """Also one with a smaller vocabulary; what another's tokens would give is far away."""
    _, measured = compare(folders, monkeypatch, "a", name)
    for side in ("target", "dominant"):
        pairs = [row[side] for row in rows_of(folders)]
        assert measured["all"][f"{side}_gap"] == pytest.approx(
            plain_gap(folders / name, pairs), abs=1e-5
        )
    if name != "smaller":
        assert (
            abs(
                plain_gap(folders / name, pairs)
                - plain_gap(folders / name, pairs, tokens=folders / "a")
            )
            > 1e-3
        )


def test_adapters_read_the_tokens_of_their_base(folders, monkeypatch):
    base, bare, with_tokenizer = compare(
        folders, monkeypatch, "a", "adapter", "adapter-with-tokenizer"
    )
    assert bare == with_tokenizer and bare["all"]["target_gap"] != base["all"]["target_gap"]


REFUSED = [
    ("no-tokenizer", r"No tokenizer at .*no-tokenizer"),
    ("no-template", r"no-template cannot read the measured rows.*no chat template"),
    ("no-vocabulary", r"tokenizer at .*no-vocabulary knows no text: its vocabulary is missing"),
    (
        "more-tokens",
        (
            r"tokenizer of .*more-tokens gives a token the id \d+ in .*, but the model has \d+"
            r" embeddings"
        ),
    ),
    (
        "adapter-of-other-tokens",
        (
            r"tokenizer of the adapters .* is not that of their base model .*: 2\d\d tokens have"
            r" other ids"
        ),
    ),
]


@pytest.mark.parametrize(("name", "message"), REFUSED, ids=[name for name, _ in REFUSED])
@pytest.mark.parametrize("as_own", [False, True])
def test_tokens_of_another_model_are_refused_before_weights_are_loaded(
    folders, monkeypatch, name, message, as_own
):
    """Beside another model, and as the configuration's own, which training reads."""
    if as_own and name.startswith("adapter"):
        message = "holds adapters. Make a whole model of them first"

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mpo.evaluation.comparison.load_model", load)
    with pytest.raises(
        UserError,
        match=message.replace(" cannot read the measured rows", "") if as_own else message,
    ):
        compare(
            folders,
            monkeypatch,
            "a",
            *([] if as_own else [name]),
            overrides=[f"model.path={folders / name}"] if as_own else [],
        )


def test_every_model_reads_the_date_of_the_run(folders, tmp_path, monkeypatch):
    """Not today's: the run that is measured again began on another day."""
    shutil.copytree(folders / "a", tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %B %Y') }}" + TEMPLATES["chatml"]
    )
    write_json(tmp_path / "run" / "config.json", {"date": "2001-02-03T04:05:06"})
    seen, measure = [], Scorer.measure
    monkeypatch.setattr(
        Scorer,
        "measure",
        lambda scorer, examples, *advance: (
            seen.append(examples) or measure(scorer, examples, *advance)
        ),
    )
    compare(
        folders, monkeypatch, "a", tmp_path / "dated", overrides=[f"output_dir={tmp_path / 'run'}"]
    )
    texts = [
        load_tokenizer(ModelConfig(path=str(folders / "a"))).decode(
            examples[0].target.chosen.input_ids
        )
        for examples in seen
    ]
    assert "2001" not in texts[0] and texts[1] == "03 February 2001" + texts[0]


def test_a_model_that_answers_prompts_has_its_own_tokens_too(folders):
    prompt = (Message(role="user", content="question"),)
    options = {"dtype": "float32", "max_new_tokens": 2}
    (answered,) = Answerer(AnswersConfig(path=str(folders / "permuted"), **options), print).answer(
        [prompt]
    )
    assert answered[0][0] == prompt
    with pytest.raises(
        UserError,
        match=r"more-tokens gives a token the id \d+ in a prompt, but the model has 256 embeddings",
    ):
        list(
            Answerer(AnswersConfig(path=str(folders / "more-tokens"), **options), print).answer(
                [prompt]
            )
        )


def test_rows_that_one_model_cannot_read_are_measured_of_none(folders, monkeypatch):
    """A row whose answer does not fit the longer tokens of one template is left out for both, or
    refused with the model's name."""
    config = load_config(folders / "run.yaml")
    rows = [e.row for e in load_inputs(config, lambda line: None).examples.measured]
    long = max(rows, key=lambda row: len(row.target.prompt[-1].content))
    lengths = [
        max(s.response_start for s in e.sequences())
        for name in ("a", "template")
        for e in load_inputs(
            load_config(folders / "run.yaml", [f"model.path={folders / name}"]), print
        ).examples.measured
        if e.source == long.source
    ]
    assert lengths[0] != lengths[1]
    limit = f"data.max_length={max(lengths)}"
    with pytest.raises(
        UserError, match=r"template cannot read the measured rows.*response_truncated_away"
    ):
        compare(folders, monkeypatch, "a", "template", overrides=[limit])
    one, other = compare(
        folders, monkeypatch, "a", "template", overrides=[limit, "data.on_bad_row=drop"]
    )
    assert one["all"]["n"] == other["all"]["n"] < len(rows)


def test_revision_and_trusted_code_are_for_the_configured_model_alone(folders, monkeypatch):
    seen = []
    monkeypatch.setattr("mpo.evaluation.comparison.check_model", seen.append)
    monkeypatch.setattr("mpo.models.inputs.check_model", lambda config: None)
    options = ["model.revision=abc", "model.trust_remote_code=true"]
    compare(folders, monkeypatch, "a", "permuted", "adapter", overrides=options)
    assert [(c.revision, c.trust_remote_code) for c in seen] == [
        ("abc", True),
        (None, False),
        ("abc", True),
    ]


EXPORTED = [
    ([], "tied-permuted", "vocabulary"),
    ([], "template", "chat template"),
    (["model.lora.rank=2"], "template", "chat template"),
    (["model.lora.rank=2"], "permuted", "weights and vocabulary"),
]


@pytest.mark.parametrize(("options", "name", "changed"), EXPORTED)
def test_a_checkpoint_is_exported_with_the_tokens_it_was_trained_on(
    folders, tmp_path, monkeypatch, options, name, changed
):
    """The model's folder has another tokenizer or template by now: the trained weights are not
    given to it."""
    config = load_config(folders / "run.yaml", options)
    was = "tied" if name == "tied-permuted" else "a"
    model = config.model.model_copy(update={"path": str(folders / was)})
    noted = model_identity(model, load_tokenizer(model))
    now = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(folders / name)})}
    )
    write_json(
        tmp_path / "run" / "config.json",
        {"config": now.model_dump(mode="json"), "rows": "", "model": noted},
    )
    monkeypatch.setattr(checkpoint_folder, "newest", lambda *_: "a checkpoint, which is not read")
    with pytest.raises(
        UserError, match=f"is not the model that .* began with: its .*{changed} changed.*Restore it"
    ):
        export.export_checkpoint(tmp_path / "run", None, tmp_path / "out", False, print)
    assert not (tmp_path / "out").exists()
