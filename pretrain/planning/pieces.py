"""What one rank's share of each layer holds, and in which layers it lies: counted once for all layers of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from configs.schema import Config, ModelConfig, ParallelConfig

COUNTED = 2  # samples of a micro-batch that are counted; what further ones hold is as much again as the last


class Shape(NamedTuple):
    """A parameter on a rank: its name, how many values the rank has, its dimensions, and the size of the first of them."""

    name: str
    values: int
    dimensions: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """Bytes of one layer in one micro-batch, beside its input and its parameters.

    `output` is what the next layer reads. `kept`: what is held from the layer's forward pass to its backward pass, `output`
    included. `forward` and `backward`: the most that is held above what was there before the forward pass, in either pass.
    The names of `parameters` are those in the unsharded model; of a block, those in the block.
    """

    parameters: tuple[Shape, ...]
    output: int
    kept: int
    forward: int
    backward: int

    @property
    def values(self) -> int:
        """Of its parameters."""
        return sum(shape.values for shape in self.parameters)

    def recomputed(self) -> Piece:
        """The same with its forward pass run a second time in the backward pass, beside the gradient of its output."""
        return replace(self, kept=self.output, backward=max(self.backward, self.forward + self.output))

    def grown(self, smaller: Piece, samples: int) -> Piece:
        """With `samples` more than this has, if `smaller` has one less."""

        def more(name: str) -> int:
            return getattr(self, name) + samples * (getattr(self, name) - getattr(smaller, name))  # type: ignore[no-any-return]

        return Piece(self.parameters, *map(more, ("output", "kept", "forward", "backward")))


@dataclass(frozen=True)
class Pieces:
    """The layers of a model: before the blocks, a block of each kind, after the blocks; `shared`: positions and masks."""

    before: tuple[Piece, ...]
    blocks: Mapping[ModelConfig, Piece]
    after: tuple[Piece, ...]
    shared: int

    def grown(self, smaller: Pieces, samples: int) -> Pieces:
        """See `Piece.grown`."""

        def of_all(mine: tuple[Piece, ...], theirs: tuple[Piece, ...]) -> tuple[Piece, ...]:
            return tuple(own.grown(other, samples) for own, other in zip(mine, theirs, strict=True))

        blocks = {kind: piece.grown(smaller.blocks[kind], samples) for kind, piece in self.blocks.items()}
        shared = self.shared + samples * (self.shared - smaller.shared)
        return Pieces(of_all(self.before, smaller.before), blocks, of_all(self.after, smaller.after), shared)

    def of_row(self, layers: tuple[ModelConfig, ...]) -> list[tuple[str, Piece]]:
        """Every layer of the row with what its parameters' names begin with; `layers` are the configurations of its blocks."""
        blocks = [(f"blocks.{number}.", self.blocks[layer]) for number, layer in enumerate(layers)]
        return [*(("", piece) for piece in self.before), *blocks, *(("", piece) for piece in self.after)]


_COUNTED: dict[str, Pieces] = {}


def pieces_of(config: Config, gpu: bool, keeps_gradients: bool) -> Pieces:
    """The pieces of a resolved configuration's model on one rank, with the kernels of GPUs or of CPUs.

    Layouts that differ only in what pieces do not depend on share them.
    """
    from pretrain.distributed.layers import gathered  # loads torch

    parallel, samples = ParallelConfig(), config.training.micro_batch_size
    if config.parallel.tensor > 1:
        tensor, sequence = config.parallel.tensor, config.parallel.sequence
        parallel = ParallelConfig(tensor=tensor, sequence=sequence, mhe_gather=gathered(config))
    precision = "fp32" if config.training.precision == "fp32" else "bf16"
    counted = []
    for size in range(1, min(samples, COUNTED) + 1):
        training = config.training.model_copy(update={"micro_batch_size": size, "precision": precision})
        one = config.model_copy(update={"parallel": parallel, "training": training})
        counted.append(_counted(one, gpu, keeps_gradients))
    return counted[-1] if samples <= COUNTED else counted[-1].grown(counted[-2], samples - COUNTED)


def _counted(config: Config, gpu: bool, keeps_gradients: bool) -> Pieces:
    training = config.training
    objective = training.objective, training.z_loss, training.masked, training.spans
    key = repr((config.model, config.parallel, objective, training.precision, training.micro_batch_size, config.row_length))
    key += f"{gpu} {keeps_gradients}"
    if key not in _COUNTED:
        from pretrain.planning.counting import count_pieces  # loads torch

        _COUNTED[key] = count_pieces(config, gpu, keeps_gradients)
    return _COUNTED[key]
