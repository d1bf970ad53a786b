"""Objectives by name (`training.objective`): the only place that tells them apart. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import Config, DataConfig, Fault, ModelConfig, Section, TrainingConfig, ValidationConfig
from configs.targets import load_target
from data_pipeline.corrupt.spans import sentinel_names
from data_pipeline.corrupt.vocabulary import Vocabulary
from model.registry import model_kind, model_kinds

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective


@dataclass(frozen=True)
class ObjectiveEntry:
    """An objective: its class as "module:Class", and the models and data that it takes.

    `causal`: what it asks of a model, that no token attends to a later one, or that all see each other. `options` names the
    field of `training` that only it reads. `tokens` gives the texts of special tokens that it needs, for samples of a length,
    and the option that names them. `whole_samples`: it reads a sample as one text, so documents cannot be kept apart.
    `scores_tasks`: the log-probability of a continuation is what it teaches.
    """

    target: str
    causal: bool
    options: str | None = None
    tokens: Callable[[TrainingConfig, int], list[str]] = lambda training, length: []
    token_option: str = ""
    whole_samples: bool = False
    scores_tasks: bool = False


_OBJECTIVES = {
    "next_token": ObjectiveEntry("pretrain.objectives.next_token:NextToken", causal=True, scores_tasks=True),
    "masked": ObjectiveEntry(
        "pretrain.objectives.masked:MaskedTokens",
        causal=False,
        options="masked",
        tokens=lambda training, length: [training.masked.token],
        token_option="masked.token",
    ),
    "spans": ObjectiveEntry(
        "pretrain.objectives.spans:Spans",
        causal=True,
        options="spans",
        tokens=lambda training, length: sentinel_names(training.spans, length),
        token_option="spans.sentinel",
        whole_samples=True,
    ),
}


def objective_names() -> list[str]:
    """All values of `training.objective`."""
    return list(_OBJECTIVES)


def make_objective(config: Config) -> Objective:
    """What the model of a resolved configuration learns. UserError if the tokenizer lacks a token that this needs."""
    objective: type[Objective] = load_target(_OBJECTIVES[config.training.objective].target)
    return objective(config)


def vocabulary_of(config: Config) -> Vocabulary:
    """The tokenizer of a run's data. UserError unless it has the special tokens of the run's objective."""
    path = Path(config.data.tokenizer)
    vocabulary = Vocabulary.read(path)
    names = _OBJECTIVES[config.training.objective].tokens(config.training, config.data.sequence_length)
    if why := vocabulary.missing(names):
        raise UserError(f"{path.parent}: {why}")
    return vocabulary


def objective_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """For `load_config`: faults of `training.objective`, its options, and the model and data that it is given."""
    training, model, data = (sections.get(name) for name in ("training", "model", "data"))
    if not isinstance(training, TrainingConfig):
        return []
    name = training.objective
    if name not in _OBJECTIVES:
        return [Fault("training.objective", name, f"known: {', '.join(_OBJECTIVES)}")]
    entry = _OBJECTIVES[name]
    faults = list(_unread_options(training))
    if isinstance(model, ModelConfig) and model.kind in model_kinds() and model_kind(model.kind).causal != entry.causal:
        sees = "later tokens" if entry.causal else "no later tokens"
        fitting = ", ".join(other for other, found in _OBJECTIVES.items() if found.causal != entry.causal)
        faults.append(Fault("training.objective", name, f"a {model.kind} sees {sees}; it learns {fitting}"))
    validation = sections.get("validation")
    if isinstance(validation, ValidationConfig) and validation.tasks and not entry.scores_tasks:
        able = ", ".join(other for other, found in _OBJECTIVES.items() if found.scores_tasks)
        faults.append(Fault("validation.tasks", dict(validation.tasks), f"only with training.objective {able}, not {name}"))
    if isinstance(data, DataConfig):
        faults += _data_faults(entry, training, model, data)
    return faults


def _unread_options(training: TrainingConfig) -> Iterator[Fault]:
    for name, entry in _OBJECTIVES.items():
        if entry.options is None or name == training.objective:
            continue
        given = getattr(training, entry.options)
        for field, info in type(given).model_fields.items():
            if (value := getattr(given, field)) != info.default:
                wanted = f"only objective {name} has it; set it to {given.default(field)}"
                yield Fault(f"training.{entry.options}.{field}", value, wanted)


def _data_faults(entry: ObjectiveEntry, training: TrainingConfig, model: object, data: DataConfig) -> Iterator[Fault]:
    apart = data.keeps_documents_apart or (isinstance(model, ModelConfig) and model.separates_documents)
    if entry.whole_samples and apart:
        wanted = "reads a sample as one text; take data.packing concatenate and model.attend_across_documents null"
        yield Fault("training.objective", training.objective, wanted)
    if entry.whole_samples and data.sequence_length < 2:
        yield Fault("data.sequence_length", data.sequence_length, "at least 2 with this objective")
        return
    names = entry.tokens(training, data.sequence_length)
    known = data.streams or data.parts
    for path in [Path(data.tokenizer)] if names and known else []:
        try:
            why = Vocabulary.read(path).missing(names) if path.is_file() else None  # else a fault of the data
        except UserError as error:
            why = str(error)
        if why:
            yield Fault(f"training.{entry.token_option}", _given(training, entry.token_option), f"{path.parent}: {why}")


def _given(training: TrainingConfig, option: str) -> object:
    section, _, field = option.partition(".")
    return getattr(getattr(training, section), field)
