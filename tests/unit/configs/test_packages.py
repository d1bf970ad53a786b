"""Packages that only some runs need; tests/unit/pretrain/test_needs.py runs without them."""

from __future__ import annotations

import sys
import warnings

import pytest

from configs.packages import MODULES, lacks, quiet_megatron


@pytest.mark.parametrize("package", MODULES)
def test_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    assert lacks(package) is None
    monkeypatch.setitem(sys.modules, MODULES[package], None)
    assert str(lacks(package)).startswith(f"needs {package}, which is not installed for {sys.executable}; ")


def test_only_megatrons_warnings_of_packages_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_megatron():
            warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]
