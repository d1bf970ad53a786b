"""Memory and bytes that a plan predicts, against real steps: `python benchmarks/plan.py --json docs/benchmarks/plan.json`.

Each case is a layout, a variant and a precision; its ranks are processes of this machine with gloo, which train a small model
with the backend of launch/pretrain.py. In the second step

memory  all storages that live tensors hold are followed from operator to operator (pretrain/planning/live.py). The most of them
        must be within 5 % of `rank_memory` (pretrain/planning/memory.py) without the allowances for GPUs; benchmarks/memory.py finds
        whose they are at three moments. What the loader and the loop hold is not part of it.
bytes   collectives are counted where torch dispatches them. Calls and bytes of each kind in groups of each size must be those of
        `transfers` (pretrain/planning/traffic.py), but for what the loop shares after a step.

Every rank is compared; the one farthest off is shown. `--fake` compares rank 0 of 1,024 and 16,384 ranks, which do not exist
(torch's fake process group and tensors without values): the shard of every parameter and the collectives of a step.

JSON: rows, one a line, written as they are measured; sizes in bytes. Exit status 1 if a row is off.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import gc
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import live, storages
from benchmarks.ranks import one_of, run_ranks
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from launch.common import output_file, run_command
from pretrain.planning.live import LiveBytes
from pretrain.planning.memory import rank_memory
from pretrain.planning.traffic import Transfer, transfers

TOLERANCE = 0.05
TOGETHER = 6  # cases of one process
VOCABULARY = 1024
SETTINGS = {
    "run.folder": "unused",
    "data.path": "unused",
    "data.sequence_length": 64,
    "model.hidden_size": 256,
    "model.num_layers": 4,
    "model.num_heads": 16,
    "model.head_dim": 16,
    "model.vocab_size": VOCABULARY,
    "training.steps": 3,
    "training.micro_batch_size": 2,
}
LONG = {"data.sequence_length": 160, "training.micro_batch_size": 4}  # most of memory are activations
MODERN = {
    "model.position": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.tie_embeddings": False,
}
BF16, FP32, FSDP = {"training.precision": "bf16"}, {"training.precision": "fp32"}, {"backend": "fsdp"}
NEEDS: dict[str, dict[str, Any]] = {  # of variants
    "gqa": {"model.num_kv_heads": 4},
    "diff": {"model.num_kv_heads": 4},
    "mfa": {"model.query_rank": 64},
    "mhe_low_rank": {"model.query_rank": 16},
    "tpa": {"model.query_rank": 6, "model.key_rank": 2, "model.value_rank": 2},
    "mla": {"model.query_rank": 64, "model.latent_dim": 64, "model.rope_dim": 8},
    "gla": {"model.latent_dim": 64, "model.num_latents": 2, "model.rope_dim": 8},
    "gta": {"model.num_kv_heads": 4},
}
VARIANTS = (
    "mha",
    "gqa",
    "mqa",
    "skv",
    "el",
    "sha",
    "mhe_add",
    "mhe_mul",
    "diff",
    "diff_v2",
    "mla",
    "gla",
    "gta",
    "mfa",
    "mhe_low_rank",
    "tpa",
)
OPERATORS = {  # of torch: kind, and which argument is the full tensor
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("recv", 0),
}
Counts = dict[str, list[int]]  # by kind and size of the group: calls and bytes


@dataclass(frozen=True)
class Case:
    """One layout, variant and precision: settings by their dotted names, on so many ranks."""

    name: str
    ranks: int
    settings: dict[str, Any]
    micro_batches: int = 2

    @property
    def groups(self) -> tuple[Any, ...]:
        """What decides which process groups there are."""
        names = ("parallel.tensor", "parallel.pipeline", "parallel.replicate")
        return self.ranks, *(self.settings.get(name, 1) for name in names)

    def config(self, folder: Path) -> Config:
        settings = {**SETTINGS, **self.settings}
        data = self.ranks // (settings.get("parallel.tensor", 1) * settings.get("parallel.pipeline", 1))
        settings["training.global_batch_size"] = self.micro_batches * settings["training.micro_batch_size"] * data
        path = folder / f"{os.getpid()}.yaml"
        path.write_text("run: {folder: unused}\n", encoding="utf-8")
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
        overrides = [f"--{name}={text}" for name, text in texts.items()]
        return load_config(path, overrides, world_size=self.ranks).resolved(VOCABULARY)


def _zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"parallel.zero_stage": stage, **{f"parallel.{name}": value for name, value in settings.items()}}


def cases() -> list[Case]:
    return [*_layouts(), *_sizes(), *_variants(), *_switches()]


def _layouts() -> list[Case]:
    both = FP32, BF16
    found = [
        Case(f"ZeRO {stage} × {ranks}", ranks, _zero(stage) | style)
        for ranks in (2, 4)
        for stage in (1, 2, 3)
        for style in both
    ]
    found += [Case(f"ZeRO 0 × {ranks}", ranks, _zero(0)) for ranks in (1, 2, 4)]
    found += [Case("ZeRO 2 × 2, one micro-batch", 2, _zero(2) | style, 1) for style in both]
    found += [Case(f"FSDP {ranks}", ranks, FSDP | style) for ranks in (1, 2, 4) for style in both]
    found += [Case("FSDP 2 × 2 replicas", 4, FSDP | style | {"parallel.replicate": 2}) for style in both]
    found += [Case("TP 2 × ZeRO 1 × 2", 4, _zero(1, tensor=2) | style) for style in both]
    found += [Case("TP 2 × ZeRO 3 × 2, SP", 4, _zero(3, tensor=2, sequence=True) | BF16)]
    found += [Case("TP 2 × FSDP 2, SP", 4, FSDP | style | {"parallel.tensor": 2, "parallel.sequence": True}) for style in both]
    found += [Case("TP 4, SP", 4, _zero(1, tensor=4, sequence=True) | BF16 | MODERN)]
    found += [Case("PP 2", 2, _zero(1, pipeline=2) | style, 4) for style in both]
    found += [Case("PP 2, untied", 2, _zero(0, pipeline=2) | MODERN, 4)]
    found += [Case("PP 2 × DP 2", 4, _zero(1, pipeline=2) | style, 4) for style in both]
    found += [Case("PP 4, untied", 4, _zero(1, pipeline=4) | style | MODERN, 8) for style in both]
    found += [Case("TP 2 × PP 2", 4, _zero(1, pipeline=2, tensor=2) | style, 4) for style in both]
    return [*found, Case("TP 2 × PP 2, SP", 4, _zero(1, pipeline=2, tensor=2, sequence=True) | BF16 | MODERN, 4)]


def _sizes() -> list[Case]:
    """Where activations are most of memory, and where they are recomputed."""
    found, recompute = list[Case](), {"training.recompute_activations": True}
    for name, settings, ranks in (
        ("ZeRO 1 × 1", _zero(1) | FP32, 1),
        ("ZeRO 2 × 2", _zero(2) | BF16, 2),
        ("FSDP 2", FSDP | BF16, 2),
        ("TP 2, SP", _zero(2, tensor=2, sequence=True) | FP32, 2),
    ):
        found.append(Case(f"{name}, long", ranks, settings | LONG | MODERN))
        found.append(Case(f"{name}, recomputed", ranks, settings | LONG | recompute))
    return found


def _variants() -> list[Case]:
    found, parallel = list[Case](), FSDP | BF16 | {"parallel.tensor": 2, "parallel.sequence": True}
    for variant in VARIANTS:
        settings = LONG | MODERN | NEEDS.get(variant, {}) | {"model.attention": variant}
        found += [Case(variant, 1, _zero(1) | settings), Case(f"{variant}, TP 2, SP", 2, settings | parallel)]
    return found


def _switches() -> list[Case]:
    found = []
    for name, switch in {
        "qk_norm": {"model.qk_norm": True},
        "gate": {"model.output_gate": "elementwise"},
        "sinks": {"model.attention_sinks": True},
        "softcap": {"model.logit_softcap": 30.0},
        "window": {"model.sliding_window": 64},
        "alibi": {"model.position": "alibi"},
        "before": {"model.attention": "mhe_add", "model.embedding_position": "before"},
        "dropout": {"model.dropout": 0.1},
        "z-loss": {"training.z_loss": 1e-4},
        "pattern": {"model.attention": ["mhe_add", "mha"]},
    }.items():
        settings = LONG | MODERN | {"model.attention": "mha"} | switch
        found.append(Case(name, 1, _zero(1) | settings))
        if name in ("qk_norm", "sinks", "z-loss"):
            found.append(Case(f"{name}, TP 2", 2, _zero(2, tensor=2) | settings))
    return found


class Counting(TorchDispatchMode):
    """Counts collectives by kind and size of their group, and those of a single rank not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if "c10d" in name.partition("::")[0]:
            op, position = OPERATORS[name]  # KeyError: a collective that this benchmark does not know
            (group,) = (
                dist.ProcessGroup.unbox(each).size()
                for each in args
                if isinstance(each, torch.ScriptObject) and _is_group(each)
            )
            tensors = [each for each in tree_leaves(args[position]) if isinstance(each, Tensor)]
            if group > 1 and op != "recv":
                count = self.counts.setdefault(f"{op} {group}", [0, 0])
                count[0] += 1
                count[1] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def counts_of(found: Sequence[Transfer]) -> Counts:
    """The formula's; two neighbours of a pipeline send in the group of all its stages."""
    counts: Counts = {}
    for one in found:
        count = counts.setdefault(f"{one.op} {one.group}", [0, 0])
        count[0] += one.calls
        count[1] += one.bytes
    return counts


@dataclass(frozen=True)
class Measured:
    """What one rank of a case found: its stage, the most bytes, and its collectives."""

    rank: int
    stage: int
    peak: int
    counted: Counts


@dataclass
class Row:
    """One case on the rank farthest off; `planned` is whose the bytes are by the formula."""

    name: str
    ranks: int
    precision: str
    rank: int
    measured: int
    predicted: int
    planned: dict[str, int]
    counted: Counts
    expected: Counts
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def deviation(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def differences(self) -> list[str]:
        keys = sorted({*self.counted, *self.expected})
        return [
            f"{key}: counted {self.counted.get(key)}, formula {self.expected.get(key)}"
            for key in keys
            if self.counted.get(key) != self.expected.get(key)
        ]

    @property
    def is_off(self) -> bool:
        return abs(self.deviation) > TOLERANCE or bool(self.differences)

    def line(self) -> str:
        wrong = f"  WRONG {'; '.join(self.differences)}" if self.is_off else ""
        return f"{self.name:<28} {self.precision:<5} {self.measured / 2**20:>9.2f} {self.predicted / 2**20:>9.2f} {self.deviation:>+7.1%}{wrong}"


def held_now() -> list[Tensor]:
    """All real tensors of this process."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in live())
    return [tensor for tensor in local if tensor.device.type != "meta" and tensor.layout is torch.strided]


def measure(case: Case, config: Config, opened: Any) -> Measured:
    """On this rank, in its second step."""
    from data_pipeline.read.loader import Batch
    from pretrain.build import make_backend

    gc.collect()
    earlier = storages(held_now())
    backend = make_backend(config, opened)
    tokens_BS = torch.randint(1, VOCABULARY, (config.training.micro_batch_size, config.row_length + 1))
    step = [Batch(tokens_BS[:, :-1], tokens_BS[:, 1:])] * case.micro_batches
    earlier |= storages([tokens_BS])
    backend.train_step(step, 1e-4)  # makes the optimizer's state
    gc.collect()
    own = [tensor for tensor in held_now() if tensor.untyped_storage().data_ptr() not in earlier]
    following = LiveBytes(own)
    del own
    with Counting() as counting, following:
        backend.train_step(step, 1e-4)
    return Measured(opened.rank, opened.coordinate("pipeline"), following.peak, counting.counts)


def work(rank: int, port: int, alike: Sequence[Case], folder: Path) -> None:
    """One process for cases with equal process groups; the first one writes what all ranks found."""
    warnings.filterwarnings("ignore")
    from pretrain.distributed.collectives import gather_objects

    with one_of(alike[0].ranks, rank, port, alike[0].config(folder).parallel) as opened:
        for number, case in enumerate(alike):
            found = gather_objects(measure(case, case.config(folder), opened))
            if rank == 0:
                (folder / f"{number}.json").write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
            gc.collect()


def compared(case: Case, config: Config, found: Measured) -> Row:
    """With what the formulas say of that rank; of what the loop shares, a backend has only the weight of the labels."""
    planned = rank_memory(config, case.ranks, found.stage, gpu=False)
    moves = [one for one in transfers(config, case.ranks, found.stage) if one.axis != "loop"]
    if case.ranks > 1:
        moves.append(Transfer("loop", "all_reduce", "metrics", 1, 8, case.ranks))
    names = case.name, case.ranks, config.training.precision, found.rank
    return Row(*names, found.peak, planned.total, asdict(planned), found.counted, counts_of(moves), case.settings)


def measured(wanted: Sequence[Case]) -> Iterator[Row]:
    """A row for each case, of the rank farthest off."""
    groups: dict[Any, list[Case]] = {}
    for case in wanted:
        groups.setdefault(case.groups, []).append(case)
    for alike in (group[start : start + TOGETHER] for group in groups.values() for start in range(0, len(group), TOGETHER)):
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(work, alike[0].ranks, alike, Path(folder))
            for number, case in enumerate(alike):
                found = json.loads(Path(folder, f"{number}.json").read_text(encoding="utf-8"))
                rows = [compared(case, case.config(Path(folder)), Measured(**one)) for one in found]
                yield max(rows, key=lambda row: (bool(row.differences), abs(row.deviation)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for row in measured([case for case in cases() if arguments.only in case.name]):
        rows.append(row)
        print(row.line(), flush=True)
        if arguments.json:
            lines = ",\n".join(json.dumps(asdict(each)) for each in rows)
            arguments.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    wrong = sum(row.is_off for row in rows)
    if wrong:
        raise UserError(f"{wrong} of {len(rows)} rows are off")


if __name__ == "__main__":
    run_command(main)
