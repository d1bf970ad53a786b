"""A kind of model that the registry has not."""

from __future__ import annotations

import pytest

from model import registry
from tests.bidirectional import BIDIRECTIONAL, KIND


@pytest.fixture
def bidirectional_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name, known for the time of a test."""
    monkeypatch.setitem(registry._KINDS, BIDIRECTIONAL, KIND)
    return BIDIRECTIONAL
