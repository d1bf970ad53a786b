"""How pipeline stages build and run a model's row (model/row.py); independent of the engine.

Stages exchange only tensors: hidden states and, if attention keeps documents apart, the documents of the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.layers import Layers
from model.parallel.balance import stage_bounds
from model.row import Pass, RowLayer

Hidden = Tensor | tuple[Tensor, Tensor]  # hidden states (S, B, H) and, if attention keeps them apart, documents (B, S)
TIED_MODULES = "tied_modules"  # where DeepSpeed's pipelines store modules that two layers share


class StagePass:
    """Provides the layers of a stage with one `Pass` per micro-batch; without documents one serves all micro-batches."""

    def __init__(self, config: ModelConfig, layers: Layers, recompute_activations: bool) -> None:
        self._arguments = config, layers, recompute_activations
        self._pass = Pass(*self._arguments)

    def __call__(self, documents_BS: Tensor | None) -> Pass:
        if self._pass.documents_BT is not documents_BS:
            self._pass = Pass(*self._arguments, documents_BT=documents_BS)
        return self._pass


@dataclass(frozen=True)
class StagePart:
    """A layer of the row on a stage.

    `documents_follow`: a later layer needs the documents. `tied`: the path of its module, if another layer shares it.
    """

    layer: RowLayer
    stage_pass: StagePass
    documents_follow: bool
    tied: str | None

    def build(self) -> StageLayer:
        return StageLayer(self)


class StageLayer(nn.Module):
    """The modules of a layer, at their paths in the unsharded model."""

    def __init__(self, part: StagePart) -> None:
        super().__init__()
        self.part = part
        part.layer.build(self)

    def forward(self, hidden: Hidden) -> Hidden:
        return self.run_as(self.part, hidden)

    def run_as(self, part: StagePart, hidden: Hidden) -> Hidden:
        """Run `part` with the modules of this layer. The first part of a row gets token ids (B, S)."""
        x, documents_BS = hidden if isinstance(hidden, tuple) else (hidden, None)
        pass_ = part.stage_pass(documents_BS)
        x = part.layer.run(self, x, pass_)
        return (x, pass_.documents_BT) if part.documents_follow and pass_.documents_BT is not None else x


def stage_parts(
    row: Sequence[RowLayer], config: ModelConfig, layers: Layers, recompute_activations: bool = False
) -> list[StagePart]:
    """The row of a resolved configuration as parts of stages; each rank builds the layers of its own stage."""
    stage_pass, tied = StagePass(config, layers, recompute_activations), tied_modules(row)
    last_block = max(number for number, layer in enumerate(row) if layer.is_block)
    return [StagePart(layer, stage_pass, number < last_block, tied.get(number)) for number, layer in enumerate(row)]


def tied_modules(row: Sequence[RowLayer]) -> dict[int, str]:
    """The numbers of layers that share their module with another layer, and its path."""
    uses = Counter(path for layer in row for path in layer.modules)
    return {number: path for number, layer in enumerate(row) for path in layer.modules if uses[path] > 1}


def row_bounds(row: Sequence[RowLayer], weights: Sequence[int], stages: int) -> list[int]:
    """Stage s has layers [bounds[s], bounds[s + 1]) of the row, balanced by `weights` of its layers.

    Every stage has a block, since DeepSpeed's optimizers need the same parameter groups on all stages: layers before the first
    block share its stage, layers after the last block share that one's.
    """
    _, *starts = (number for number, layer in enumerate(row) if layer.is_block)
    return stage_bounds(weights, starts, stages)


def unsharded_name(name: str) -> str:
    """A parameter's name in the unsharded model, from its name in DeepSpeed's pipeline."""
    _, _, rest = name.partition(".")
    return rest.partition(".")[2] if name.startswith(f"{TIED_MODULES}.") else rest
