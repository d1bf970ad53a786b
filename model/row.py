"""A model as a row of layers: an unsharded model runs all of it, a pipeline stage (model/parallel/pipeline.py) a slice.

Each kind of model (model/registry.py) describes its row once: which modules there are, under which names, and what each layer
does to the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig
from model.attention.cache import Cache, LayerCache
from model.attention.registry import layer_configs, rotary_widths
from model.layers import UNSHARDED, Layers
from model.positions.masks import AttentionMask, positions_in_documents
from model.positions.positions import Positions, make_positions
from model.registry import model_kind


class Pass:
    """One forward pass: what the layers of a row read besides the hidden states.

    `recompute_activations`: blocks keep only their input and run a second time in the backward pass. `documents_BT`: the number
    of each token's document, None where attention ignores documents. `cache`: keys and values of earlier tokens. `last_only`:
    only the logits of the last token are needed.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Layers,
        recompute_activations: bool = False,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> None:
        self.config, self.layers, self.recompute_activations = config, layers, recompute_activations
        self.documents_BT, self.cache, self.last_only = documents_BT, cache, last_only
        self._layer_configs = layer_configs(config)
        self._positions: dict[object, Positions] = {}

    def begin(self, tokens_BS: Tensor) -> None:
        """Number the documents of these tokens and of the cached ones before them, if attention keeps documents apart."""
        if not self.config.separates_documents:
            return
        assert self.config.end_of_document is not None
        tokens_BT = tokens_BS if self.cache is None else self.cache.append_tokens(tokens_BS)
        self.documents_BT, self._positions = document_numbers(tokens_BT, self.config.end_of_document), {}

    @property
    def restarts_BT(self) -> Tensor | None:
        """The position of each token, cached ones included, where documents count from their own first token."""
        return None if self.documents_BT is None else positions_in_documents(self.documents_BT)

    @property
    def offset(self) -> int:
        """The number of cached tokens before this pass."""
        return self.cache.length if self.cache is not None else 0

    def length(self, x_SBH: Tensor) -> int:
        """The number of tokens in each sequence; under sequence parallelism this rank has a shard of them."""
        return x_SBH.shape[0] * (self.layers.size if self.layers.sequence else 1)

    def positions(self, x_SBH: Tensor, number: int = 0) -> Positions:
        """Positions for attention over these hidden states in layer `number`; made once for all layers with the same ones."""
        layer = self._layer_configs[number]
        wanted = self.length(x_SBH), x_SBH.dtype, x_SBH.device, layer.position, layer.sliding_window
        if wanted not in self._positions:
            mask = AttentionMask(causal=model_kind(layer.kind).causal, documents_BT=self.documents_BT)
            heads, widths = self.layers.own(layer.num_heads), rotary_widths(self.config)
            self._positions[wanted] = make_positions(
                layer, wanted[0], self.offset, x_SBH.dtype, x_SBH.device, mask, heads, widths
            )
        return self._positions[wanted]

    def run_block(self, block: nn.Module, x_SBH: Tensor, number: int) -> Tensor:
        """Block `number`, recomputed in the backward pass if this pass does so."""
        positions = self.positions(x_SBH, number)
        cache: LayerCache | None = self.cache.layers[number] if self.cache is not None else None
        out_SBH: Tensor
        if self.recompute_activations and torch.is_grad_enabled() and cache is None:
            out_SBH = checkpoint(block, x_SBH, positions, use_reentrant=False)  # restores the RNG, so dropout repeats
        else:
            out_SBH = block(x_SBH, positions, cache)
        return out_SBH


def document_numbers(tokens_BT: Tensor, end_of_document: int) -> Tensor:
    """The number of each token's document in its sequence, (B, T); an end-of-document token belongs to the one that it ends."""
    ends_BT = (tokens_BT == end_of_document).int()
    return ends_BT.cumsum(dim=1, dtype=torch.int32) - ends_BT


@dataclass(frozen=True)
class RowLayer:
    """One layer of a row.

    `modules` maps each module's path in the model, the prefix of its parameters' names, to a function that builds it. Layers
    with the same path share one module (tied embeddings). `run(holder, x, pass)` returns the next layer's input; the holder, a
    model or a part of one, has the modules at their paths. `weight`: the number of its parameters, by which pipeline stages are
    balanced; those of a shared module count in each layer.

    `block`: the configuration of its layer if its only module is a block, else None; blocks of the same configuration cost the
    same. Blocks are sharded, compiled and recomputed one by one, and every pipeline stage except the first begins with one.
    """

    modules: Mapping[str, Callable[[], nn.Module]]
    run: Callable[[Any, Tensor, Pass], Tensor]
    weight: int
    block: ModelConfig | None = None

    @property
    def is_block(self) -> bool:
        return self.block is not None

    def build(self, holder: nn.Module) -> None:
        """Add to the holder the modules that it lacks."""
        for path, build in self.modules.items():
            *parents, name = path.split(".")
            place = holder
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.ModuleList())
                place = place.get_submodule(parent)
            if not hasattr(place, name):
                place.add_module(name, build())


class RowModel(nn.Module):
    """A model of a resolved configuration (Config.resolved) that runs its row. init_weights sets its initial weights.

    `layers` makes its modules, unsharded or as this rank's shards. `recompute_activations`: see `Pass`.
    """

    def __init__(self, config: ModelConfig, layers: Layers = UNSHARDED, recompute_activations: bool = False) -> None:
        super().__init__()
        self.config, self.layers, self.recompute_activations = config, layers, recompute_activations
        self.row = self.describe(config, layers)
        for layer in self.row:
            layer.build(self)

    @staticmethod
    def describe(config: ModelConfig, layers: Layers) -> list[RowLayer]:
        """The row of a resolved configuration; ValueError for one that is not resolved."""
        raise NotImplementedError

    def forward(self, inputs: Any) -> Tensor:
        """What the last layer gives, for an objective to take losses of; `inputs` are the first layer's."""
        return self.run(inputs, Pass(self.config, self.layers, self.recompute_activations))

    def run(self, x: Any, pass_: Pass) -> Tensor:
        """`x` through all layers."""
        for layer in self.row:
            x = layer.run(self, x, pass_)
        return x

    def block_modules(self) -> list[nn.Module]:
        """The modules of the layers that are blocks."""
        return [self.get_submodule(path) for layer in self.row if layer.is_block for path in layer.modules]
