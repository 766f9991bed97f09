"""The examples of the README run as they stand."""

import re
from pathlib import Path

import torch


def test_python_examples():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
