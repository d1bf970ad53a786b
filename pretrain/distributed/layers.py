"""How the layers of a model are made on this rank."""

from __future__ import annotations

from configs.schema import Config
from model.costs.communication import Gather, mhe_gather
from model.layers import Layers
from pretrain.distributed.layout import Layout


def make_layers(config: Config, layout: Layout) -> Layers:
    """Makes unsharded layers or, with tensor parallelism, this rank's shards of them; `config` is resolved."""
    if layout.size("tensor") == 1:
        return Layers()
    from model.parallel.tensor import TensorParallelLayers, parallel_config

    megatron = parallel_config(config.parallel.tensor, config.parallel.sequence)
    return TensorParallelLayers(megatron, layout.group("tensor"), gathered(config))


def gathered(config: Config) -> Gather:
    """`parallel.mhe_gather`, with "auto" resolved to what moves fewer bytes."""
    if config.parallel.mhe_gather != "auto":
        return config.parallel.mhe_gather
    tokens = config.training.micro_batch_size * config.row_length
    return mhe_gather(config.model, tokens, config.parallel.sequence)
