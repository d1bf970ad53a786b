"""The Triton kernels compile for an H100 and need what docs/benchmarks/compiled_kernels.json says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURED = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "compiled_kernels.json"
SHARED_MEMORY = 227 * 1024  # of a block on an H100


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Registers and spills are those of the page, which is made anew when a kernel, its tiles or Triton change."""
    cases = [(64, "bfloat16", False)]
    work = "import json; from benchmarks.compiled_kernels import compiled; "
    command = f"{work}print(json.dumps([row for case in {cases} for row in compiled(*case)]))"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    run = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout.splitlines()[-1])
    assert len(rows) == 5
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] <= SHARED_MEMORY for row in rows)
    measured = json.loads(MEASURED.read_text())
    if rows[0]["triton"] != measured[0]["triton"]:
        pytest.skip(f"the figures are of Triton {measured[0]['triton']}, this is {rows[0]['triton']}")
    for row in rows:
        assert row in measured, f"run benchmarks/compiled_kernels.py again: {row}"
