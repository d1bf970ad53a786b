"""DeepSpeed's pipelines behind the Backend interface: a model cut into stages, ZeRO 0 or 1 over the copies of each stage."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.initialization import InitialWeights
from model.layers import Layers
from model.parallel.pipeline import BlockLayer, StageLayer, TokenLayer, pipeline_layers
from pretrain.backends.base import StepResult
from pretrain.backends.deepspeed import DeepSpeedBackend
from pretrain.checkpoints.store import ENGINE_FOLDER, is_portable
from pretrain.distributed.layout import Layout
from pretrain.objectives import mean_weight, weighted_sum

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

TIED = "tokens"  # DeepSpeed's name for the token layer, which is the output layer, too
MEASUREMENTS = 3
WEIGHTS_FILE = "layer_weights.json"  # of a checkpoint: by what its stages are balanced


class PipelineBackend(DeepSpeedBackend):
    """One stage of a pipeline. DeepSpeed runs whole steps only (one forward, one backward pass in turn), so does this."""

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        """The stages are those of the run that wrote `checkpoint`, if that is given and not portable."""
        super().__init__(config, layout, checkpoint)
        self.term_names: list[str] = []
        self.mean_weight = 1.0  # of the running step's micro-batches

    def build_module(self) -> nn.Module:
        config, layout = self.config, self.layout
        row = pipeline_layers(config.model, self.layers, config.training.recompute_activations)
        if self.checkpoint is not None and not is_portable(self.checkpoint):
            self.weights = read_weights(self.checkpoint / ENGINE_FOLDER, len(row))
        elif config.parallel.pipeline_balance == "time":
            self.weights = measured_weights(row, config, layout, self.layers)
        else:
            self.weights = [layer.weight for layer in row]
        stages, data, tensor = layout.size("pipeline"), layout.size("data"), layout.size("tensor")
        topology = PipeModelDataParallelTopology(num_pp=stages, num_dp=data, num_mp=tensor)
        with torch.no_grad():  # tied weights are broadcast
            module = BalancedPipeline(self.weights, layers=_specs(row), topology=topology, loss_fn=self._loss)
        initial = InitialWeights(config.model, config.run.seed, self.layers.rank)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(initial(whole_name(name), parameter.shape))
        return module

    @property
    def model_parallel_unit(self) -> None:
        """DeepSpeed takes its groups from the pipeline itself."""

    def parameter_name(self, name: str) -> str:
        return whole_name(name)

    def engine_config(self) -> dict[str, Any]:
        # Between stages, tensor-parallel ranks with the same hidden states can send a part each and gather it again. With
        # sequence parallelism what they have are parts already.
        same = self.layout.size("tensor") > 1 and not self.config.parallel.sequence
        return {**super().engine_config(), "pipeline": {"pipe_partitioned": same, "grad_partitioned": same}}

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        self.set_learning_rate(learning_rate)
        self.mean_weight = mean_weight(micro_batches, self.device)
        loss = float(self.engine.train_batch(iter([self._stage_inputs(batch) for batch in micro_batches])))
        return self.result(loss, len(micro_batches))

    def take_auxiliary(self) -> dict[str, float]:
        return self._sum_over_stages(super().take_auxiliary())

    @torch.no_grad()
    def eval_losses(self, batch: Batch) -> Tensor:
        self.engine.total_loss = None  # DeepSpeed adds to the last step's, which has another shape
        losses = self.engine.eval_batch(
            iter([self._stage_inputs(batch)]), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        losses_BS = torch.empty(batch.labels.shape, dtype=torch.float32, device=self.device)
        if self.engine.is_last_stage():
            losses_BS.copy_(losses[0])
        group = self.engine.grid.get_pipe_parallel_group()
        dist.broadcast(losses_BS, dist.get_process_group_ranks(group)[-1], group=group)
        return losses_BS

    def save(self, folder: Path) -> list[Path]:
        written = super().save(folder)
        if not self.layout.is_main:
            return written
        path = folder / ENGINE_FOLDER / WEIGHTS_FILE
        write_text(path, json.dumps(self.weights))
        return [*written, path]

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        for parameter in super().counted_parameters():
            if not parameter.ds_pipe_replicated:  # type: ignore[attr-defined]  # tied weights count on their first stage
                yield parameter

    def model_groups(self) -> list[dist.ProcessGroup]:
        return [*super().model_groups(), self.engine.grid.get_pipe_parallel_group()]

    def _stage_inputs(self, batch: Batch) -> tuple[Any, Any]:
        """What DeepSpeed hands to the first stage, and to the last one for `_loss`."""
        inputs, labels = self.objective.stage_inputs(batch)
        return inputs, labels if batch.weights is None else (labels, batch.weights)

    def _loss(self, own_SBV: Tensor, labels: Any) -> Tensor:
        labels_BS, weights_BS = labels if isinstance(labels, tuple) else (labels, None)
        losses_BS = self.layers.losses(own_SBV, labels_BS)
        return weighted_sum(losses_BS, weights_BS).over(self.mean_weight) if torch.is_grad_enabled() else losses_BS

    def _sum_over_stages(self, terms: dict[str, float]) -> dict[str, float]:
        """Terms of the whole pipeline. Names are agreed on when one of them is new, so that a step needs one reduction."""
        group = self.engine.grid.get_pipe_parallel_group()
        while True:
            news = not terms.keys() <= set(self.term_names)
            values = [float(news), *(terms.get(name, 0.0) for name in self.term_names)]
            summed = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(summed, group=group)
            found, *sums = summed.tolist()
            if not found:
                return dict(zip(self.term_names, sums, strict=True))
            names: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(names, [*self.term_names, *terms], group=group)
            self.term_names = sorted({name for of_stage in names for name in of_stage})


class BalancedPipeline(PipelineModule):
    """A pipeline whose stages have equal shares of given weights, as far as whole blocks allow."""

    def __init__(self, weights: Sequence[int], **options: Any) -> None:
        self.weights = weights
        super().__init__(**options)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = stage_bounds(self.weights, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def stage_bounds(weights: Sequence[int], stages: int) -> list[int]:
    """Stage s has layers [bounds[s], bounds[s + 1]) of a row; the heaviest stage is as light as can be.

    Every stage has a block: the two layers before the blocks stay with the first one and the two behind with the last, since
    DeepSpeed's optimizers must have the same groups of parameters on all stages.
    """
    items = [sum(weights[:3]), *weights[3:-3], sum(weights[-3:])] if len(weights) > 5 else [sum(weights)]
    heaviest: dict[tuple[int, int], tuple[int, int]] = {
        (0, 0): (0, 0)
    }  # (stages, items so far) → (their heaviest, where it began)
    for stage in range(1, stages + 1):
        for end in range(stage, len(items) + 1):
            starts = [start for start in range(stage - 1, end) if (stage - 1, start) in heaviest]
            heaviest[stage, end] = min((max(heaviest[stage - 1, start][0], sum(items[start:end])), start) for start in starts)
    bounds = [len(items)]
    for stage in range(stages, 0, -1):
        bounds.append(heaviest[stage, bounds[-1]][1])
    inner = [bound + 2 for bound in bounds[-2:0:-1]]
    return [0, *inner, len(weights)]


def _specs(row: Sequence[StageLayer]) -> list[LayerSpec]:
    """DeepSpeed's description of the row; a stage builds the layers that are its own."""
    first, *others, last = row
    if last.kind is not TokenLayer:
        return [LayerSpec(layer.kind, *layer.arguments) for layer in row]
    tied = {"tied_weight_attr": "token_embedding.weight"}
    return [
        TiedLayerSpec(TIED, first.kind, *first.arguments, **tied),
        *(LayerSpec(layer.kind, *layer.arguments) for layer in others),
        TiedLayerSpec(TIED, last.kind, *last.arguments, forward_fn=TokenLayer.project, **tied),
    ]


def read_weights(engine: Path, layers: int) -> list[int]:
    """By what a checkpoint's stages are balanced: the weight of each layer of the row."""
    path = engine / WEIGHTS_FILE
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(weights, list) or len(weights) != layers or any(type(weight) is not int for weight in weights):
        raise UserError(f"{path}: must hold the weights of {layers} layers, whole numbers")
    return weights


def whole_name(name: str) -> str:
    """The name in DecoderLM of a pipeline's parameter."""
    return name.removeprefix(f"tied_modules.{TIED}.") if name.startswith("tied_modules.") else name.partition(".")[2]


def measured_weights(row: Sequence[StageLayer], config: Config, layout: Layout, layers: Layers) -> list[int]:
    """Microseconds of each layer's forward and backward pass over one micro-batch, the same on every rank.

    One block is measured for all. Every rank calls it, since layers may be sharded; the first rank's times count.
    """
    batch, length = config.training.micro_batch_size, config.data.sequence_length
    tokens_BS = torch.zeros(batch, length, dtype=torch.long, device=layout.device)
    times: list[int] = []
    hidden: Any = tokens_BS
    for number, layer in enumerate(row):
        last = number == len(row) - 1
        if layer.kind is BlockLayer and row[number - 1].kind is BlockLayer:
            times.append(times[-1])
            continue
        module: Any = layer.build().to(layout.device, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=config.model.init_std)
        forward = module.project if last and layer.kind is TokenLayer else module
        seconds = []
        for _ in range(MEASUREMENTS + 1):
            inputs = _leaf(hidden)
            _wait(layout.device)
            started = time.perf_counter()
            out = forward(inputs)
            value = layers.losses(out, tokens_BS) if last else out[0] if isinstance(out, tuple) else out
            value.sum().backward()
            _wait(layout.device)
            seconds.append(time.perf_counter() - started)
        times.append(max(1, round(median(seconds[1:]) * 1e6)))
        hidden = out
    layers.auxiliary.take()  # no part of any step
    shared = [times]
    dist.broadcast_object_list(shared, src=0, device=layout.device)
    return shared[0]


def _leaf(hidden: Any) -> Any:
    """The same values without a graph behind them, wanting a gradient if they are hidden states."""
    if isinstance(hidden, tuple):
        return _leaf(hidden[0]), hidden[1]
    return hidden.detach().requires_grad_(hidden.is_floating_point())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
