"""Packages that only some runs need: whether they are installed, without importing them, which takes seconds."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MODULES = {"deepspeed": "deepspeed", "megatron-core": "megatron.core"}  # by the names under which pip knows them


def lacks(package: str) -> str | None:
    """What a fault says if `package`, a key of `MODULES`, is not installed; None if it is."""
    try:
        found = importlib.util.find_spec(MODULES[package]) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if found:
        return None
    return f"needs {package}, which {not_installed()}"


def not_installed() -> str:
    """The end of a sentence about a package: where it is missing and how to get it."""
    return f"is not installed for {sys.executable}; `make install` makes .venv with all packages"


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Around the first import of megatron-core, which warns on every rank of packages that only its own models use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
        yield
