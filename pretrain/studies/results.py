"""What a run has cost and brought, read from its folder: configuration, metrics, what its study wrote there. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import load_config, smallest_world
from configs.schema import Config, ModelConfig
from model.attention.registry import layer_kinds, variant_of
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from pretrain.report.records import read_metrics
from pretrain.studies.records import CHILD, OUTCOME

CONFIG = "config.yaml"
LOSS, BITS = "validation/loss", "validation/bits_per_byte"
LATEST = 0.1  # the share of a run's steps over which its training loss is averaged
SLACK = 1e-9  # of sums of seconds
Course = Literal["tokens", "seconds"]
Status = Literal["finished", "failed", "stopped", "running", "missing"]


@dataclass(frozen=True)
class Curve:
    """Losses of a run along its course: after how many tokens and seconds of its steps they were measured.

    `held_out`: in validations. A run without any has its training loss, averaged over some steps.
    """

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    loss: NDArray[np.float64]
    bits: NDArray[np.float64]  # per byte; NaN where there are none
    held_out: bool

    def at(self, along: Course, place: float, bits: bool = False) -> float | None:
        """The loss there, between measurements linear in the logarithm of tokens or seconds; None outside of them."""
        places: NDArray[np.float64] = getattr(self, along)
        if not len(places) or not places[0] * (1 - SLACK) <= place <= places[-1] * (1 + SLACK):
            return None
        value = float(np.interp(np.log(place), np.log(places), self.bits if bits else self.loss))
        return None if np.isnan(value) else value

    def end(self, along: Course) -> float | None:
        places: NDArray[np.float64] = getattr(self, along)
        return float(places[-1]) if len(places) else None


@dataclass(frozen=True)
class Sizes:
    """Of a run's model, by formula."""

    variant: str
    layers: int
    width: int
    num_heads: int
    head_dim: int
    parameters: int
    attention_parameters: int
    kv_bytes: int  # that a token adds to the cache in bf16
    flops_per_token: float  # of a training token
    query_freedom: float  # a mean over layers

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """`config` is resolved, as in a run's folder."""
        model, row = config.model, config.row_length
        parts = parameters(model)
        return cls(
            variant=model.attention_words,
            layers=model.num_layers,
            width=model.hidden_size,
            num_heads=model.num_heads,
            head_dim=model.head_width,
            parameters=sum(parts.values()),
            attention_parameters=parts["attention"],
            kv_bytes=kv_cache_bytes_per_token(model),
            flops_per_token=flops_per_token(model, row) * row / config.data.sequence_length,
            query_freedom=query_freedom(model),
        )


def query_freedom(model: ModelConfig) -> float:
    """Of how many independent linear functions of a hidden state the queries of a layer are made; a mean over layers."""
    kinds = layer_kinds(model)
    return sum(count * variant_of(layer).query_freedom(layer) for layer, count in kinds.items()) / sum(kinds.values())


@dataclass(frozen=True)
class Measured:
    """Of a run so far: figures that it has none of are None. `seconds` are those of its steps alone."""

    steps: int
    tokens: int
    seconds: float
    flops: float  # of the model, as `flops_per_token` counts
    tokens_per_second: float | None  # the median of its steps
    memory_gib: float | None  # the highest
    training_loss: float | None  # a mean over the last tenth of its steps
    loss: float | None  # of the last validation
    bits_per_byte: float | None
    sets: Mapping[str, Mapping[str, float]]  # loss and bits per byte of each named validation set
    heads: Mapping[str, Sequence[tuple[int, float]]]  # how alike heads are (logging.heads): name → tokens and value


@dataclass(frozen=True)
class Run:
    """A run: what it was to be, what it is, what came of it. `axes` and `match` are those of a child of a study."""

    folder: Path
    name: str
    part: str
    axes: Mapping[str, str]
    match: Mapping[str, Any] | None
    status: Status
    error: str | None
    wall_seconds: float | None  # with start and validation; of all attempts
    config: Config | None
    sizes: Sizes | None
    measured: Measured | None
    curve: Curve | None

    @property
    def usable(self) -> bool:
        """Whether its end can be compared with others'."""
        return self.status == "finished" and self.measured is not None and self.sizes is not None


def read_run(folder: Path) -> Run:
    """A run that stands for itself. UserError if the folder holds none that has trained."""
    config, lines = _config(folder), read_metrics(folder)
    if not any("loss" in line for line in lines):
        raise UserError(f"{folder}: has no training steps; name the folder of a run that has trained")
    measured, curve = _measured(config, lines), _curve(config, lines)
    done = measured.steps >= config.training.steps
    name = folder.resolve().name
    status: Status = "finished" if done else "stopped"
    return Run(folder, name, "", {}, None, status, None, None, config, Sizes.of(config), measured, curve)


def read_child(folder: Path, part: str, axes: Mapping[str, str] = MappingProxyType({})) -> Run:
    """A child of a study in any state; what cannot be read of it is its error. `axes`: labels of one that has not begun."""
    facts, outcome = _json(folder / CHILD), _json(folder / OUTCOME)
    error = outcome.get("error")
    status: Status = "running" if (folder / CONFIG).exists() else "missing"
    if outcome.get("status") in ("finished", "failed", "stopped"):
        status = outcome["status"]
    config, sizes, measured, curve = None, None, None, None
    try:
        if (folder / CONFIG).exists():
            config = _config(folder, facts.get("processes"))
            sizes, lines = Sizes.of(config), read_metrics(folder)
            measured, curve = _measured(config, lines), _curve(config, lines)
    except UserError as fault:
        status, error = "failed", error or str(fault)
    axes = {str(axis): str(label) for axis, label in (facts.get("axes") or axes).items()}
    wall = outcome.get("seconds")
    return Run(folder, folder.name, part, axes, facts.get("match"), status, error, wall, config, sizes, measured, curve)


def _config(folder: Path, processes: int | None = None) -> Config:
    path = str(folder / CONFIG)
    return load_config(path, world_size=processes or smallest_world(path))


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty where it is missing or, while it is being written, incomplete."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _measured(config: Config, lines: Sequence[Mapping[str, Any]]) -> Measured:
    steps = [line for line in lines if "seconds" in line]
    validations = [line for line in lines if LOSS in line]
    tokens = int(steps[-1]["tokens"]) if steps else 0
    latest = [line["loss"] for line in steps[-max(1, round(LATEST * len(steps))) :] if "loss" in line]
    speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
    last = validations[-1] if validations else {}
    return Measured(
        steps=int(steps[-1]["step"]) if steps else 0,
        tokens=tokens,
        seconds=sum(line["seconds"] for line in steps),
        flops=Sizes.of(config).flops_per_token * tokens,
        tokens_per_second=median(speeds) if speeds else None,
        memory_gib=max((line["memory_gib"] for line in steps if "memory_gib" in line), default=None),
        training_loss=fmean(latest) if latest else None,
        loss=last.get(LOSS),
        bits_per_byte=last.get(BITS),
        sets=_of_sets(last),
        heads=_of_heads(lines),
    )


def _of_heads(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Figures heads/NAME of all layers together, after how many tokens each."""
    tokens, found = 0, dict[str, list[tuple[int, float]]]()
    for line in lines:
        tokens = line.get("tokens", tokens)
        for key, value in line.items():
            if key.startswith("heads/") and isinstance(value, float):
                found.setdefault(key.removeprefix("heads/"), []).append((tokens, value))
    return found


def _of_sets(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by the names of validation sets: validation/NAME/loss, validation/NAME/bits_per_byte."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        kind, _, rest = key.partition("/")
        name, _, figure = rest.rpartition("/")
        if kind == "validation" and name and figure in ("loss", "bits_per_byte"):
            sets.setdefault(name, {})[figure] = value
    return sets


def _curve(config: Config, lines: Sequence[Mapping[str, Any]]) -> Curve:
    steps = [line for line in lines if "seconds" in line and "loss" in line]
    tokens, seconds = np.array([line["tokens"] for line in steps]), np.cumsum([line["seconds"] for line in steps])
    place = {line["step"]: index for index, line in enumerate(steps)}
    held_out = [line for line in lines if LOSS in line and line["step"] in place]
    if held_out:
        at = [place[line["step"]] for line in held_out]
        loss, bits = [line[LOSS] for line in held_out], [line.get(BITS, np.nan) for line in held_out]
        return Curve(tokens[at].astype(float), seconds[at], np.array(loss, float), np.array(bits, float), True)
    chunk = max(1, round(len(steps) * LATEST / 4))
    ends = range(len(steps), 0, -chunk)
    means = [fmean(line["loss"] for line in steps[max(0, end - chunk) : end]) for end in reversed(ends)]
    at = [end - 1 for end in reversed(ends)]
    kept = np.array(at, dtype=int)
    return Curve(tokens.astype(float)[kept], seconds[kept], np.array(means, float), np.full(len(at), np.nan), False)
