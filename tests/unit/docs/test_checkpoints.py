"""The example of docs/checkpoints.md reads a tensor of a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.files import holding, make_index, write_parts
from pretrain.checkpoints.index import INDEX, index_text
from pretrain.checkpoints.state import Block, State
from tests.helpers import ROOT


def test_the_example_puts_a_tensor_together(tmp_path: Path) -> None:
    example = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    folder = "runs/NAME/checkpoints/step_00000200/engine"
    assert folder in example
    expected = torch.randn(6, 5)
    flat, block = expected.flatten(), Block("token_embedding.weight", (6, 5), (0, 0), (6, 5))
    states = [State(list(block.fragment("model", flat[first : first + 8], first)), {}) for first in range(0, 30, 8)]
    (tmp_path / INDEX).write_text(index_text(make_index([holding(state) for state in states])))
    for rank, state in enumerate(states):
        write_parts(tmp_path, rank, state.parts, {})
    names: dict[str, Any] = {}
    exec(example.replace(folder, str(tmp_path)), names)
    assert torch.equal(torch.from_numpy(names["tensor"]), expected)
