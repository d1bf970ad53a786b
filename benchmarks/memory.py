"""Memory of training, measured against formulas: `python benchmarks/memory.py --json memory.json`.

State: the parameters, gradients and optimizer state of every rank of a layout, from real steps on processes of this machine.
All storages of the process's live tensors, found through the garbage collector and counted once each, are sorted by owner: the
module's parameters; the optimizer's state and master weights; gradients of parameters, of master weights or in the engine's own
lists; everything else is a buffer. They are counted at three moments: between micro-batches (before the last forward pass),
when the last backward pass reaches the first block, and when the optimizer begins. Every rank must be within 5 % of state_bytes
in model/costs/memory.py; exit status 1 if one is not. The rank farthest from it is shown. `backward` has no formula: all
gradients and buffers of the backward pass together, including DeepSpeed's buckets and FSDP's gathered parameters.

Activations: what one block saves for its backward pass, all storages saved by autograd except parameters, for several variants
and numbers of heads.

JSON: {"state": rows, "activations": rows}, sizes in bytes.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.parity import Layout
from benchmarks.ranks import names_among, one_of, run_ranks
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, ModelConfig
from launch.common import output_file, run_command
from model.block import Block
from model.build import unsharded_shapes
from model.costs.memory import ZERO3_UNSHARDED, StateBytes, overhang, state_bytes
from model.decoder import DecoderLM
from model.row import Pass
from pretrain.engines import engine

TOLERANCE = 0.05
VOCABULARY = 1024
TOKENS, HIDDEN = 256, 1024
MICRO_BATCHES = 4
SETTINGS = """
run: {{folder: unused}}
data: {{path: unused, sequence_length: 32}}
model: {{attention: mhe_add, hidden_size: 256, num_layers: 4, num_heads: 16, head_dim: 32, vocab_size: {vocabulary}}}
training: {{steps: 2, global_batch_size: {batch}, micro_batch_size: 1}}
"""
ENGINE_GRADIENTS = (  # of DeepSpeed's optimizers
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat",
)
ENGINE_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
VARIANTS = ("mha", "mqa", "mhe_add", "mhe_mul")
SIZES = (*((heads, 64) for heads in (16, 32, 64, 128)), *((heads, HIDDEN // heads) for heads in (32, 64, 128)))
KINDS = ("parameters", "accumulated", "stepped", "optimizer")

LAYOUTS = {
    **{
        f"ZeRO {stage} × {ranks}": Layout(ranks, (f"parallel.zero_stage={stage}",)) for stage in range(4) for ranks in (1, 2, 4)
    },
    **{f"FSDP {ranks}": Layout(ranks, ("backend=fsdp",)) for ranks in (1, 2, 4)},
    "FSDP 2 × 2 replicas": Layout(4, ("backend=fsdp", "parallel.replicate=2")),
    "PP 2 × ZeRO 1 × 2": Layout(4, ("parallel.pipeline=2",)),
    "TP 2 × ZeRO 1 × 2": Layout(4, ("parallel.tensor=2",)),
    "TP 2 × FSDP 2": Layout(4, ("backend=fsdp", "parallel.tensor=2")),
}


@dataclass(frozen=True)
class Row:
    """What one rank of a layout holds, and what it should hold; `values` counts the parameters of its part of the model."""

    layout: str
    ranks: int
    precision: str
    rank: int
    values: int
    measured: StateBytes
    expected: StateBytes
    backward: int

    def ratios(self) -> list[float]:
        return [getattr(self.measured, kind) / getattr(self.expected, kind) for kind in KINDS]

    @property
    def deviation(self) -> float:
        return max(abs(ratio - 1) for ratio in self.ratios())


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors_in(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors_in(value)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage behind the tensors, by address."""
    found = {}
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.device.type == "meta" or own.layout is not torch.strided:
            continue
        storage = own.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def live() -> Iterator[Tensor]:
    """Every tensor that Python knows of, with its gradient."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not isinstance(thing, torch._subclasses.FakeTensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


class Holdings:
    """The storages of a backend by owner, at any moment. Create it right after the backend."""

    def __init__(self, backend: Any, earlier: Iterable[int]) -> None:
        """`earlier`: addresses of storages that existed before the backend."""
        self.earlier = set(earlier)
        self.parameters = list(backend.module.parameters())
        self.engine = backend.engine.optimizer if hasattr(backend, "engine") else backend.optimizer
        self.optimizer: torch.optim.Optimizer = getattr(self.engine, "optimizer", self.engine)

    @torch.no_grad()
    def now(self) -> dict[str, int]:
        """Bytes of `parameters`, `gradients`, `optimizer` and `buffers`."""
        masters = list(tensors_in([group["params"] for group in self.optimizer.param_groups]))
        attributes = vars(self.engine)
        owners: dict[str, list[Tensor]] = {
            "parameters": [*self.parameters, *_attributes(self.parameters, "ds_tensor")],
            "gradients": [
                *_attributes([*self.parameters, *masters], "grad"),
                *_attributes(self.parameters, "grad_accum"),
                *tensors_in([attributes.get(name) for name in ENGINE_GRADIENTS]),
            ],
            "optimizer": [
                *masters,
                *tensors_in(list(self.optimizer.state.values())),
                *tensors_in([attributes.get(name) for name in ENGINE_MASTERS]),
            ],
        }
        seen, bytes_ = set(self.earlier), {}
        for kind, tensors in (*owners.items(), ("buffers", list(live()))):
            own = {address: size for address, size in storages(tensors).items() if address not in seen}
            seen |= own.keys()
            bytes_[kind] = sum(own.values())
        return bytes_


def _attributes(tensors: Iterable[Any], name: str) -> list[Tensor]:
    return [found for tensor in tensors if (found := getattr(tensor, name, None)) is not None]


def measure_step(backend: Any, micro_batches: Sequence[Any], holdings: Holdings) -> tuple[StateBytes, int]:
    """What this rank holds in a step after its first; gradients and buffers together near the end of a backward pass."""
    moments: dict[str, dict[str, int]] = {}

    def note(moment: str, call: int) -> Callable[..., None]:
        """A hook that measures at its call number `call`."""
        calls = count(1)

        def hook(*_: Any) -> None:
            if next(calls) == call:
                moments[moment] = holdings.now()

        return hook

    backend.train_step(micro_batches, 1e-4)
    block = next(module for module in backend.module.modules() if isinstance(module, Block))
    handles = [
        backend.module.register_forward_pre_hook(note("between", len(micro_batches)), prepend=True),
        block.register_full_backward_hook(note("backward", len(micro_batches))),
        holdings.optimizer.register_step_pre_hook(note("step", 1)),
    ]
    backend.train_step(micro_batches, 1e-4)
    for handle in handles:
        handle.remove()
    between, backward, step = moments["between"], moments["backward"], moments["step"]
    found = StateBytes(between["parameters"], between["gradients"], step["gradients"], step["optimizer"])
    return found, backward["gradients"] + backward["buffers"]


def expected_state(config: Config, backend: Any, opened: Any) -> tuple[int, StateBytes]:
    """The number of values of this rank's part of the model, and the formula."""
    from pretrain.optim.groups import build_optimizer, kept_by_name

    parallel, bf16 = config.parallel, config.training.precision == "bf16"
    unsharded_name = getattr(backend, "parameter_name", str)  # a pipeline has its own names
    named = {unsharded_name(name): p for name, p in backend.module.named_parameters()}
    sizes: dict[str, int] = {name: getattr(p, "ds_numel", p.numel()) for name, p in named.items()}
    sharding, kept = engine(config.backend).sharding(parallel), Counter[int]()
    dimensions = {name: len(shape) for name, shape in unsharded_shapes(config.model).items()}
    of_names = kept_by_name(dimensions, config.optimizer)
    for name, size in sizes.items():
        kept[of_names[name].state_bytes] += size
    unsharded = sum(size for size in sizes.values() if size <= ZERO3_UNSHARDED)
    over = 0
    if sharding in ("zero1", "zero2"):
        groups = build_optimizer(backend.module.named_parameters(), config.optimizer).param_groups
        over = sum(
            overhang([p.numel() for p in group["params"]], opened.size("data"), opened.coordinate("data")) for group in groups
        )
    return kept.total(), state_bytes(kept, sharding, opened.size("data") // parallel.replicate, bf16, unsharded, over)


def precisions(layout: Layout) -> tuple[str, ...]:
    return ("fp32",) if "parallel.zero_stage=0" in layout.settings else ("fp32", "bf16")


def load(layout: Layout, precision: str, folder: Path) -> Config:
    """The resolved configuration of a layout; it takes MICRO_BATCHES micro-batches a step."""
    sizes = dict(text.removeprefix("parallel.").split("=") for text in layout.settings)
    data_ranks = layout.ranks // (int(sizes.get("tensor", 1)) * int(sizes.get("pipeline", 1)))
    path = folder / f"memory_{os.getpid()}.yaml"
    path.write_text(SETTINGS.format(vocabulary=VOCABULARY, batch=MICRO_BATCHES * data_ranks), encoding="utf-8")
    overrides = [f"--training.precision={precision}", *(f"--{text}" for text in layout.settings)]
    return load_config(path, overrides, world_size=layout.ranks).resolved(VOCABULARY)


def state_rank(rank: int, port: int, names: Sequence[str], folder: Path) -> None:
    """One process for layouts with equal ranks and sizes of axes; the first process writes the rows of all."""
    first = LAYOUTS[names[0]]
    warnings.filterwarnings("ignore", category=FutureWarning)
    from data_pipeline.read.loader import Batch
    from pretrain.build import make_backend
    from pretrain.distributed.collectives import gather_objects

    parallel = load(first, "fp32", folder).parallel
    with one_of(first.ranks, rank, port, parallel) as opened:
        rows: list[Row] = []
        for name, precision in [(layout, precision) for layout in names for precision in precisions(LAYOUTS[layout])]:
            config = load(LAYOUTS[name], precision, folder)
            tokens_BS = torch.randint(VOCABULARY, (1, config.data.sequence_length + 1))
            earlier = storages(live())
            backend = make_backend(config, opened)
            micro_batches = [Batch(tokens_BS[:, :-1], tokens_BS[:, 1:])] * MICRO_BATCHES
            values, expected = expected_state(config, backend, opened)
            measured, backward = measure_step(backend, micro_batches, Holdings(backend, earlier))
            rows += gather_objects(Row(name, first.ranks, precision, rank, values, measured, expected, backward))
            del backend
            gc.collect()
        if rank == 0:
            (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def measure_state(names: Sequence[str]) -> Iterator[Row]:
    """A row for each layout and precision, of the rank farthest from the formula; runs in new processes."""
    for alike in _alike(names):
        ranks = LAYOUTS[alike[0]].ranks
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(state_rank, ranks, alike, Path(folder))
            found = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
        rows = [Row(**row | {kind: StateBytes(**row[kind]) for kind in ("measured", "expected")}) for row in found]
        for start in range(0, len(rows), ranks):
            yield max(rows[start : start + ranks], key=lambda row: row.deviation)


def _alike(names: Sequence[str]) -> list[list[str]]:
    """The layouts that can share processes: those with equal ranks and process groups."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        layout = LAYOUTS[name]
        split = [
            text for text in layout.settings if text.startswith(("parallel.tensor", "parallel.pipeline", "parallel.replicate"))
        ]
        groups.setdefault((layout.ranks, *split), []).append(name)
    return list(groups.values())


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of all storages that autograd saves for the backward pass of `run`, except the model's parameters."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    parameters = storages(model.parameters())
    return sum(size for address, size in storages(kept).items() if address not in parameters)


@dataclass(frozen=True)
class Activations:
    """What one block saves for its backward pass, in bytes; `recomputed`: with training.recompute_activations."""

    variant: str
    heads: int
    head_dim: int
    attention: int
    block: int
    recomputed: int


def measure_activations(variant: str, heads: int, head_dim: int) -> Activations:
    """One sequence of TOKENS tokens of width HIDDEN, in fp32, with the kernel that training uses."""
    config = ModelConfig(
        attention=variant, hidden_size=HIDDEN, num_layers=1, num_heads=heads, head_dim=head_dim, vocab_size=8, position="none"
    )
    model = DecoderLM(config)
    block: Any = model.blocks[0]
    x_SBH = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True) * 1  # not a leaf, as between blocks
    keeping, recomputing = (Pass(config, model.layers, recompute) for recompute in (False, True))
    attention = saved_bytes(lambda: block.attention(x_SBH, keeping.positions(x_SBH)), model)
    kept = saved_bytes(lambda: keeping.run_block(block, x_SBH, 0), model)
    recomputed = saved_bytes(lambda: recomputing.run_block(block, x_SBH, 0), model)
    return Activations(variant, heads, head_dim, attention, kept, recomputed)


def state_line(row: Row) -> str:
    cells = [
        f"{getattr(row.measured, kind) / row.values:>7.3f} {ratio:>6.1%}"
        for kind, ratio in zip(KINDS, row.ratios(), strict=True)
    ]
    verdict = "" if row.deviation <= TOLERANCE else "  WRONG"
    return (
        f"{row.layout:<20} {row.precision:<5} {row.values / 1e6:>5.2f}"
        + "".join(cells)
        + f" {row.backward / row.values:>8.2f}{verdict}"
    )


STATE_HEADER = f"{'bytes a value':<20} {'':<5} {'M':>5}" + "".join(f"{kind:>14}" for kind in KINDS) + f" {'backward':>8}"


def activation_lines(rows: Sequence[Activations]) -> Iterator[str]:
    """KiB per token of attention and of the block, with shares of the first variant's."""
    yield f"{'KiB a token':<12} {'heads':>9}{'attention':>18}{'block':>18}{'recomputed':>12}"
    for row in rows:
        first = next(one for one in rows if (one.heads, one.head_dim) == (row.heads, row.head_dim))
        cells = [
            f"{getattr(row, part) / TOKENS / 1024:>10.1f} {getattr(row, part) / getattr(first, part):>7.1%}"
            for part in ("attention", "block")
        ]
        size = f"{row.heads} × {row.head_dim}"
        yield f"{row.variant:<12} {size:>9}{''.join(cells)}{row.recomputed / TOKENS / 1024:>12.1f}"


def _json(rows: Sequence[Row] | Sequence[Activations]) -> str:
    return ",\n".join(json.dumps(asdict(row)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts", type=names_among(LAYOUTS), default=list(LAYOUTS), metavar="A;B", help=f"default: all: {'; '.join(LAYOUTS)}"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    activations = [measure_activations(variant, *size) for size in SIZES for variant in VARIANTS]
    print("\n".join(activation_lines(activations)), f"\n\n{STATE_HEADER}", flush=True)
    rows = []
    for row in measure_state(arguments.layouts):
        rows.append(row)
        print(state_line(row), flush=True)
    if arguments.json:
        body = ",\n".join(f'"{name}": [\n{_json(found)}\n]' for name, found in (("state", rows), ("activations", activations)))
        arguments.json.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")
    wrong = [row for row in rows if row.deviation > TOLERANCE]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(rows)} rows are further than {TOLERANCE:.0%} from the formula")


if __name__ == "__main__":
    run_command(main)
