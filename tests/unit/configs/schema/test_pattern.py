"""Patterns of attention over the layers, as written in YAML and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config, to_yaml
from model.faults import model_faults


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("[mhe_add x 3, mha]", ("mhe_add", "mhe_add", "mhe_add", "mha")),
        ("[mhe_add × 2, sha*1]", ("mhe_add", "mhe_add", "sha")),
        ("[mha, mha]", "mha"),
        ("mha", "mha"),
    ],
)
def test_a_pattern_of_layers(good: Path, tmp_path: Path, text: str, pattern: str | tuple[str, ...]) -> None:
    config = load_config(good, [f"--model.attention={text}"], checks=[model_faults])
    assert config.model.attention == pattern
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
