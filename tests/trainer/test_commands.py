"""The commands beside `mpo train`, as a user runs them: real processes, real files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train import project, run, weights  # noqa: F401  (project is a fixture)
from tiny import mpo_command, native_rows, write_rows
from transformers import AutoModelForCausalLM

from mpo.languages import script_share


def command(name, project, *arguments, expect=0, ranks=1):  # noqa: F811
    result = mpo_command(name, str(project / "run.yaml"), *arguments, ranks=ranks)
    assert result.returncode == expect, result.stdout[-2000:] + result.stderr[-2000:]
    return result


@pytest.fixture(scope="module")
def trained(project):  # noqa: F811
    out, _ = run(project, "trained", "checkpoint.every=2", "checkpoint.keep=3", "zero.stage=2")
    return out


def test_validate_finds_what_is_wrong(project):  # noqa: F811
    rows = native_rows(dominants=6, languages=("sw", "ko"))
    korean = [row for row in rows if row["language"] == "ko"]
    words = {  # real ones, so that nothing else is suspicious
        "ko": ("이것을 어떻게 합니까", "나는 그 일을 도울 수 없습니다", "물론입니다 이렇게 하세요"),
        "sw": ("nifanyeje jambo hili rafiki", "siwezi kukusaidia kwa hilo", "ndiyo fanya hivi leo"),
    }
    for number, row in enumerate(rows):
        prompt, chosen, rejected = words[row["language"]]
        row["target"] = {
            "prompt": [{"role": "user", "content": f"{prompt} {number}"}],
            "chosen": chosen,
            "rejected": rejected,
        }
    korean[0]["target"]["chosen"] = "ascii letters only"
    korean[1]["target"]["rejected"] += " &quot;"
    korean[2]["target"] = dict(korean[2]["dominant"])
    korean[4]["target"] = dict(korean[3]["target"])
    korean[0]["target"]["rejected"] = "아" * 60
    write_rows(project / "odd.jsonl", rows)
    result = command("validate", project, "data.train=odd.jsonl", "data.eval=[]", "--json")
    report = json.loads(result.stdout)
    found = {(item["source"].rsplit(":", 1)[1], item["reason"]) for item in report["suspicious"]}
    assert {
        ("2", "wrong_script"),
        ("4", "html_entities"),
        ("6", "untranslated"),
        ("10", "repeated"),
        ("2", "length_ratio"),
    } <= found
    assert not {source for source, _ in found} & {"1", "3", "5", "7", "9", "11", "8", "12"}
    assert report["languages"]["ko"]["rows"] == 6 and report["dominant_pairs"] == 6
    prompt, scored = report["views"][0]["chosen"]
    assert (
        prompt.endswith("<|im_start|>assistant\n")
        and scored == "siwezi kukusaidia kwa hilo<|im_end|>"
    )
    text = command("validate", project, "data.train=[odd.jsonl]", "--strict", expect=1).stdout
    assert "1 html_entities" in text and "What the model sees" in text and "Held-out rows" in text


def test_dry_run_tells_and_writes_nothing(project):  # noqa: F811
    out = project / "dry"
    options = [f"output_dir={out}", "zero.stage=3", "model.dtype=bfloat16"]
    report = json.loads(command("train", project, *options, "--dry-run", "--json").stdout)
    assert report["steps"] == 6 and report["rows"] == 8 and report["reference_sequences"] == 8
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(project / "model").parameters()
    )
    assert report["size"]["parameters"] == report["size"]["trained"] == parameters
    one, two = report["memory"][:2]
    assert one["optimizer"] == pytest.approx(12 * parameters / 2**30) and two[
        "optimizer"
    ] == pytest.approx(one["optimizer"] / 2)
    assert two["gradients"] == pytest.approx(one["gradients"] / 2)
    assert "COMPUTED" in command("train", project, *options, "--dry-run").stdout
    assert not out.exists()
    small = json.loads(
        command("train", project, *options, "model.lora.rank=2", "--dry-run", "--json").stdout
    )
    assert 0 < small["size"]["trained"] < parameters / 5


def test_gaps_of_two_models_agree_with_the_run(project, trained):  # noqa: F811
    report = json.loads(command("gaps", project, f"output_dir={trained}", "--json").stdout)
    result = json.loads((trained / "result.json").read_text())
    before, after = report["models"].values()
    for language in ("sw", "zh", "all"):
        expected = result["all"] if language == "all" else result["languages"][language]
        for moment, rows in (("before", before), ("after", after)):
            assert rows[language]["target_gap"] == pytest.approx(
                expected["target_gap"][moment], abs=1e-4
            )
            assert rows[language]["distance"] == pytest.approx(
                expected["distance"][moment], abs=1e-4
            )
            low, high = rows[language]["distance_interval"]
            assert low <= rows[language]["distance"] <= high
    text = command("gaps", project, f"output_dir={trained}").stdout
    assert "bootstrap" in text and str(trained / "model") in text.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [("안녕 ok", "ko", 4 / 6), ("hello", "sw", 1), ("123!", "ar", 1), ("私はTV", "ja", 5 / 7)],
)
def test_script_share(text, language, share):
    assert script_share(text, language) == pytest.approx(share)


def test_export_writes_what_the_checkpoint_holds(project, trained):  # noqa: F811
    last = project / "exported-last"
    assert mpo_command("export", str(trained), "--to", str(last)).returncode == 0
    ours, theirs = load_file(last / "model.safetensors"), weights(trained)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    early = project / "exported-early"
    result = mpo_command(
        "export", str(trained), "--to", str(early), "--checkpoint", "step-00000002"
    )
    assert result.returncode == 0, result.stderr
    assert any(
        not torch.equal(value, theirs[key])
        for key, value in load_file(early / "model.safetensors").items()
    )
    for arguments, message in (
        ([str(project), "--to", str(project / "x")], "holds no MPO run"),
        ([str(trained), "--to", str(early)], "is not empty"),
        (
            [str(trained), "--to", str(project / "x"), "--checkpoint", "step-00000099"],
            "no whole checkpoint step-00000099",
        ),
        ([str(trained), "--to", str(project / "x"), "--merge"], "no adapters to merge"),
    ):
        refused = mpo_command("export", *arguments)
        assert (
            refused.returncode == 2
            and message in refused.stderr
            and "Traceback" not in refused.stderr
        )


def test_plot_draws_runs(project, trained):  # noqa: F811
    picture = project / "both.png"
    assert mpo_command("plot", str(trained), str(trained), "--to", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = mpo_command("plot", str(project / "nowhere"))
    assert refused.returncode == 2 and "no metrics.jsonl" in refused.stderr


def test_a_precomputed_store_serves_runs_of_any_world_size(project, trained):  # noqa: F811
    store = project / "stores" / "shared"
    command("precompute", project, f"reference.store={store}", ranks=2)
    values, own = (
        load_file(folder / "values.safetensors") for folder in (store, trained / "reference")
    )
    torch.testing.assert_close(values["mean_logp"], own["mean_logp"], rtol=1e-5, atol=1e-5)
    written = (store / "values.safetensors").stat().st_mtime_ns
    _, process = run(project, "with-store", f"reference.store={store}", "train.max_steps=1")
    assert f"Reference {store} (8 sequences)" in process.stdout.replace("\n", "")
    assert (store / "values.safetensors").stat().st_mtime_ns == written
    _, process = run(
        project, "refused-store", f"reference.store={store}", "loss.pool=all", expect=2
    )
    assert "pool: response stored, all now" in process.stderr and "mpo precompute" in process.stderr


def test_metrics_tell_speed_padding_and_memory(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row["tokens_per_second"] > 0
        and row["peak_memory_gib"] > 0
        and 0 <= row["padding_avoided"] < 1
        for row in rows
    )


def test_overfit_batch_goes_to_zero(project):  # noqa: F811
    out = project / "overfit"
    command(
        "train",
        project,
        f"output_dir={out}",
        "--overfit-batch",
        "train.max_steps=60",
        "train.learning_rate=1e-3",
        "loss.retention_weight=0.1",
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # the same rows at every step
    assert {tuple(sorted(row["gap"])) for row in rows} == {tuple(sorted(rows[0]["gap"]))}
    assert rows[-1]["l1"] < 0.02 * rows[0]["l1"] or rows[-1]["l1"] < 1e-5


def test_tensorboard_has_a_curve_per_language(project):  # noqa: F811
    pytest.importorskip("tensorboard")
    out, _ = run(project, "tracked", "track.tensorboard=true", "train.max_steps=2")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in out.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"mpo/loss", "mpo/l1", "mpo/gap/sw"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("mpo/loss")] == [1, 2]


def test_a_tracker_that_is_not_installed_is_named(project):  # noqa: F811
    _, process = run(project, "untracked", "track.comet=true", expect=2)
    assert "pip install comet-ml" in process.stderr


def test_help_shows_examples():
    for name in ("train", "validate", "precompute", "gaps", "export", "plot"):
        result = mpo_command(name, "--help")
        assert result.returncode == 0 and f"mpo {name} " in result.stdout.replace("\n", " ")


@pytest.fixture(scope="module")
def adapters(project):  # noqa: F811
    return run(
        project,
        "lora",
        "model.lora.rank=4",
        "train.learning_rate=3e-3",
        "zero.stage=2",
        "train.epochs=6",
        "checkpoint.every=8",
    )[0]


def test_adapters_are_trained_exported_and_opened_again(project, adapters):  # noqa: F811
    assert (adapters / "model" / "adapter_model.safetensors").is_file()
    result = json.loads((adapters / "result.json").read_text())
    assert result["all"]["distance"]["after"] < result["all"]["distance"]["before"]
    report = json.loads(
        command("gaps", project, "--model", str(adapters / "model"), "--json").stdout
    )
    (rows,) = report["models"].values()
    assert rows["all"]["target_gap"] == pytest.approx(
        result["all"]["target_gap"]["after"], abs=1e-4
    )
    whole = project / "merged"
    process = mpo_command("export", str(adapters), "--to", str(whole), "--merge")
    assert process.returncode == 0, process.stderr
    report = json.loads(command("gaps", project, "--model", str(whole), "--json").stdout)
    (rows,) = report["models"].values()
    assert rows["all"]["target_gap"] == pytest.approx(
        result["all"]["target_gap"]["after"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        pytest.param("live", 1, ["reference.mode=live"], marks=pytest.mark.slow),
        ("live2", 2, ["reference.mode=live", "zero.stage=3"]),
        ("stored2", 2, ["zero.stage=3", "model.lora.export=merged"]),
    ],
)
def test_adapters_with_a_live_reference_and_on_two_ranks(project, adapters, name, ranks, overrides):  # noqa: F811
    options = [
        "model.lora.rank=4",
        "train.learning_rate=3e-3",
        "zero.stage=2",
        "train.epochs=6",
        *overrides,
    ]
    out, _ = run(project, f"lora-{name}", *options, ranks=ranks)
    first, second = (
        [json.loads(line)["loss"] for line in (o / "metrics.jsonl").read_text().splitlines()]
        for o in (adapters, out)
    )
    # Adapters start from random numbers; the seed makes them the same.
    assert second == pytest.approx(first, rel=2e-2, abs=1e-5)
    assert (out / "reference").exists() == ("reference.mode=live" not in overrides)
    if "model.lora.export=merged" in overrides:
        assert (out / "model" / "model.safetensors").is_file() and (
            out / "adapter" / "adapter_model.safetensors"
        ).is_file()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_token_budget_changes_nothing_but_the_micro_batches(project, trained, ranks):  # noqa: F811
    out, _ = run(
        project, f"budget{ranks}", "train.tokens_per_micro_batch=300", "zero.stage=2", ranks=ranks
    )
    first, second = (
        [json.loads(line)["loss"] for line in (o / "metrics.jsonl").read_text().splitlines()]
        for o in (trained, out)
    )
    assert second == pytest.approx(first, rel=2e-3, abs=2e-5)


def test_yaml_of_the_recipes_is_understood():
    from mpo.config import load_config

    for name in ("demo", "published", "llama-3.1-8b", "llama-3.1-70b", "gemma-2-9b", "qwen2.5-7b"):
        assert load_config(name).model.lora is None
    with pytest.raises(Exception, match="live needs model"):
        load_config("demo", ["reference.mode=live"])
    with pytest.raises(Exception, match="needs model"):
        load_config("demo", ["model.quantize=nf4"])
    with pytest.raises(Exception, match="did you mean 'rank'"):
        load_config("demo", ["model.lora.rnk=3"])
