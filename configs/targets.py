"""What registry entries name: classes and functions as text, so that a registry imports neither them nor torch."""

from __future__ import annotations

import importlib
from typing import Any


def load_target(target: str) -> Any:
    """The class or function that "module:name" names; its module is imported now."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
