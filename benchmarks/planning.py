"""What launch/plan.py predicts for published runs, beside what they took: `python benchmarks/planning.py --json FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from configs.durable import write_text
from configs.schema import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from configs.yaml_text import parse
from launch.common import output_file, run_command
from model.costs.communication import collectives
from model.costs.flops import flops_per_token
from model.costs.parameters import parameters
from pretrain.planning.cluster import Cluster, make_cluster
from pretrain.planning.timing import PARTS, Execution, StepTime, step_time
from pretrain.planning.traffic import Transfer

BUCKETS = 8  # of gradients and weights, in the distributed optimizer
RUNS = Path(__file__).with_name("published_runs.yaml")


@dataclass(frozen=True)
class Published:
    """One run of published_runs.yaml."""

    name: str
    source: str
    config: Config
    gpus: int
    cluster: Cluster
    execution: Execution
    tokens_per_second: float  # of one device
    fitted: bool

    def step(self) -> StepTime:
        """As predicted."""
        return step_time(self.config, self.gpus, self.cluster, lambda stage: list(self.sent()), self.execution)

    def sent(self) -> Iterator[Transfer]:
        """What a rank of such engines sends in a step: FSDP's, or a distributed optimizer's, tensor parallelism, pipelines."""
        config, parallel, training = self.config, self.config.parallel, self.config.training
        data = self.gpus // (parallel.tensor * parallel.pipeline * self.execution.context)
        count = training.global_batch_size // (training.micro_batch_size * data)
        values = sum(parameters(config.model).values()) // (parallel.tensor * parallel.pipeline)
        blocks, tokens = config.model.num_layers // parallel.pipeline, training.micro_batch_size * config.row_length
        for move in collectives(
            config.model, parallel.tensor, parallel.sequence, "weights", training.micro_batch_size, config.row_length
        ):
            share = count / (1 if move.part in ("embedding", "loss") else parallel.pipeline)
            calls, size = round(move.calls * share), round(move.bytes * share)
            yield Transfer("tensor", move.op, move.part, calls, size, parallel.tensor)
        if config.backend == "fsdp":
            for pass_ in ("forward", "backward"):
                yield Transfer("shard", "all_gather", "weights", count * blocks, 2 * values * count, data, pass_)
            yield Transfer("shard", "reduce_scatter", "gradients", count * blocks, 4 * values * count, data, "backward")
        else:
            yield Transfer("data", "reduce_scatter", "gradients", BUCKETS, 4 * values, data)
            yield Transfer("data", "all_gather", "weights", BUCKETS, 2 * values, data)
        if parallel.pipeline > 1:
            sends = 2 * count * self.execution.interleave
            yield Transfer(
                "pipeline", "send", "activations", sends, sends * 2 * tokens * config.model.hidden_size // parallel.tensor, 2
            )

    def predicted(self) -> float:
        """Tokens a second and device."""
        return self.config.training.global_batch_size * self.config.row_length / self.gpus / self.step().total

    def mfu(self, tokens_per_second: float) -> float:
        """Counted as this project does, against the bf16 peak."""
        of_token = flops_per_token(self.config.model, self.config.row_length)
        return tokens_per_second * of_token / self.cluster.device.peak["bf16"]


def published_runs() -> list[Published]:
    """All runs, in the order of the file."""
    table = parse(RUNS.read_text(encoding="utf-8"))
    return [_published(table, run) for run in table["runs"]]


def spread(runs: Iterable[Published]) -> float:
    """The root of the mean square of log(predicted / published)."""
    logs = [math.log(run.predicted() / run.tokens_per_second) for run in runs]
    return math.sqrt(sum(value**2 for value in logs) / len(logs))


def _published(table: dict[str, Any], run: dict[str, Any]) -> Published:
    model = _model(table, run["model"], run["length"])
    tensor, pipeline, context = run.get("tensor", 1), run.get("pipeline", 1), run.get("context", 1)
    interleave, precision = run.get("interleave", 1), run.get("precision", "bf16")
    settings = table["software"][run["software"]]
    sharded = "hides" not in settings
    config = Config(
        backend="fsdp" if sharded else "deepspeed",
        run=RunConfig(folder="runs/published"),
        model=model,
        data=DataConfig(path="data", sequence_length=run["length"]),
        training=TrainingConfig(steps=1, global_batch_size=run["batch"], micro_batch_size=run["micro"], precision=precision),
        parallel=ParallelConfig(tensor=tensor, sequence=tensor > 1, pipeline=pipeline),
    ).resolved(model.vocab_size or 1)
    sizes = {"TP": tensor, "PP": pipeline, "CP": context, "VP": interleave}
    words = [run["model"], *(f"{name} {size}" for name, size in sizes.items() if size > 1), run["on"], f"× {run['gpus']}"]
    details = [run["software"].partition("_")[2], precision if precision != "bf16" else ""]
    return Published(
        name=" ".join(words) + "".join(f", {detail}" for detail in details if detail),
        source=run["source"],
        config=config,
        gpus=run["gpus"],
        cluster=make_cluster(run["on"]),
        execution=Execution(**settings, interleave=interleave, context=context),
        tokens_per_second=_tokens(run, model),
        fitted=run.get("fitted", False),
    )


def _model(table: dict[str, Any], name: str, length: int) -> ModelConfig:
    fields = dict(table["models"][name])
    fields = {**table["like"][fields.pop("like")], **fields}
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_heads"])
    return ModelConfig(**fields, max_position_embeddings=length if fields.get("position", "learned") == "learned" else None)


def _tokens(run: dict[str, Any], model: ModelConfig) -> float:
    if "tokens" in run:
        return float(run["tokens"])
    if "rate" in run:
        return float(run["rate"] / run["gpus"])
    beyond = 12 * model.num_layers * model.hidden_size * (run["length"] - (run["length"] + 1) / 2)  # not causal
    return float(run["tflops"] * 1e12 / (flops_per_token(model, run["length"]) + beyond))


def row(run: Published) -> str:
    """The run's row in docs/planning.md; bold if the constants are fitted to it."""
    predicted = run.predicted()
    off = f"{100 * (predicted / run.tokens_per_second - 1):+.0f} %".replace("-", "−")
    name = f"**{run.name}**" if run.fitted else run.name
    mfu = f"{run.mfu(run.tokens_per_second):.0%}".replace("%", " %")
    return f"| {name} | {run.source} | {run.tokens_per_second:,.0f} | {predicted:,.0f} | {off} | {mfu} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE")
    given, runs = parser.parse_args(), published_runs()
    print("| run | source | published | predicted | off | MFU |\n|---|---|---|---|---|---|")
    print("\n".join(map(row, runs)))
    held_out = [run for run in runs if not run.fitted]
    print(f"\nspread: {spread(runs):.3f} of all, {spread(held_out):.3f} of {len(held_out)} held out")
    if given.json:
        write_text(given.json, json.dumps([figures(run) for run in runs], indent=1) + "\n")


def figures(run: Published) -> dict[str, Any]:
    """Rates, and the shares of a step."""
    step = run.step()
    shares = {part: round(getattr(step, part) / step.total, 4) for part in PARTS}
    rates = {"published": run.tokens_per_second, "predicted": run.predicted(), "fitted": run.fitted}
    return {"run": run.name, "source": run.source, **rates, **shares}


if __name__ == "__main__":
    run_command(main, one_process=True)
