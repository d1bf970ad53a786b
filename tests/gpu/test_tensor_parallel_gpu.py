"""Tensor-parallel layers on GPUs, over NCCL, against the whole model: what CPU tests cannot see of devices and streams."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.initialization import init_weights
from model.parallel.sharding import partition_specs
from tests.helpers import losses_of, named, run_ranks
from tests.needs import causal_names, needs

pytestmark = pytest.mark.gpu


def compare(name: str, sequence: bool, device: torch.device) -> None:
    from megatron.core import parallel_state

    from model.parallel.tensor import TensorParallelLayers, parallel_config

    config = ModelConfig(
        attention=name,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        head_dim=8,
        ffn_hidden_size=64,
        position="rope",
        activation="swiglu",
        vocab_size=37,
        attention_kernel="math",
        **needs(name),
    )
    group = parallel_state.get_tensor_model_parallel_group()
    whole, shards = (
        DecoderLM(config),
        DecoderLM(config, TensorParallelLayers(parallel_config(group.size(), sequence), group, "weights")),
    )
    tokens = torch.randint(0, 37, (3, 17), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for model in (whole, shards):
        init_weights(model, seed=7)
        model.to(device, torch.float64)
        losses.append(losses_of(model, tokens[:, :-1], tokens[:, 1:]).double())
        losses[-1].mean().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5, msg=named(name))
    for parameter, shard in shards.named_parameters():
        expected = whole.get_parameter(parameter).grad
        assert expected is not None
        own = partition_specs(shards)[parameter].shard(expected, group.rank())
        torch.testing.assert_close(shard.grad, own, rtol=1e-5, atol=1e-7, msg=named(f"{name} {parameter}"))


def work(rank: int, ranks: int, folder: Path, kind: str) -> None:
    from megatron.core import parallel_state

    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    address, backend = f"file://{folder}/rendezvous", "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)
    for name in causal_names():
        for sequence in (False, True):
            compare(name, sequence, device)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_on_gpus_equal_the_whole_model(ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    run_ranks(work, ranks, ranks, tmp_path, "cuda", gpus=True)
