"""What a person sees while training: a header, then a bar on a terminal or plain lines anywhere else. One rank speaks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from tqdm import tqdm

from configs.schema import AverageConfig, Config, GHAConfig, ModelConfig, as_yaml
from data_pipeline.mix.order import SampleOrder
from data_pipeline.mix.plan import Plan
from data_pipeline.read.manifest import Manifest, read_manifest
from data_pipeline.read.packed import samples_per_epoch
from data_pipeline.read.sets import UNNAMED, validation_sets
from model.attention.registry import layer_kinds, model_projections, variant_of
from model.costs.memory import average_bytes
from model.costs.parameters import parameters
from model.huggingface.stock import SWITCHES, find_stock
from pretrain.distributed.layers import gathered
from pretrain.distributed.layout import Layout
from pretrain.engines import layout_words


class Progress:
    """Prints to standard output on the first rank; silent on the others."""

    def __init__(self, config: Config, layout: Layout, first_step: int) -> None:
        self.steps = config.training.steps
        self.every = config.logging.every_steps
        self.first_step = first_step
        self.rank, self.speaks = layout.rank, layout.is_main
        self.started = time.monotonic()
        self.bar = None
        if self.speaks and sys.stdout.isatty():
            self.bar = tqdm(total=self.steps, initial=first_step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.speaks:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(
        self,
        step: int,
        loss: float,
        terms: dict[str, float],
        learning_rate: float,
        grad_norm: float,
        tokens_per_second: float,
        mfu: float | None,
        hfu: float | None = None,
    ) -> None:
        """Report optimizer step `step`, counted from 1: `loss` is the objective's, in nats, `terms` the other terms."""
        used = {name: f"{share:.1%}" for name, share in (("MFU", mfu), ("HFU", hfu)) if share is not None}
        if self.bar is not None:
            shown = {
                "loss": f"{loss:.4f}",
                **{name: f"{term:.4f}" for name, term in terms.items()},
                "lr": f"{learning_rate:.2e}",
                "grad": f"{grad_norm:.2f}",
                "tok/s": f"{tokens_per_second:,.0f}",
            }
            self.bar.set_postfix(shown | used, refresh=False)
            self.bar.update()
        elif self.speaks and (step % self.every == 0 or step in (self.first_step + 1, self.steps)):
            others = "".join(f" | {name} {term:.4f}" for name, term in terms.items())
            utilisation = "".join(f" | {name} {share}" for name, share in used.items())
            self.say(
                f"step {step:>{len(str(self.steps))}}/{self.steps} | loss {loss:.4f}{others} | lr {learning_rate:.2e} | "
                f"grad {grad_norm:.2f} | {tokens_per_second:,.0f} tok/s{utilisation} | left {self._time_left(step)}"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _time_left(self, step: int) -> str:
        per_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
        return str(timedelta(seconds=round(per_step * (self.steps - step))))


class SpokenLog(logging.Handler):
    """Passes log messages to `Progress.say`. What concerns one rank only, a warning, every rank says."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        if self.progress.speaks:
            self.progress.say(record.getMessage())
        elif record.levelno >= logging.WARNING:
            print(f"rank {self.progress.rank}: {record.getMessage()}", file=sys.stderr, flush=True)


def _gha(gha: GHAConfig) -> str:
    """What happens to the heads, such as: 8 groups by value maps, α 0.03, β 0.01, and when heads are elected."""
    if gha.stage == "off":
        return ""
    groups = f"{gha.groups or f'2 to {gha.max_groups}'} groups by {gha.feature_map} maps"
    if gha.stage == "vote":
        return f"{groups} if there are none yet; {gha.heads_per_group} heads of each are elected"
    until = "" if gha.end_step is None else f" until step {gha.end_step:,}"
    text = f"{groups}, α {gha.alpha:g}, β {gha.beta:g}{until}"
    return (
        text
        if gha.stage == "constrain"
        else f"{text}; heads are elected and the others pruned at step {gha.vote_at_step or 0:,}"
    )


def _average(config: Config, layout: Layout) -> str:
    """Which average of the weights checkpoints hold, and what a rank keeps for it."""
    average = config.training.average
    if average == AverageConfig():
        return ""
    own = sum(parameters(config.model).values()) // (layout.size("tensor") * layout.size("pipeline"))
    size = f"{average_bytes(average, own, layout.size('data')) / 2**20:,.1f} MiB on each rank"
    if average.decay is not None:
        return f"exponential, decay {average.decay}; {size}"
    return f"of the last {average.last} saves; {size}, in host memory"


def _export(model: ModelConfig) -> str:
    """The formats of launch/export.py for this model: its stock architecture, or the field that stands in the way."""
    match = find_stock(model)
    if match.stock is None:
        return f"native only: {match.reason}"
    kept = f"{match.kv_heads} head{'s' * (match.kv_heads > 1)} of keys and values"
    return f"stock ({match.stock.name}, {kept}), gguf or native"


def _settings(model: ModelConfig) -> str:
    """What attention has beside its name: fields of its variants and switches that are not at their defaults."""
    fields = [*(field for layer in layer_kinds(model) for field in variant_of(layer).options), *SWITCHES]
    return ", ".join(f"{field} {as_yaml(getattr(model, field))}" for field in dict.fromkeys(fields) if model.changed(field))


def _data(config: Config, known: Sequence[Manifest] | str) -> str:
    """What is trained on: one source, or a line for each with its share of all steps and how often it is used; or a stream."""
    left_out = SampleOrder(config.training.skip_samples).left_out
    common = f"sequence {config.data.sequence_length}" + (f"; {left_out:,} samples left out" if left_out else "")
    if isinstance(known, str):
        return f"{known}; {common}" + ("; no validation.sets" if not config.validation.sets else "")
    trains = [manifest.splits["train"] for manifest in known]
    sizes = [
        f"{source.path}: {train.documents:,} documents, {train.tokens:,} tokens"
        for source, train in zip(config.data.parts, trains, strict=True)
    ]
    if len(sizes) == 1:
        return f"{sizes[0]}; {common}"
    uses = Plan.of(config.data, config.training).usage(config.training.steps)
    lines = [f"{use.label} {use.share:.3g}, {use.epochs:.3g} epochs: {size}" for use, size in zip(uses, sizes, strict=True)]
    return "\n        ".join([f"{len(sizes)} sources; {common}", *lines])


def _sets(config: Config) -> str:
    """Validation sets with names, how much of each is measured, and which sources have none."""
    lines, found = [], validation_sets(config.data, config.validation)
    for name, path in found.items() if found.keys() != {UNNAMED} else ():
        size, most = samples_per_epoch(path, config.data, "valid"), config.validation.samples
        measured = f"; {most:,} are measured" if most is not None and most < size else ""
        lines.append(f"{name}: {path}: {read_manifest(path).splits['valid'].documents:,} documents, {size:,} samples{measured}")
    lacking = [] if config.validation.sets else [part.label for part in config.data.parts if part.label not in found]
    if lacking and found.keys() != {UNNAMED}:
        lines.append(f"no split valid: {', '.join(lacking)}")
    return "\n        ".join(lines)


def header(config: Config, layout: Layout, data: Sequence[Manifest] | str, first_step: int) -> str:
    """What is about to run, in seven lines.

    And more for sources, validation sets, another objective, averages, `gha` and tensor parallelism. `data`: the manifests of
    all sources, or what is streamed, in words.
    """
    model, training = config.model, config.training
    parts = parameters(model)
    total, attention = sum(parts.values()), parts["attention"]
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    device = torch.cuda.get_device_name(layout.device) if layout.device.type == "cuda" else "CPU"
    heads = f"{model.num_heads} heads × {model.head_width}"
    data_size = layout.size("data")
    accumulation = training.global_batch_size // (training.micro_batch_size * data_size)
    batch = f"batch {training.global_batch_size} = {data_size} × {accumulation} × {training.micro_batch_size}"
    steps = training.steps - first_step
    lines = {
        "run": config.run.folder,
        "model": f"{model.attention_words}, {model.num_layers} layers × {model.hidden_size}, {heads}, "
        f"position {model.position}",
        "params": f"{total / 1e6:.2f} M, attention {attention / 1e6:.2f} M ({attention / total:.1%})",
        "layout": f"{layout.world_size} × {device}, {layout_words(config, layout.world_size)}, {training.precision}, {batch}",
        "data": _data(config, data),
        "to go": f"{steps:,} steps × {tokens_per_step:,} = {steps * tokens_per_step:,} tokens"
        if steps
        else "nothing: all steps are done",
    }
    if settings := _settings(model):
        lines["with"] = settings
    if sets := _sets(config):
        lines["sets"] = sets
    if training.objective != "next_token":
        lines["learns"] = f"{training.objective}, in rows of {config.row_length:,} tokens"
    lines["export"] = _export(model)
    if average := _average(config, layout):
        lines["average"] = average
    if gha := _gha(config.gha):
        lines["gha"] = gha
    if config.gha.stage == "vote":
        lines["to go"] = f"a vote: {config.gha.vote_batches or 'an epoch of'} batches, nothing is trained"
    if layout.size("tensor") > 1:
        shared = any(one.is_gathered(layout.size("tensor")) for _, one in model_projections(model))
        projection = f"{gathered(config)} gathered" if shared else "none"
        lines["tensor"] = f"sequence parallel: {'on' if config.parallel.sequence else 'off'}; shared projection: {projection}"
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())
