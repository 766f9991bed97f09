"""Each file of a run's folder, damaged in each way, and what each command that reads it says or
does then.

Either the damage is mended, or an older whole checkpoint is taken, which is said, and then every
number is that of a run that nothing happened to; or the command ends with status 2 and a sentence
that names the file. Never a traceback, and nothing silently wrong.
"""

import re

import pytest
import yaml
from conftest import make_tokenizer
from tiny import commands, native_rows, save_model, write_rows

MENDED = ""
"""Goes on without a word, to the same numbers."""
READ = "config.json cannot be read"
STATE, MODEL, OPTIMIZER = (
    f"checkpoints/step-00000004/{name}"
    for name in (
        "state.json",
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
)
PASSED_OVER = (
    "WARNING: The checkpoint .*step-00000004 is damaged: .*The one before it is taken[^$]*2 of 6"
    " steps done"
)
PORTABLE = "checkpoints/step-00000004.portable"

# file: {fault: what is said and mended (after "ok: ") or why it is refused}
CONFIG = {
    "absent": "is not empty and holds no MPO run",
    "empty": READ,
    "truncated": READ,
    "other bytes": READ,
    "deep nesting": READ,
    "[1, 2]": "config.json cannot be read .it holds list, not an object",
    "7": "it holds int, not an object",
    "{}": "config.json is no run's configuration",
    '{"config": {"loss": 3}}': "config.json is no run's configuration of this version .config.",
    '{"config": [], "rows": {}}': "config.json is no run's configuration",
    "unreadable": "config.json is no file",
    "a dangling link": "config.json is no file",
    "a folder": "config.json is no file",
    "a link to it": "ok: ",
}
GAPS = dict.fromkeys(
    (
        "absent",
        "empty",
        "truncated",
        "other bytes",
        "text",
        "unreadable",
        "a folder",
        "a link to it",
    ),
    "ok: ",
)
TRAIN = {
    "config.json": CONFIG,
    "metrics.jsonl": {
        "absent": "ok: WARNING: .*metrics.jsonl has no lines of steps 1 to 4, which are done",
        "empty": "ok: WARNING: .*metrics.jsonl has no lines of steps 1 to 4",
        "truncated": r"ok: WARNING: .*metrics.jsonl has no lines of steps \d to 4",
        "other bytes": "metrics.jsonl, line 1: .*Restore the line, or remove it",
        "\n": "ok: WARNING: .*metrics.jsonl has no lines of steps 1 to 4",
        "7\n8\n": "metrics.jsonl, line 1: not the numbers of a step",
        '{"loss": 1}\n{}\n': "metrics.jsonl, line 1: not the numbers of a step",
        "unreadable": "metrics.jsonl is no file",
        "a folder": "metrics.jsonl is no file",
        "a link to it": "ok: ",
    },
    "gaps_before/gaps.safetensors": GAPS,
    "gaps_after/gaps.safetensors": GAPS,
    "gaps_after": {"absent": "ok: ", "text": "gaps_after is no folder"},
    "gaps_before": {
        "absent": "ok: ",
        "an empty folder": "ok: ",
        "text": "gaps_before is no folder",
    },
    "reference/values.safetensors": {
        **dict.fromkeys(
            ("absent", "empty", "truncated", "other bytes", "unreadable", "a folder"),
            "reference is damaged: values.safetensors",
        ),
        "a link to it": "ok: ",
    },
    "reference/manifest.json": {
        **dict.fromkeys(
            ("absent", "unreadable", "a folder"), "reference holds no whole reference store"
        ),
        **dict.fromkeys(
            ("empty", "truncated", "other bytes", "[]", "deep nesting"),
            "reference is damaged: .*manifest.json cannot be read",
        ),
        "{}": "reference was built for something else .format: None stored",
    },
    "reference": {
        "absent": "ok: ",
        "an empty folder": "ok: ",
        "text": "reference is no folder",
        "a dangling link": "reference is no folder",
    },
    STATE: dict.fromkeys(
        (
            "absent",
            "empty",
            "truncated",
            "other bytes",
            "[4]",
            "{}",
            '{"step": 4, "world_size": 1}',
            "unreadable",
            "a folder",
            "deep nesting",
        ),
        f"ok: {PASSED_OVER}",
    ),
    MODEL: {
        **dict.fromkeys(
            ("absent", "empty", "truncated", "text", "unreadable", "a folder"), f"ok: {PASSED_OVER}"
        ),
        "other bytes": "step-00000004 cannot be read .*delete that folder",
        "a link to it": "ok: 4 of 6 steps done",
    },
    OPTIMIZER: {
        **dict.fromkeys(
            ("absent", "empty", "truncated", "text", "unreadable", "a folder"), f"ok: {PASSED_OVER}"
        ),
        "other bytes": "step-00000004 cannot be read .*delete that folder",
    },
    "checkpoints/step-00000004": {
        "absent": "ok: 2 of 6 steps done",
        **dict.fromkeys(("an empty folder", "text", "a dangling link"), f"ok: {PASSED_OVER}"),
    },
    "checkpoints/step-00000099": dict.fromkeys(
        ("an empty folder", "text", "unreadable"),
        "ok: step-00000099 is damaged: .*The one before it is taken[^$]*4 of 6 steps done",
    ),
    "checkpoints/step-00000005.incomplete": {"a folder": "ok: 4 of 6 steps done"},
    "checkpoints": {
        "absent": "ok: ",
        "text": "checkpoints is no folder",
        "a dangling link": "checkpoints is no folder",
    },
    # the store is there
    ".reference.lock": dict.fromkeys(("absent", "text", "unreadable", "a folder"), "ok: "),
    ".lock": {
        "absent": "ok: ",
        "text": "ok: ",
        "other bytes": "ok: ",
        "a folder": ".lock is no file",
        "unreadable": ".lock is no file",
    },
    "dropped_rows.jsonl": {"text": "ok: ", "a folder": "dropped_rows.jsonl is no file"},
    "model": {"text": "model is no folder"},
    "result.png": {"text": "ok: ", "a folder": "result.png is no file"},
    "result.json": {
        "empty": "result.json is damaged",
        "7": "result.json is damaged",
        "{}": "holds the finished run",
        "a folder": "result.json is no file",
        "unreadable": "result.json is no file",
    },
    ".config.json.0a1b2c3d.incomplete": {"text": "ok: "},
}
PRECOMPUTE = {
    "config.json": CONFIG,
    **{
        name: TRAIN[name]
        for name in (
            "reference/values.safetensors",
            "reference/manifest.json",
            "reference",
            ".lock",
        )
    },
}
CONVERT = {
    STATE: dict.fromkeys(("empty", "{}"), "ok: step-00000004 is damaged"),
    MODEL: {
        "truncated": "ok: step-00000004 is damaged",
        "other bytes": "step-00000004 cannot be read",
    },
    OPTIMIZER: {
        "absent": "ok: step-00000004 is damaged",
        "other bytes": "step-00000004 cannot be read",
    },
    "checkpoints": {"absent": "holds no whole checkpoint", "text": "holds no whole checkpoint"},
}
EXPORT = {
    "config.json": {
        **CONFIG,
        **dict.fromkeys(
            ("absent", "unreadable", "a dangling link", "a folder"), "holds no MPO run"
        ),
    },
    **CONVERT,
}
GO_ON_FROM_CONVERTED = {
    f"{PORTABLE}/state.json": dict.fromkeys(
        ("absent", "empty", "[]", '{"step": 3}', "a folder"), "step-00000004.portable is damaged"
    ),
    f"{PORTABLE}/values.safetensors": dict.fromkeys(
        ("absent", "empty", "truncated", "other bytes", "a folder"),
        "step-00000004.portable is damaged",
    ),
    PORTABLE: {
        "absent": "mpo convert",
        "text": "step-00000004.portable is damaged",
        "an empty folder": "step-00000004.portable is damaged",
    },
}
COMMANDS = {
    "train": ("interrupted", ["train", "{project}/run.yaml", "output_dir={run}"], TRAIN),
    "precompute": (
        "interrupted",
        ["precompute", "{project}/run.yaml", "output_dir={run}"],
        PRECOMPUTE,
    ),
    "convert": ("interrupted", ["convert", "{run}"], CONVERT),
    "export": ("interrupted", ["export", "{run}", "--to", "{run}/exported"], EXPORT),
    "train converted": (
        "converted",
        ["train", "{project}/run.yaml", "output_dir={run}", "zero.stage=0"],
        GO_ON_FROM_CONVERTED,
    ),
}
TWO = {
    "both checkpoints": (
        "train",
        [(STATE, "empty"), ("checkpoints/step-00000002/state.json", "absent")],
        (
            r"Every checkpoint in .*checkpoints is damaged: step-00000004 \(.*\), step-00000002"
            r" \(state.json is missing\).*delete the folder"
        ),
    ),
    "both checkpoints, exported": (
        "export",
        [(STATE, "empty"), ("checkpoints/step-00000002", "text")],
        "Every checkpoint in",
    ),
    "no store and no lock for it": (
        "train",
        [("reference", "absent"), (".reference.lock", "a folder")],
        ".reference.lock cannot be written",
    ),
    "all but the checkpoints": (
        "train",
        [
            ("gaps_before", "absent"),
            ("reference", "absent"),
            ("metrics.jsonl", "absent"),
            (".lock", "absent"),
        ],
        "ok: WARNING: .*metrics.jsonl has no lines of steps 1 to 4",
    ),
}
CASES = {
    **{
        f"{command}: {file} {fault}": (command, [(file, fault)], expected)
        for command, (_, _, files) in COMMANDS.items()
        for file, faults in files.items()
        for fault, expected in faults.items()
    },
    **{
        f"{command}: {name}": (command, faults, expected)
        for name, (command, faults, expected) in TWO.items()
    },
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases, one process. Three whole runs: finished; interrupted in step 6, with two
    checkpoints; and that one made portable."""
    root = tmp_path_factory.mktemp("damaged")
    save_model(root / "model", make_tokenizer())
    write_rows(root / "train.jsonl", native_rows(dominants=2))
    sections = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["train.jsonl"]},
        "train": {
            "max_steps": 6,
            "pairs_per_step": 2,
            "pairs_per_micro_batch": 2,
            "learning_rate": 3e-4,
        },
        "zero": {"stage": 2},
        "checkpoint": {"every": 2, "keep": 9, "export": False},
        "output_dir": "nowhere",
    }
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    whole = str(root / "interrupted")
    begin = [
        ["mpo", "train", str(root / "run.yaml"), f"output_dir={root / 'finished'}"],
        ["look", str(root / "finished")],
        ["copy", str(root / "finished"), whole],
        *(
            ["damage", f"{whole}/{name}", "absent"]
            for name in ("result.json", "result.png", "checkpoints/step-00000006")
        ),
        ["copy", whole, str(root / "converted")],
        ["mpo", "convert", str(root / "converted")],
    ]
    steps, places = list(begin), {}
    for name, (command, faults, _) in CASES.items():
        kind, arguments, _ = COMMANDS[command]
        run = f"{root / kind}-{len(places)}"
        steps += [
            ["copy", str(root / kind), run],
            *(["damage", f"{run}/{file}", fault] for file, fault in faults),
        ]
        places[name] = len(steps)
        steps += [
            ["mpo", *(argument.format(run=run, project=root) for argument in arguments)],
            ["look", run],
            ["remove", run],
        ]
    done = commands(steps, root)
    assert done[0]["status"] == done[len(begin) - 1]["status"] == 0, (
        done[0]["text"] + done[len(begin) - 1]["text"]
    )
    return done[1], {name: {**done[place], **done[place + 1]} for name, place in places.items()}


@pytest.mark.parametrize("name", CASES)
def test_damage(outcomes, name):
    undamaged, cases = outcomes
    case, (command, _, expected) = cases[name], CASES[name]
    text = case["text"]
    assert "Traceback" not in text, text[-3000:]
    if not expected.startswith("ok: "):
        assert case["status"] == 2 and re.search(expected, text, re.DOTALL), text[-2000:]
        error = text[text.index("Error: ") :]
        assert re.search(
            r"[Rr]estore|[Dd]elete|[Mm]ove it|[Cc]hoose|[Nn]ame another|Give|mpo convert|Set |mend"
            r" the place",
            error,
        ), error
        return
    assert case["status"] == 0 and re.search(expected.removeprefix("ok: "), text, re.DOTALL), text[
        -2000:
    ]
    assert not [file for file in case["files"] if file.endswith(".incomplete")]
    if command.startswith("train"):
        assert case["result"] == undamaged["result"]
        assert (
            all(case["steps"][step] == undamaged["steps"][step] for step in case["steps"])
            and {"5", "6"} <= case["steps"].keys()
        )
        assert "has no lines" in text or len(case["steps"]) == 6


def test_every_file_of_a_run_is_in_the_table(outcomes):
    """A new file of a run's folder has to be thought of here."""
    _, cases = outcomes
    known = {*TRAIN, *GO_ON_FROM_CONVERTED}
    files = cases["train: config.json a link to it"]["files"]
    kinds = {re.sub(r"step-\d+", "step-00000004", file) for file in files} - {"moved-config.json"}
    assert kinds <= known, kinds - known
