"""The README's examples run as they stand, and what it and the pages name is there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    ".github/CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]


def test_python_examples():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    labels = torch.randint(0, 11, (4, 6))
    labels[:, :2] = -100
    names = {
        "logits": torch.randn(4, 6, 11, requires_grad=True),
        "hidden": torch.randn(4, 6, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 11),
        "labels": labels,
        "reference_gap": torch.randn(2),
        "dominant_hidden": torch.randn(3, 5, 8, requires_grad=True),
        "dominant_mask": torch.ones(3, 5, dtype=torch.bool),
        "reference_pool": torch.randn(3, 8),
    }
    for example in examples:
        exec(example, names)
    assert names["logits"].grad.abs().sum() > 0 and names["dominant_hidden"].grad is not None
    names["out"].loss.backward()
    assert names["lm_head"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_of_a_page_exist(page):
    """Links, files of the project in backticks, and in the README the map's rooms."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    files = re.findall(r"`((?:mpo|mpo_kernels|tests|benchmarks|docs)/[\w./-]+)`", text)
    to_come = {"mpo/evaluation/judges/", "mpo/recipes/NAME.yaml"}
    assert [f for f in files if not (ROOT / f).exists() and f not in to_come] == []


def test_the_map_has_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    map_ = text[text.index("## The map") : text.index("In `mpo/` each room")]
    for package in ("mpo", "mpo_kernels"):
        _, _, rooms = map_.partition(f"    {package}/ ")
        named = re.findall(r"^      ([\w./]+)", rooms.partition("\n\n")[0], flags=re.MULTILINE)
        assert all((ROOT / package / name).exists() for name in named), named
        folders = {f"{p.parent.name}/" for p in (ROOT / package).glob("*/__init__.py")}
        assert folders <= set(named)
