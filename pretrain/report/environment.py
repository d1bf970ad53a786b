"""What a run ran on: code, packages, processes, hosts, devices. One line for each start, since a resumed run may have moved."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain.distributed.collectives import gather_objects
from pretrain.distributed.layout import Layout
from pretrain.report.devices import device_name

FILE = "environment.jsonl"
PACKAGES = ("deepspeed", "megatron-core", "triton", "numpy", "tokenizers", "safetensors")
_ROOT = Path(__file__).resolve().parents[2]


def environment(layout: Layout, first_step: int) -> dict[str, Any]:
    """What this start of a run runs on; every rank calls it, for the first, which has all of it."""
    places = gather_objects((platform.node(), device_name(layout.device)))
    if not layout.is_main:
        return {}
    return {
        "time": round(time.time(), 3),
        "first_step": first_step,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code": _code(),
        "python": platform.python_version(),
        # torch itself also says which build it is
        "packages": {"torch": torch.__version__}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda if layout.device.type == "cuda" else None,
        "processes": layout.world_size,
        "hosts": dict(Counter(host for host, _ in places)),  # name → processes
        "devices": dict(Counter(device for _, device in places)),  # name → processes
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def append_environment(folder: Path, line: dict[str, Any]) -> None:
    """Add what `environment` has found to the file in a run's folder. Raises OSError."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _code() -> dict[str, Any]:
    """The version of this code: its commit and whether files differ from it, if it is a clone."""
    git = ["git", "-C", str(_ROOT)]
    try:
        commit, changes = (
            subprocess.run([*git, *options], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for options in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None}
    return {"commit": commit, "changed": bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
