"""Which layers one rank has, and what it keeps of their parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from configs.schema import Config
from model.attention.registry import layer_configs
from pretrain.engines import engine
from pretrain.planning.pieces import Piece, Pieces, Shape, pieces_of


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline on one tensor-parallel rank, or the model; `first` and `last`: whether it has the model's ends.

    `pieces` are its layers in order, `blocks` which of them are blocks. `parameters` have their names in the unsharded model,
    each once; `tied` is the embedding's size if a layer of the stage uses it a second time.
    """

    pieces: tuple[Piece, ...]
    blocks: tuple[bool, ...]
    parameters: tuple[Shape, ...]
    tied: int
    shared: int
    first: bool
    last: bool

    @property
    def values(self) -> int:
        return sum(shape.values for shape in self.parameters)

    @property
    def around(self) -> tuple[Shape, ...]:
        """The parameters outside of blocks."""
        return tuple(shape for shape in self.parameters if not shape.name.startswith("blocks."))

    def groups(self, config: Config) -> list[list[Shape]]:
        """The parameters of each group of the optimizer."""
        from pretrain.optim.groups import grouped_names  # loads torch

        of_names = {shape.name: shape for shape in self.parameters}
        names = grouped_names({shape.name: shape.dimensions for shape in self.parameters}, config.optimizer)
        return [[of_names[name] for name in group] for group in names]

    def kept(self, config: Config) -> Counter[int]:
        """How many values have so many bytes of the optimizer's state."""
        from pretrain.optim.groups import kept_by_name  # loads torch

        of_names = kept_by_name({shape.name: shape.dimensions for shape in self.parameters}, config.optimizer)
        counts = Counter[int]()
        for shape in self.parameters:
            counts[of_names[shape.name].state_bytes] += shape.values
        return counts


def data_ranks(config: Config, ranks: int) -> int:
    """Those that share the batch."""
    return ranks // (config.parallel.tensor * config.parallel.pipeline)


def micro_batches(config: Config, ranks: int) -> int:
    """Of a rank in an optimizer step."""
    return config.training.global_batch_size // (config.training.micro_batch_size * data_ranks(config, ranks))


def stages_of(config: Config, gpu: bool) -> list[Stage]:
    """All stages of a resolved configuration, one without a pipeline."""
    pieces = pieces_of(config, gpu, keeps_gradients=engine(config.backend).sharding(config.parallel) == "fsdp")
    row = pieces.of_row(layer_configs(config.model))
    bounds = [0, len(row)]
    if config.parallel.pipeline > 1:
        from pretrain.planning.counting import row_stages  # loads torch

        bounds = row_stages(config)
    return [
        _stage(pieces, row[start:end], start == 0, end == len(row)) for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def _stage(pieces: Pieces, layers: list[tuple[str, Piece]], first: bool, last: bool) -> Stage:
    named = [Shape(prefix + name, *rest) for prefix, piece in layers for name, *rest in piece.parameters]
    parameters = {shape.name: shape for shape in named}
    tied = sum(shape.values for shape in named) - sum(shape.values for shape in parameters.values())
    blocks = tuple(bool(prefix) for prefix, _ in layers)
    ordered = tuple(sorted(parameters.values()))
    return Stage(tuple(piece for _, piece in layers), blocks, ordered, tied, pieces.shared, first, last)
