"""A configuration without faults, and the faults that overrides bring in."""

from pathlib import Path

import pytest

from configs.load import ConfigError, load_config
from model.faults import model_faults
from model.gha.faults import gha_faults
from model.parallel.faults import tensor_faults
from pretrain.engines import engine_faults

GOOD = """
run: {folder: runs/x}
model: {hidden_size: 64, num_layers: 2, num_heads: 8}
data: {path: data/x, sequence_length: 32}
training: {steps: 10, global_batch_size: 4, micro_batch_size: 2}
optimizer: {lr: 1e-3}
"""


def faults_of(path: Path, *overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, checks=[model_faults, gha_faults, tensor_faults, engine_faults], world_size=world_size)
    return [str(fault) for fault in caught.value.faults]
