"""Packages that only some runs need, looked for without importing them: that takes seconds."""

from __future__ import annotations

import importlib.util
import sys

MODULES = {"deepspeed": "deepspeed", "megatron-core": "megatron.core"}  # by the names under which pip knows them


def lacks(package: str) -> str | None:
    """What a fault says if `package`, a key of `MODULES`, is not installed; None if it is."""
    try:
        found = importlib.util.find_spec(MODULES[package]) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if found:
        return None
    return f"needs {package}, which is not installed for {sys.executable}; `make install` makes .venv with all packages"
