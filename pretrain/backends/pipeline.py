"""DeepSpeed's pipelines behind the Backend interface: a model split into stages, ZeRO 0 or 1 over the copies of each stage."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import model_row
from model.initialization import InitialWeights
from model.parallel.measure import measured_weights
from model.parallel.pipeline import Hidden, StageLayer, StagePart, row_bounds, stage_parts, unsharded_name
from model.parallel.sharding import partition_specs
from pretrain.backends.base import Accepts, StepResult, finite
from pretrain.backends.deepspeed import DeepSpeedBackend
from pretrain.checkpoints.stages import stage_note, stored_weights
from pretrain.checkpoints.state import State
from pretrain.distributed.layout import Layout
from pretrain.objectives.base import Examples, WeightedSum, mean_weight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology


class PipelineBackend(DeepSpeedBackend):
    """One stage of a pipeline. DeepSpeed runs complete steps only (one forward, one backward pass in turn); so does this."""

    overlaps = False  # DeepSpeed's pipelines cannot

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        """The stages are those of the run that wrote `checkpoint`, if that has as many stages and layers."""
        super().__init__(config, layout, checkpoint)
        self.term_names: list[str] = []
        self.mean_weight = 1.0  # of the running step's micro-batches
        self.shape: torch.Size | None = None  # of the labels that stages last exchanged hidden states for

    def build_module(self) -> nn.Module:
        config, layout = self.config, self.layout
        row = model_row(config.model, self.layers)
        parts = stage_parts(row, config.model, self.layers, config.training.recompute_activations)
        stored = None
        if self.checkpoint is not None:
            stored = stored_weights(self.checkpoint, layout.size("pipeline"), len(row))
        if stored is not None:
            self.weights = stored
        elif config.parallel.pipeline_balance == "time":
            self.weights = self._measured_weights(parts)
        else:
            self.weights = [layer.weight for layer in row]
        stages, data, tensor = layout.size("pipeline"), layout.size("data"), layout.size("tensor")
        bounds = row_bounds(row, self.weights, stages)
        topology = PipeModelDataParallelTopology(num_pp=stages, num_dp=data, num_mp=tensor)
        with torch.no_grad():  # tied weights are broadcast
            module = BalancedPipeline(bounds, layers=_specs(parts), topology=topology, loss_fn=self._loss)
        specs = {unsharded_name(name): spec for name, spec in partition_specs(module).items()}
        initial = InitialWeights(config.model, config.run.seed, specs, self.layers.rank)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(initial(unsharded_name(name)))
        return module

    @property
    def model_parallel_unit(self) -> None:
        """DeepSpeed takes its process groups from the pipeline itself."""

    def parameter_name(self, name: str) -> str:
        return unsharded_name(name)

    def engine_config(self) -> dict[str, Any]:
        # Between stages, tensor-parallel ranks with the same hidden states can send a part each and gather it again. With
        # sequence parallelism what they have are parts already.
        same = self.layout.size("tensor") > 1 and not self.config.parallel.sequence
        return {**super().engine_config(), "pipeline": {"pipe_partitioned": same, "grad_partitioned": same}}

    def train_step(self, micro_batches: list[Batch], learning_rate: float, accepts: Accepts = finite) -> StepResult:
        self.begin(learning_rate, accepts)
        step = [self.objective.examples(batch) for batch in micro_batches]
        self.mean_weight = mean_weight(step, self.device)
        self._expect(step[0])
        loss = float(self.engine.train_batch(iter([_for_stages(examples) for examples in step])))
        return self.result(loss, len(micro_batches))

    def own_loss(self) -> float:
        """Times the number of stages: each has its terms, the last one the objective's loss, and ranks take the mean."""
        total = float(self.engine.total_loss) if self.engine.is_last_stage() else 0.0
        return (total / self.engine.gradient_accumulation_steps() + self.own_terms()) * self.layout.size("pipeline")

    def take_auxiliary(self) -> dict[str, float]:
        return self._sum_over_stages(super().take_auxiliary())

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> WeightedSum:
        self.engine.total_loss = None  # DeepSpeed adds to the last step's, which has another shape
        examples = self.objective.examples(batch)
        self._expect(examples)
        given = iter([_for_stages(examples)])
        sums = self.engine.eval_batch(given, reduce_output=None, bcast_loss=False, num_micro_batches=1)
        empty = torch.empty(2, len(examples.labels), dtype=torch.float64, device=self.device)
        pair = sums[0] if self.engine.is_last_stage() else empty
        dist.broadcast(pair, self.layout.ranks("pipeline")[-1], group=self.layout.group("pipeline"))
        return WeightedSum(pair[0], pair[1])

    def _expect(self, examples: Examples) -> None:
        """Let stages agree anew on the shape of what they exchange if these examples have another one."""
        if self.shape is not None and examples.labels.shape != self.shape:
            self.engine.reset_activation_shape()
        self.shape = examples.labels.shape

    def state(self) -> State:
        return replace(super().state(), notes=stage_note(self.layout.size("pipeline"), self.weights))

    def owns(self, parameter: nn.Parameter) -> bool:
        replicated: bool = parameter.ds_pipe_replicated  # type: ignore[attr-defined]  # tied weights belong to their first stage
        return not replicated

    def model_groups(self) -> list[dist.ProcessGroup]:
        return [*super().model_groups(), self.layout.group("pipeline")]

    def _measured_weights(self, parts: Sequence[StagePart]) -> list[int]:
        training, size = self.config.training, (self.config.training.micro_batch_size, self.config.data.sequence_length)
        tokens_BS = torch.zeros(size, dtype=torch.long)
        batch = Batch(tokens_BS, tokens_BS, seeds=torch.zeros(len(tokens_BS), dtype=torch.long))
        examples = self.objective.examples(batch).to(self.layout.device)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32

        def loss(own: Tensor) -> Tensor:
            return self.objective.loss(own, examples.labels, examples.weights, self.layers).loss

        return measured_weights(parts, self.layers, examples.inputs, loss, dtype, self.config.model.init_std)

    def _loss(self, own: Tensor, targets: Any) -> Tensor:
        """Of a micro-batch on the last stage: its share of the step's mean, or in evaluation `WeightedSum.pair`."""
        labels_BS, weights_BS = targets if isinstance(targets, tuple) else (targets, None)
        total = self.objective.loss(own, labels_BS, weights_BS, self.layers)
        return total.over(self.mean_weight) if torch.is_grad_enabled() else total.pair()

    def _sum_over_stages(self, terms: dict[str, float]) -> dict[str, float]:
        """What stages have of each term. Names are agreed on when one of them is new, so that a step needs one reduction."""
        group = self.layout.group("pipeline")
        while True:
            news = not terms.keys() <= set(self.term_names)
            own = [(terms.get(name, 0.0), float(name in terms)) for name in self.term_names]
            summed = torch.tensor([(0.0, float(news)), *own], dtype=torch.float64, device=self.device)
            dist.all_reduce(summed, group=group)
            (_, found), *sums = summed.tolist()
            if not found:  # a term that has ended is left out, as by a run that resumes without it
                return {name: term for name, (term, stages) in zip(self.term_names, sums, strict=True) if stages}
            names: list[Any] = [None] * self.layout.size("pipeline")
            dist.all_gather_object(names, [*self.term_names, *terms], group=group)
            self.term_names = sorted({name for of_stage in names for name in of_stage})


class BalancedPipeline(PipelineModule):
    """A pipeline whose stage s has the layers [bounds[s], bounds[s + 1])."""

    def __init__(self, bounds: Sequence[int], **options: Any) -> None:
        self.parts = list(bounds)
        super().__init__(**options)

    def _partition_layers(self, method: str = "") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def _for_stages(examples: Examples) -> tuple[Any, Any]:
    """What DeepSpeed hands to the first stage, and to the last one for its loss; it knows no None."""
    return examples.inputs, examples.labels if examples.weights is None else (examples.labels, examples.weights)


def _specs(parts: Sequence[StagePart]) -> list[LayerSpec]:
    """DeepSpeed's description of the row; a stage builds the layers that are its own."""
    return [LayerSpec(StageLayer, part) if part.tied is None else _tied_spec(part, part.tied) for part in parts]


def _tied_spec(part: StagePart, path: str) -> TiedLayerSpec:
    """A stage builds one module for all its layers with this path; each runs as its own part."""

    def run(module: StageLayer, hidden: Hidden) -> Hidden:
        return module.run_as(part, hidden)

    return TiedLayerSpec(path, StageLayer, part, forward_fn=run, tied_weight_attr=f"{path}.weight")
