"""Draws what a soak trains: any model and any two layouts that the project's own validation accepts on 1, 2 or 4 processes.

Every field of the configuration is drawn or in `LEFT_ALONE`. Values come from the schema and the registries, numbers from
`VALUES`. What a draw may not be, only the validation says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema import (
    SECTIONS,
    Config,
    Fault,
    MaskedConfig,
    ParallelConfig,
    Section,
    SpansConfig,
    StreamConfig,
    cross_faults,
)
from data_pipeline.faults import data_faults
from launch.common import CHECKS
from model.registry import model_kinds
from pretrain.engines import engine, engine_names
from pretrain.optim.registry import optimizer_names
from tests.needs import causal_names

Values = dict[str, object]  # by the dotted names of fields
PROCESSES = (1, 2, 4)
STEPS = 8  # of the shortest run
VALUES: dict[str, Sequence[object]] = {
    "backend": engine_names(),
    "checkpoint.asynchronous": (None, False, True),
    "data.sequence_length": (8, 12, 16),
    "data.packing": ("concatenate", "documents", "best_fit"),
    "model.attend_across_documents": (None, False),
    "model.kind": model_kinds(),
    "model.attention": (*causal_names(), ["mhe_add", "mha"], ["skv", "mqa", "mhe_mul"]),
    "model.hidden_size": (16, 17, 24),  # 17: nothing divides it
    "model.num_layers": (2, 3, 4),
    "model.num_heads": (4, 6, 8),
    "model.head_dim": (None, 4, 6),
    "model.num_kv_heads": (None, 1, 2, 4),
    "model.num_seeds": (1, 2, 4),
    "model.head_embedding_std": (None, 0.1),
    "model.query_rank": (None, 0, 2),
    "model.key_rank": (None, 1),
    "model.value_rank": (None, 2),
    "model.latent_dim": (None, 8),
    "model.num_latents": (None, 2),
    "model.rope_dim": (None, 2),
    "model.output_gate": (None, "elementwise", "head"),
    "model.rope_fraction": (1.0, 0.5),
    "model.no_position_every": (None, 2),
    "model.sliding_window": (None, 1, 5),
    "model.logit_softcap": (None, 2.0),
    "model.full_attention_every": (None, 2),
    "model.ffn_hidden_size": (None, 24, 44),
    "model.max_position_embeddings": (None, 20),
    "model.rope_theta": (10000.0, 300.0),
    "model.init_std": (0.02, 0.1),
    "model.attention_output_init_scale": (1.0, 0.3),
    "model.vocab_multiple": (1, 7, 64),
    "gha.stage": ("off", "constrain"),  # the others prune heads, which no run resumes without
    "gha.groups": (None, 2, 3),
    "gha.max_groups": (2, 3),
    "gha.regroup_every": (1, 2, 3),
    "gha.gram_decay": (0.0, 0.7),
    "gha.alpha": (0.03, 0.3),
    "gha.beta": (0.01, 0.1),
    "gha.warmup_steps": (0, 3),
    "gha.end_step": (None, 6),
    "gha.attention_rows": (0, 3, 16),
    "optimizer.kind": optimizer_names(),
    "optimizer.lr": (5e-4, 1e-3),
    "optimizer.head_embedding_lr_scale": (1.0, 3.0),
    "optimizer.attention_output_lr_scale": (1.0, 0.1),
    "optimizer.beta1": (0.9, 0.5),
    "optimizer.beta2": (0.95, 0.99),
    "optimizer.epsilon": (1e-8, 1e-6),
    "optimizer.weight_decay": (0.1, 0.0),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.replicate": (1, 2, 4),
    "parallel.tensor": (1, 2, 4),
    "parallel.pipeline": (1, 2, 4),
    "run.seed": (1234, 7),
    "schedule.warmup_steps": (0, 2),
    "schedule.decay_steps": (None, 3),
    "schedule.min_lr_ratio": (0.1, 1.0),
    "training.global_batch_size": (4, 8),
    "training.micro_batch_size": (1, 2, 4),
    "training.precision": ("fp32", "bf16"),  # fp8 needs GPUs
    "training.gradient_clipping": (1.0, 0.0, 0.2),
    "training.z_loss": (0.0, 0.01),
    "training.average.decay": (None, 0.9),
    "training.average.last": (None, 2),
    "training.skip.spike_sigma": (None, 4.0),
    "training.skip_samples": ([], [[5, 9], [37, 40]]),
    "validation.every_steps": (0, 3),
}
LEFT_ALONE = {
    **dict.fromkeys(
        ("run.folder", "data.path", "data.sources", "data.schedule", "data.max_epochs", "training.steps"),
        "each run has its own",
    ),
    **dict.fromkeys(("checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every"), "the checks need theirs"),
    **dict.fromkeys(
        ("logging.every_steps", "logging.tensorboard", "logging.heads", "logging.peak_tflops"), "say nothing of the state"
    ),
    **dict.fromkeys(("parallel.timeout_minutes", "parallel.lost_after_seconds"), "say nothing of the state"),
    **dict.fromkeys(("model.vocab_size", "model.end_of_document", "validation.samples"), "follow from the data"),
    **dict.fromkeys(("gha.vote_at_step", "gha.vote_batches", "gha.ballot", "gha.heads_per_group"), "no vote is held"),
    **dict.fromkeys(("gha.converged_shift", "gha.converged_groupings"), "no vote is held"),
    **dict.fromkeys(
        ("model.linformer_length", "model.linformer_tokens"), "no kind of model but decoders, which cannot have it"
    ),
    "model.dropout": "0, for another layout draws other masks; on one layout it is set",
    "model.norm_epsilon": "only a number in a formula",
    "training.skip.nonfinite": "every step is finite",
    **dict.fromkeys(("validation.sets", "validation.tasks", "validation.tasks_every_steps"), "change nothing in training"),
    **dict.fromkeys(
        ("training.objective", *(f"training.masked.{name}" for name in MaskedConfig.model_fields)),
        "the tokenizer has no tokens for other objectives",
    ),
    **dict.fromkeys((f"data.stream.{name}" for name in StreamConfig.model_fields), "the data are prepared"),
    **dict.fromkeys((f"training.spans.{name}" for name in SpansConfig.model_fields), "as training.masked"),
    "training.compile": "takes half a minute to compile",
    "training.deterministic": "changes nothing on CPUs",
}
# A layout is what may differ between a checkpoint and the run that resumes from it, yet leaves its figures as they were.
OF_LAYOUT = (
    "backend",
    "checkpoint.asynchronous",
    "model.attention_kernel",
    "training.precision",
    "training.micro_batch_size",
    "training.recompute_activations",
    *(f"parallel.{name}" for name in ParallelConfig.model_fields),
)
FIRST = ("backend", "parallel.pipeline", "model.attention", "model.position")  # so that each comes up often


@dataclass(frozen=True)
class Layout:
    """A number of processes and what they do."""

    processes: int
    values: Values

    def __str__(self) -> str:
        kind, parallel = str(self.values["backend"]), ParallelConfig(**of_section(self.values, "parallel"))
        sizes = {"TP": parallel.tensor, "PP": parallel.pipeline}
        names = [f"{self.processes} × {engine(kind).label(parallel)}", *(f"{n} {s}" for n, s in sizes.items() if s > 1)]
        names += ["SP"] * (parallel.sequence and parallel.tensor > 1) + ["offload"] * parallel.cpu_offload
        return ", ".join([*names, str(self.values["training.precision"])])


@dataclass(frozen=True)
class Pair:
    """A model's run on `source`, and one on `target` that resumes from its checkpoint."""

    number: int
    common: Values
    source: Layout
    target: Layout

    @property
    def same(self) -> bool:
        return self.source == self.target

    def __str__(self) -> str:
        grouped = ", gha" if self.common["gha.stage"] != "off" else ""
        tied = "tied" if self.common["model.tie_embeddings"] else "untied"
        model = f"{self.common['model.attention']}, {self.common['model.position']}, {tied}{grouped}"
        return f"{model}: {self.source} → {'itself' if self.same else self.target}"


def pair(seed: int, number: int) -> Pair:
    """Case `number` of a seed, whatever cases come before it. One of five resumes on its own layout, with dropout."""
    draw = random.Random(f"{seed}, pair {number}")
    common = _drawn(draw, [name for name in drawn_fields() if name not in OF_LAYOUT], {}, 1)
    if common["gha.stage"] != "off":  # cosines within a micro-batch depend on its size, which therefore stays
        sizes = [micro for micro in (1, 2, 4) if micro * max(PROCESSES) <= int(str(common["training.global_batch_size"]))]
        common["training.micro_batch_size"] = draw.choice(sizes)
    source, target = (_layout(draw, common) for _ in range(2))
    if draw.random() < 0.2:
        return Pair(number, {**common, "model.dropout": 0.1}, source, source)
    return Pair(number, common, source, target)


def _layout(draw: random.Random, common: Values) -> Layout:
    processes, fields = draw.choice(PROCESSES), [name for name in drawn_fields() if name in OF_LAYOUT and name not in common]
    values = _drawn(draw, fields, common, processes)
    return Layout(processes, {name: values[name] for name in fields})


def overrides(values: Values) -> list[str]:
    """The same as arguments of a command."""
    words = {None: "null", True: "true", False: "false"}
    return [f"--{name}={words[v] if v is None or isinstance(v, bool) else v}" for name, v in values.items()]


def of_section(values: Values, section: str) -> dict[str, Any]:
    """The fields of a section, those of sections within it as mappings."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith(f"{section}."):
            *within, field = name.split(".")[1:]
            place = tree
            for part in within:
                place = place.setdefault(part, {})
            place[field] = value
    return tree


def all_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        inner = section.section(name)
        yield from (f"{prefix}{name}",) if inner is None else all_fields(inner, f"{prefix}{name}.")


def drawn_fields() -> list[str]:
    return [name for name in all_fields() if name not in LEFT_ALONE]


def choices(name: str) -> Sequence[object]:
    """What a field is drawn from; KeyError for a new field that neither the schema nor `VALUES` lists values of."""
    if name in VALUES:
        return VALUES[name]
    kind = _field(name).annotation
    if kind is bool:
        return (False, True)
    if get_origin(kind) is Literal:
        return get_args(kind)
    raise KeyError(f"{name}: give it values in tests/soak/draw.py, or a reason to leave it alone")


def _drawn(draw: random.Random, fields: Sequence[str], fixed: Values, processes: int) -> Values:
    """`fixed` and a value for each field. A field's draw is kept if nothing refuses it with all others as they are by then."""
    rest = [name for name in fields if name not in FIRST]
    values = _start(draw, fields, {**fixed, **{name: _plain(name) for name in rest}}, processes)
    for name in draw.sample(rest, len(rest)):
        changed = {**values, name: draw.choice(choices(name))}
        if not faults(changed, processes):
            values = changed
    return values


def _start(draw: random.Random, fields: Sequence[str], values: Values, processes: int) -> Values:
    """`values` with draws of `FIRST`, and of fields that must change with them, such as num_kv_heads of gqa."""
    while True:
        started = values | {name: draw.choice(choices(name)) for name in fields if name in FIRST}
        for _ in range(50):
            if not (found := faults(started, processes)):
                return started
            named = {fault.key for fault in found}.intersection(fields).difference(FIRST)
            if not named:
                break
            started |= {name: draw.choice(choices(name)) for name in sorted(named)}


def _field(name: str) -> FieldInfo:
    *within, field = name.split(".")
    section: type[Section] = Config
    for part in within:
        section = section.section(part) or section
    return section.model_fields[field]


def _plain(name: str) -> object:
    """The default, if it has one that is drawn."""
    default = _field(name).default
    return default if default in choices(name) else choices(name)[0]


def faults(values: Values, processes: int) -> list[Fault]:
    """What `load_config` says of them, but for the data, which are not there yet."""
    known: Values = {"run.folder": "run", "data.path": "data", "training.steps": STEPS, "training.micro_batch_size": 1}
    known |= values
    sections = {name: kind(**of_section(known, name)) for name, kind in SECTIONS.items()}
    found = [
        Fault(f"{name}.{fault.key}", fault.value, fault.allowed)
        for name, section in sections.items()
        for fault in section.faults()
    ]
    valid: dict[str, Any] = {**sections, "backend": known.get("backend", Config.model_fields["backend"].default)}
    others = (fault for check in CHECKS if check is not data_faults for fault in check(valid))
    return [*found, *cross_faults(sections, processes), *others]
