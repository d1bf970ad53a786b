"""Bytes that tensor parallelism moves, counted and by formula: `python benchmarks/communication.py --json communication.json`.

One model of one layer for each variant, gather, setting of sequence parallelism and number of heads, hidden_size = heads *
head_dim; forward and backward of one micro-batch. One process plays rank 0: torch's `fake` process group completes collectives
without moving data, and fake tensors have shapes but no values, so a cluster's sizes take seconds on a laptop. Collectives are
counted where torch dispatches them (operators c10d::*), below whatever megatron-core calls. Calls and bytes of every kind, part
and pass must equal those of model/costs/communication.py; a difference is an error.

JSON: a list of rows with variant, gather (null if there is no choice), sequence_parallel, heads, head_dim, tensor, part,
pass = fwd | bwd, op, calls, bytes, sent_bytes. `bytes` is the size of the unsharded tensor over all calls, `sent_bytes` what
one rank sends in a ring algorithm; docs/communication.md defines it for each kind.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arguments import names, numbers
from configs.errors import UserError
from configs.schema import DataConfig, ModelConfig, ParallelConfig
from launch.common import output_file, run_command, whole_number
from model.attention.registry import attention_names, attention_variant, variant_of
from model.costs.communication import Collective, Gather, Op, Part, Pass, collectives, sent_bytes
from model.decoder import DecoderLM
from model.faults import model_faults
from model.parallel.faults import tensor_faults

# Operator: kind, and which of its arguments is the unsharded tensor or the list with it.
OPERATORS: dict[str, tuple[Op, int]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
}
FIRST_OF: dict[str, Part] = {"attention_norm": "attention", "mlp_norm": "mlp", "final_norm": "loss"}
VOCABULARY = 50_304  # no collective's size depends on it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = 4  # numbers of heads in one table
DECODERS = tuple(name for name in attention_names() if attention_variant(name).causal)


@dataclass(frozen=True)
class Layout:
    """How one model is sharded; `gather` is None if the variant has no choice."""

    tensor: int
    sequence: bool
    gather: Gather | None

    @property
    def way(self) -> Gather:
        return self.gather or "weights"


class Running:
    """Which part of a DecoderLM is running: forward by its modules, backward by the part that created a node of the graph."""

    def __init__(self, model: nn.Module) -> None:
        self.part: Part = "embedding"
        self.pass_: Pass = "fwd"
        self._known: set[Any] = set()
        for name, module in model.named_modules():
            part = FIRST_OF.get(name.rpartition(".")[2])
            if part is not None:
                module.register_forward_pre_hook(partial(self._begin, part))

    def _begin(self, part: Part, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.made(inputs[0])
        self.part = part

    def made(self, x: Tensor) -> None:
        """Assign the nodes behind `x` in the graph that belong to no earlier part to the part that ends here."""
        nodes = [x.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._known:
                continue
            self._known.add(node)
            node.register_prehook(partial(self._backward, self.part))
            nodes.extend(before for before, _ in node.next_functions)

    def _backward(self, part: Part, gradients: Any) -> None:
        self.part, self.pass_ = part, "bwd"


class Counting(TorchDispatchMode):
    """Counts collectives by part, pass and kind; RuntimeError for an unknown one."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self.running = running
        self.calls: Counter[tuple[Part, Pass, Op]] = Counter()
        self.bytes: Counter[tuple[Part, Pass, Op]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if "c10d" in name.partition("::")[0]:
            if name not in OPERATORS:
                raise RuntimeError(f"{name}: a collective that this benchmark does not know")
            op, position = OPERATORS[name]
            unsharded = args[position]
            tensors = unsharded if isinstance(unsharded, list | tuple) else [unsharded]
            key = self.running.part, self.running.pass_, op
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def count(model: DecoderLM, tokens_BS: Tensor) -> list[Collective]:
    """All collectives of forward and backward with `tokens_BS` as tokens and labels; gradients are not cleared."""
    running = Running(model)
    with Counting(running) as counting:
        loss = model.layers.losses(model(tokens_BS), tokens_BS).sum()
        running.made(loss)
        loss.backward()
    return [
        Collective(part, pass_, op, calls, counting.bytes[part, pass_, op])
        for (part, pass_, op), calls in counting.calls.items()
    ]


def build(config: ModelConfig, layout: Layout, group: dist.ProcessGroup, dtype: torch.dtype) -> DecoderLM:
    """This rank's shards over `group`, on the default device."""
    from model.parallel.tensor import TensorParallelLayers, parallel_config  # megatron-core takes seconds to import

    megatron = parallel_config(layout.tensor, layout.sequence)
    megatron.params_dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # parameters without values cannot be converted later
    try:
        return DecoderLM(config, TensorParallelLayers(megatron, group, layout.way))
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fake_ranks(tensor: int) -> Iterator[dist.ProcessGroup]:
    """Rank 0 of megatron-core's tensor-parallel group, whose other ranks do not exist; no other group may be initialised."""
    from megatron.core import parallel_state

    dist.init_process_group("fake", rank=0, world_size=tensor, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(tensor, create_gloo_process_groups=False)
        yield parallel_state.get_tensor_model_parallel_group()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def fake_count(
    config: ModelConfig, layout: Layout, micro_batch_size: int, sequence_length: int, dtype: torch.dtype
) -> list[Collective]:
    """`count` on the first of many ranks that need not exist, with tensors that have no values."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where megatron-core makes its buffers
    with fake_ranks(layout.tensor) as group, FakeTensorMode(), device:
        model = build(config, layout, group, dtype)
        return count(model, torch.zeros(micro_batch_size, sequence_length, dtype=torch.long))


def differences(found: Iterable[Collective], expected: Iterable[Collective]) -> list[str]:
    """What only one of them has, or what differs between them, as text."""
    both = set(found), set(expected)
    sides = ("counted, not by formula", both[0] - both[1]), ("by formula, not counted", both[1] - both[0])
    return [f"{text}: {move}" for text, moves in sides for move in sorted(moves, key=str)]


def measure(config: ModelConfig, layout: Layout, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model; UserError where the count is not the formula's."""
    sizes = arguments.micro_batch, arguments.sequence_length
    dtype = DTYPES[arguments.dtype]
    found = fake_count(config, layout, *sizes, dtype)
    expected = collectives(config, layout.tensor, layout.sequence, layout.way, *sizes, dtype.itemsize)
    wrong = differences(found, expected)
    if wrong:
        raise UserError("\n".join([f"{config.attention}, {config.num_heads} heads, {layout}:", *wrong]))
    return [
        {
            "variant": config.attention,
            "gather": layout.gather,
            "sequence_parallel": layout.sequence,
            "heads": config.num_heads,
            "head_dim": config.head_width,
            "tensor": layout.tensor,
            "part": move.part,
            "pass": move.pass_,
            "op": move.op,
            "calls": move.calls,
            "bytes": move.bytes,
            "sent_bytes": sent_bytes(move, layout.tensor),
        }
        for move in sorted(found, key=place)
    ]


def place(move: Collective) -> tuple[int, ...]:
    """Its sort key in a table."""
    kinds = ((Part, move.part), (Pass, move.pass_), (Op, move.op))
    return tuple(get_args(values).index(value) for values, value in kinds)


def sent_in_layer(rows: Iterable[dict[str, Any]]) -> float:
    """What one rank sends for attention and MLP with their norms."""
    return sum(row["sent_bytes"] for row in rows if row["part"] in ("attention", "mlp"))


def gathered_before_attention(rows: Iterable[dict[str, Any]]) -> int:
    """Bytes that every rank has gathered when heads begin: hidden states, or weights and outputs of a shared projection."""
    kind = {"part": "attention", "pass": "fwd", "op": "all_gather"}
    return sum(row["bytes"] for row in rows if row.items() >= kind.items())


@dataclass(frozen=True)
class Summary:
    """One variant and gather at one number of heads; `…_share` is relative to the first variant at the same number."""

    contender: str
    heads: int
    sent: float
    sent_share: float
    sequence_sent: float
    sequence_sent_share: float
    gathered: int
    gathered_share: float


def summaries(rows: list[dict[str, Any]]) -> list[Summary]:
    """In the order of heads, then of the rows."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["heads"]):
        groups.setdefault((row["heads"], contender(row)), []).append(row)
    first: dict[int, tuple[float, float, int]] = {}
    result = []
    for (heads, name), own in groups.items():
        sequence = [row for row in own if row["sequence_parallel"]]
        plain = [row for row in own if not row["sequence_parallel"]]
        values = sent_in_layer(plain), sent_in_layer(sequence), gathered_before_attention(sequence)
        base = first.setdefault(heads, values)
        shares = [value / of for value, of in zip(values, base, strict=True)]
        result.append(Summary(name, heads, values[0], shares[0], values[1], shares[1], values[2], shares[2]))
    return result


def contender(row: dict[str, Any]) -> str:
    return f"{row['variant']} {row['gather']}" if row["gather"] else row["variant"]


def detail_table(rows: list[dict[str, Any]]) -> str:
    """MiB of every collective, with a column for each number of heads."""
    cells: dict[tuple[Any, ...], dict[int, int]] = {}
    for row in rows:
        key = contender(row), row["sequence_parallel"], row["part"], row["pass"], row["op"], row["calls"]
        cells.setdefault(key, {})[row["heads"]] = row["bytes"]
    heads = sorted({row["heads"] for row in rows})
    lines = []
    for start in range(0, len(heads), COLUMNS):
        here = heads[start : start + COLUMNS]
        title = "".join(f" {f'n = {number}':>9}" for number in here)
        lines += ["", f"{'MiB':<19} {'seq':<3} {'part':<9} {'pass':<4} {'op':<14} {'calls':>5}{title}"]
        for (name, sequence, part, which, op, calls), sizes in cells.items():
            values = "".join(f" {sizes[n] / 2**20:>9.3f}" if n in sizes else f" {'':>9}" for n in here)
            if values.strip():
                lines.append(f"{name:<19} {'yes' if sequence else 'no':<3} {part:<9} {which:<4} {op:<14} {calls:>5}{values}")
    return "\n".join(lines[1:])


def summary_table(rows: list[dict[str, Any]]) -> str:
    """At most 100 columns; sent by one rank for attention and MLP, gathered for attention with sequence parallelism."""
    base = f"of {rows[0]['variant']}"
    lines = [
        f"{'':<25} {'sent':>11} {'':>8} {'sent, seq':>11} {'':>8} {'gathered, seq':>14}",
        f"{'heads':>5} {'variant':<19} {'MiB':>11} {base:>8} {'MiB':>11} {base:>8} {'MiB':>14} {base:>8}",
    ]
    for line in summaries(rows):
        lines.append(
            f"{line.heads:>5} {line.contender:<19} {line.sent / 2**20:>11.2f} {line.sent_share:>8.2%} "
            f"{line.sequence_sent / 2**20:>11.2f} {line.sequence_sent_share:>8.2%} "
            f"{line.gathered / 2**20:>14.2f} {line.gathered_share:>8.2%}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Shares of the first variant against the number of heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = summaries(rows)
    heads = sorted({line.heads for line in lines})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("attention + MLP, sent by one rank", "sent_share"),
        ("the same with sequence parallelism", "sequence_sent_share"),
        ("gathered before attention, sequence parallelism", "gathered_share"),
    )
    for axis, (name, field) in zip(axes, panels, strict=True):
        for number, who in enumerate(dict.fromkeys(line.contender for line in lines)):
            shares = [100 * getattr(line, field) for line in lines if line.contender == who]
            axis.plot(heads, shares, "o-", label=who, linewidth=5 if number == 0 else 1.5)  # others may lie on the first
        axis.set_xscale("log", base=2)
        axis.set_xticks(heads, [str(number) for number in heads])
        axis.set_ylim(bottom=0)
        axis.set(title=name, xlabel="heads", ylabel=f"% of {rows[0]['variant']}")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=110)


def model_config(variant: str, heads: int, arguments: argparse.Namespace) -> ModelConfig:
    """One layer, hidden_size = heads * head_dim; UserError if it is invalid or cannot be sharded."""
    config = ModelConfig(
        attention=variant,
        hidden_size=heads * arguments.head_dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=arguments.kv_heads if "num_kv_heads" in attention_variant(variant).options else None,
        position="none",
        vocab_size=VOCABULARY,
    )
    sections = {
        "model": config,
        "parallel": ParallelConfig(tensor=arguments.tensor, sequence=True),
        "data": DataConfig(path="-", sequence_length=arguments.sequence_length),
    }
    faults = [*model_faults(sections), *tensor_faults(sections)]
    if faults:
        raise UserError("\n".join(f"{fault.key}: {fault.value}: {fault.allowed}" for fault in faults))
    return config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"{', '.join(DECODERS)}, all; default: %(default)s"
    positive = whole_number(1)
    parser.add_argument("--variants", default="mha,gqa,mhe_add", metavar="A,B", help=known)
    parser.add_argument("--heads", default="16,32,64,128", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--head-dim", type=positive, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--kv-heads", type=positive, default=8, metavar="N", help="of gqa; default: %(default)s")
    parser.add_argument("--tensor", type=whole_number(2), default=8, metavar="N", help="ranks; default: %(default)s")
    parser.add_argument("--micro-batch", type=positive, default=4, metavar="N", help="sequences; default: %(default)s")
    parser.add_argument("--sequence-length", type=positive, default=4096, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the rows there")
    picture = output_file(".png", ".svg")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="write shares of the first variant there, .png or .svg")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks here
    warnings.filterwarnings("ignore", category=FutureWarning)  # new names of collectives
    variants = names(arguments.variants, "variants", DECODERS)
    heads = numbers(arguments.heads, "heads")
    configs = [model_config(variant, number, arguments) for variant in variants for number in heads]
    rows = []
    for config in configs:
        ways: tuple[Gather | None, ...] = get_args(Gather) if variant_of(config).of_kind(config, "shared") else (None,)
        for gather, sequence in itertools.product(ways, (False, True)):
            rows += measure(config, Layout(arguments.tensor, sequence, gather), arguments)
    title = (
        f"1 layer, head_dim {arguments.head_dim}, tensor {arguments.tensor}, micro-batch {arguments.micro_batch} × "
        f"{arguments.sequence_length} tokens, {arguments.dtype}"
    )
    print(f"{title}\nevery count equals its formula\n\n{detail_table(rows)}\n\n{summary_table(rows)}")
    if arguments.json:
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, title, arguments.plot)


if __name__ == "__main__":
    run_command(main)
