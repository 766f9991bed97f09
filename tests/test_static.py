"""What a reader relies on without running anything: style, types, imports that go down only, and
that the kernels import without the trainer's libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linted_and_typed(command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_two_test_files_have_one_name():
    """pytest imports each by its name alone, and collects neither of two that share one."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_kernels_import_without_the_trainer_or_triton():
    """`import mpo_kernels` loads torch, and triton only once a kernel is launched."""
    script = (
        "import sys, mpo_kernels\nunwanted = {'triton', 'deepspeed', 'transformers', 'pydantic',"
        " 'omegaconf', 'typer', 'rich', 'datasets', 'matplotlib', 'mpo'}\nnames ="
        " {name.split('.')[0] for name in sys.modules}\nsys.exit(', '.join(unwanted & names) or"
        " None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_command_line_starts_fast_and_shows_examples():
    """Help imports none of the libraries behind the commands, and `mpo plot` only those that draw
    and check."""
    heavy = {"torch", "triton", "deepspeed", "transformers", "datasets"}
    for module, unwanted in (
        ("mpo.commands.app", heavy | {"matplotlib", "numpy", "omegaconf", "pydantic"}),
        ("mpo.training.curves", heavy),
    ):
        script = f"import sys, {module}; print(*({unwanted} & set(sys.modules)))"
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0 and not result.stdout.strip(), (module, result)
    result = subprocess.run(
        [sys.executable, "-m", "mpo", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "train.max_steps=5" in result.stdout


def test_without_the_trainer_extra_the_command_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; from mpo.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "pip install 'mpo-kernels[train]'" in result.stderr
    assert "Traceback" not in result.stderr


# Rooms of `mpo`, from the top: each may import those that it names and whatever those may.
ROOMS = {
    "__main__": {"commands"},
    "commands": {"training", "evaluation", "data_build"},
    "training": {"models"},
    "evaluation": {"models"},
    "data_build": {"models"},
    "models": {"data"},
    "data": {"config"},
    "config": {"languages", "loss_config"},
    "loss_config": {"losses"},
    "losses": {"runtime"},
    "languages": {"runtime"},
    "runtime": set(),
}
MORE_ARROWS = {
    ("training", "mpo.evaluation.gaps"): "a run ends with the gaps before and after",
    ("models.forward", "mpo_kernels"): "the head's losses take the place of the model's forward",
    ("models.environment", "mpo_kernels.backends"): "`mpo env` says which of them computes",
    ("losses", "mpo_kernels.losses"): "names of a configuration mean losses",
    ("loss_config", "mpo_kernels.losses"): "MPO's section is read without the others",
    ("training.objective", "mpo_kernels.losses"): "a loss known before training is checked",
    ("training.memory", "mpo_kernels.ops.chunks"): "the bytes of a chunk of logits have one home",
}
"""Imports that no other file of `mpo` has, from a room or a file to another, and why."""


def imports(root):
    """{file as a dotted name: what it imports, anywhere in it} of both packages below `root`."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("mpo", "mpo_kernels")
        for path in (root / package).rglob("*.py")
    }
    arrows = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: names are written from the root"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= whole & files.keys() or {node.module}
        arrows[name] = (found & files.keys()) - {name}
    return arrows


def upward(arrows):
    """Imports that no room is allowed."""

    def below(room):
        return {room}.union(*map(below, ROOMS[room]))

    def is_allowed(name, imported):
        package, _, inner = name.partition(".")
        theirs, _, place = imported.partition(".")
        if package == theirs == "mpo_kernels":
            return True
        if package == theirs and place.split(".")[0] in below(inner.split(".")[0]):
            return True
        return package == "mpo" and any(
            f"{inner}.".startswith(f"{ours}.") and f"{imported}.".startswith(f"{target}.")
            for ours, target in MORE_ARROWS
        )

    return [(a, b) for a in sorted(arrows) for b in sorted(arrows[a]) if not is_allowed(a, b)]


def circles(arrows):
    """Files that import each other, straight or through others."""
    left = dict(arrows)
    while free := [
        name
        for name, found in left.items()
        if not found & left.keys() or not any(name in others for others in left.values())
    ]:
        for name in free:
            del left[name]
    return sorted(left)


def test_rooms_import_downward_and_in_no_circle():
    arrows = imports(ROOT)
    assert upward(arrows) == []
    assert circles(arrows) == []
    for ours, target in MORE_ARROWS:  # each is needed
        assert any(
            f"{name}.".startswith(f"mpo.{ours}.") and f"{to}.".startswith(f"{target}.")
            for name, found in arrows.items()
            for to in found
        ), (ours, target)


PLANTED = [
    ("mpo/runtime/errors.py", "from mpo.training import train", "mpo.training.train", True),
    (
        "mpo/training/curves.py",
        "from mpo.evaluation import comparison",
        "mpo.evaluation.comparison",
        False,
    ),
    ("mpo/data/rows.py", "import mpo_kernels.functional", "mpo_kernels.functional", False),
    ("mpo_kernels/functional.py", "from mpo.runtime import errors", "mpo.runtime.errors", False),
]


@pytest.mark.parametrize(("file", "line", "imported", "closes_a_circle"), PLANTED)
def test_an_upward_import_that_is_planted_is_caught(
    tmp_path, file, line, imported, closes_a_circle
):
    """Also one inside a function, and the circle that it closes."""
    for path in (*ROOT.glob("mpo/**/*.py"), *ROOT.glob("mpo_kernels/**/*.py")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with open(tmp_path / file, "a", encoding="utf-8") as changed:
        changed.write(f"\n\ndef later():\n    {line}\n")
    name = file.removesuffix(".py").replace("/", ".")
    arrows = imports(tmp_path)
    assert upward(arrows) == [(name, imported)]
    assert (name in circles(arrows)) == closes_a_circle


def test_the_kernels_copy_to_a_device_in_one_place():
    """`on_device` alone: another copy may wait for the GPU. The sums of a context's lengths do, to
    be read back."""
    found = set()
    for path in ROOT.glob("mpo_kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                arguments = [ast.unparse(argument) for argument in node.args]
                is_copy = node.func.attr == "to" and any(a.endswith("device") for a in arguments)
                if is_copy or any(option.arg == "non_blocking" for option in node.keywords):
                    found.add((str(path.relative_to(ROOT)), node.lineno))
    assert {file for file, _ in found} == {"mpo_kernels/ops/transfer.py", "mpo_kernels/parallel.py"}
