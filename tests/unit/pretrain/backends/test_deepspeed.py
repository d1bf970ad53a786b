"""What DeepSpeed's engines are told. What they compute is compared in tests/dist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.backends.deepspeed import DeepSpeedBackend
from pretrain.backends.pipeline import PipelineBackend
from pretrain.distributed.layout import Layout
from tests.helpers import resolved, write_run


@pytest.mark.parametrize(
    ("engine", "device", "stage", "overlaps"),
    [
        (DeepSpeedBackend, "cuda", 1, True),
        (DeepSpeedBackend, "cuda", 2, True),
        (DeepSpeedBackend, "cuda", 0, None),
        (DeepSpeedBackend, "cuda", 3, None),  # its default
        (DeepSpeedBackend, "cpu", 1, None),  # no streams, only a second bucket
        (PipelineBackend, "cuda", 1, None),  # DeepSpeed warns and switches it off
    ],
)
def test_gpus_send_gradients_during_the_backward_pass(
    tmp_path: Path, prepared: Path, engine: type[DeepSpeedBackend], device: str, stage: int, overlaps: bool | None
) -> None:
    backend = object.__new__(engine)
    backend.config = resolved(write_run(tmp_path, prepared), [f"--parallel.zero_stage={stage}"])
    backend.layout, backend.stage = Layout(), stage
    backend.layout.device = torch.device(device)
    assert backend.engine_config()["zero_optimization"].get("overlap_comm") is overlaps
