"""The file of a configuration without faults."""

from pathlib import Path

import pytest

from tests.unit.configs.good import GOOD


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path
