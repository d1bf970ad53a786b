"""Every configuration for a cluster, built at full size on some of its ranks, by the code that builds a run.

One process plays one rank after another: torch's `fake` process group completes collectives without moving data, and fake
tensors have shapes but no values. What a rank must hold is counted here from the configuration's numbers.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.load import ConfigError, load_config
from configs.schema import Config, ModelConfig
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from launch.common import ConfigArguments
from model.block import Block
from model.costs.parameters import parameters
from model.faults import model_faults
from model.layers import UNSHARDED, Layers
from model.parallel.faults import tensor_faults
from model.parallel.pipeline import unsharded_name
from model.positions.positions import make_positions
from pretrain.build import make_backend
from pretrain.distributed.layers import make_layers
from pretrain.distributed.layout import Layout
from pretrain.objectives.registry import make_objective
from pretrain.optim.state import optimizer_state
from tests.helpers import ROOT, cluster_processes, losses_of, run_ranks, shipped_configurations, write_text_files

CLUSTER = shipped_configurations(for_a_cluster=True)
NODE = 8  # GPUs
torch_apply: Callable[..., nn.Module] = nn.Module._apply
LARGEST_SHARE = 1.01  # of parameters, largest stage over smallest
# A number of processes that does not fit each configuration, and the fault.
WRONG_SIZES = {
    "mhe_add_1b_zero2": (48, "training.global_batch_size = 512: must be a multiple of micro_batch_size * processes (8 * 48)"),
    "mhe_mul_7b_tp8_pp4_zero1": (
        48,
        "parallel.tensor = 8: times parallel.pipeline (8 * 4) must divide the number of processes (48)",
    ),
    "mhe_add_7b_fsdp_hybrid": (30, "parallel.replicate = 4: must divide the data-parallel ranks (30)"),
}

each_configuration = pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with more tokens in each split than a sample has."""
    folder = tmp_path_factory.mktemp("long")
    texts = write_text_files(folder / "texts", documents=400)
    prepare(PrepareOptions(inputs=(str(texts),), output=folder / "data", vocab_size=300, split=(60, 30, 10)))
    return folder / "data"


def resolved(path: Path) -> Config:
    """At the number of processes that it is for."""
    config = load_config(path, checks=(model_faults, tensor_faults), world_size=processes_of(path))
    return config.resolved(tokenizer_size=50_000)


def processes_of(path: Path) -> int:
    processes = cluster_processes(path)
    assert processes is not None
    return processes


@each_configuration
def test_it_passes_all_checks_at_its_size_and_fails_at_another(
    path: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(path), f"--data.path={long_text}"])
    monkeypatch.setenv("WORLD_SIZE", str(processes_of(path)))
    assert ConfigArguments("").parse()[1].data.path == str(long_text)
    processes, fault = WRONG_SIZES[path.stem]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError) as caught:
        ConfigArguments("").parse()
    assert fault in [str(each) for each in caught.value.faults]


@each_configuration
def test_stated_numbers_are_true(path: Path) -> None:
    config, text = resolved(path), path.read_text(encoding="utf-8")
    count = sum(math.prod(shape) for shape in unsharded_shapes(config.model).values())
    assert count == sum(parameters(config.model).values())
    assert re.findall(r"([\d,]{9,}) parameters", text) == [f"{count:,}"]
    table = [line.split("|") for line in (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    (row,) = (cells for cells in table if cells[1] == f" `{path.stem}` ")
    assert row[2:4] == [f" {count:,} ", f" {processes_of(path)} "]
    (column,) = (number for cells in table if cells[1] == " " for number, cell in enumerate(cells) if f"`{path.stem}`" in cell)
    tokens = config.training.micro_batch_size * config.data.sequence_length
    block = tokens * kept_of_a_token(config.model, config.parallel.tensor)
    rows = {cells[1].strip(): cells[column].strip() for cells in table if len(cells) > column}
    blocks, in_flight = (int(number) for number in rows["blocks × micro-batches in flight"].split(" × "))
    assert rows["a block keeps, MiB"] == f"{block / 2**20:,.0f}"
    assert rows["all blocks keep"] == f"{blocks * in_flight * block / 2**30:.1f}"
    assert in_flight == config.parallel.pipeline


@each_configuration
def test_ranks_hold_what_they_should(path: Path) -> None:
    run_ranks(build, 1, path)


def build(_: int, path: Path) -> None:
    torch.set_num_threads(1)
    config, ranks = resolved(path), processes_of(path)
    if config.backend == "fsdp":
        check_fsdp(config, ranks)
    elif config.parallel.pipeline > 1:
        check_pipeline(config, ranks)
    else:
        check_zero(config, ranks)


def check_zero(config: Config, ranks: int) -> None:
    """The unsharded model on each rank; the optimizer's fp32 master weights are sharded equally."""
    assert (config.parallel.tensor, config.parallel.zero_stage) == (1, 2)
    full = unsharded_shapes(config.model)
    head_embeddings = [
        math.prod(shape) for name, shape in full.items() if name.endswith(("query_embedding", "value_embedding"))
    ]
    spared = sum(head_embeddings) + sum(math.prod(shape) for shape in full.values() if len(shape) == 1)
    decayed = sum(math.prod(shape) for shape in full.values()) - spared
    for rank in (ranks // 2, ranks - 1):
        with one_of(config, rank, ranks) as layout:
            backend: Any = make_backend(config, layout)
            assert shapes_of(backend.module) == full
            assert {parameter.dtype for parameter in backend.module.parameters()} == {torch.bfloat16}
            masters = backend.engine.optimizer.single_partition_of_fp32_groups
            assert [(part.numel(), part.dtype) for part in masters] == [
                (math.ceil(size / ranks / 2) * 2, torch.float32) for size in (decayed, spared)
            ]
            if rank == ranks // 2:
                check_step(config, backend.module)
                check_kept(config, UNSHARDED)


def check_fsdp(config: Config, ranks: int) -> None:
    """An equal shard of the rows of every parameter on each rank of a replica; replicas are neighbouring ranks, here nodes."""
    assert config.parallel.tensor == 1
    shards = ranks // config.parallel.replicate
    assert shards == NODE
    full = unsharded_shapes(config.model)
    assert all(shape[0] % shards == 0 for shape in full.values())
    own = {name: (shape[0] // shards, *shape[1:]) for name, shape in full.items()}
    for rank in (ranks // 2 - 3, ranks - 1):
        with one_of(config, rank, ranks) as layout, pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "mesh", without_fake_tensors(layout.mesh))  # it computes with numbers of ranks
            backend: Any = make_backend(config, layout)
            first = rank // shards * shards
            assert dist.get_process_group_ranks(backend.shard_group) == list(range(first, first + shards))
            local = {name: parameter.to_local() for name, parameter in backend.parameters.items()}
            assert {name: tuple(part.shape) for name, part in local.items()} == own
            assert shards * sum(part.numel() for part in local.values()) == sum(parameters(config.model).values())
            state = [
                cast(DTensor, optimizer_state(backend.optimizer, parameter, backend.kept[parameter])[kind]).to_local()
                for parameter in backend.parameters.values()
                for kind in ("exp_avg", "exp_avg_sq")
            ]
            assert sum(moment.numel() for moment in state) == 2 * sum(part.numel() for part in local.values())
            if rank == ranks // 2 - 3:
                check_step(config, backend.module)
                gradients = {name: parameter.grad.to_local() for name, parameter in backend.parameters.items()}
                assert {name: tuple(gradient.shape) for name, gradient in gradients.items()} == own
                assert {tensor.dtype for tensor in (*local.values(), *gradients.values(), *state)} == {torch.float32}
                check_kept(config, UNSHARDED)


def check_pipeline(config: Config, ranks: int) -> None:
    """Each stage on another tensor- and data-parallel rank, the first and the last of all among them."""
    parallel, full = config.parallel, unsharded_shapes(config.model)
    stages, copies = parallel.pipeline, ranks // (parallel.tensor * parallel.pipeline)
    own = {name: shard_of(name, shape, parallel.tensor) for name, shape in full.items()}
    places = [(0, 0), (copies // 2, parallel.tensor // 2), *(stages - 3) * [(0, 1)], (copies - 1, parallel.tensor - 1)]
    of_stages: list[dict[str, tuple[int, ...]]] = []
    for stage, (data_rank, tensor_rank) in enumerate(places):
        rank = (stage * copies + data_rank) * parallel.tensor + tensor_rank
        with one_of(config, rank, ranks) as layout:
            assert (layout.coordinate("pipeline"), layout.coordinate("data"), layout.coordinate("tensor")) == (
                stage,
                data_rank,
                tensor_rank,
            )
            module, layers = build_stage(config, layout)
            of_stages.append(shapes_of(module))
            check_stage_step(config, module, stage == 0, stage == stages - 1)
            if stage == 1:
                check_kept(config, layers)
    assert not config.model.tie_embeddings
    assert Counter(name for names in of_stages for name in names) == Counter(own.keys())  # each on one stage
    assert {name: shape for names in of_stages for name, shape in names.items()} == own
    copied = sum(math.prod(shape) for name, shape in own.items() if shape == full[name])
    sharded = sum(math.prod(shape) for shape in own.values()) - copied
    assert parallel.tensor * sharded + copied == sum(parameters(config.model).values())
    sizes = [sum(math.prod(shape) for shape in names.values()) for names in of_stages]
    assert max(sizes) / min(sizes) < LARGEST_SHARE, sizes


def build_stage(config: Config, layout: Layout) -> tuple[Any, Layers]:
    """What PipelineBackend passes to its engine, in bf16 as the engine makes it.

    The engine itself sums numbers of parameters over ranks and reads the result, which fake tensors do not have.
    """
    from pretrain.backends.deepspeed_process import prepare_deepspeed
    from pretrain.backends.pipeline import PipelineBackend

    class Stage(PipelineBackend):
        def __init__(self) -> None:
            prepare_deepspeed(layout)
            self.config, self.layout, self.checkpoint = config, layout, None
            self.layers, self.objective = make_layers(config, layout), make_objective(config)
            self.mean_weight = 1.0
            self.stage_module = self.build_module()

    stage = Stage()
    assert all(name == f"{name.partition('.')[0]}.{unsharded_name(name)}" for name, _ in stage.stage_module.named_parameters())
    return stage.stage_module.bfloat16(), stage.layers


def check_stage_step(config: Config, stage: Any, is_first: bool, is_last: bool) -> None:
    """Forward and backward of one micro-batch: inputs and outputs are this rank's shard of the sequence."""
    batch, length, model = config.training.micro_batch_size, config.data.sequence_length, config.model
    hidden = (length // config.parallel.tensor, batch, model.hidden_size)
    tokens_BS = torch.zeros(batch, length, dtype=torch.long)
    x = tokens_BS if is_first else torch.zeros(hidden, dtype=torch.bfloat16, requires_grad=True)
    out = stage(x)
    if is_last:
        assert model.vocab_size is not None
        assert out.shape == (length, batch, model.vocab_size / config.parallel.tensor)
        stage.loss_fn(out, tokens_BS).backward()
    else:
        assert (out.shape, out.dtype) == (hidden, torch.bfloat16)
        out.backward(torch.zeros_like(out))
    assert all(parameter.grad is not None for parameter in stage.parameters())
    if not is_first:
        assert x.grad is not None
        assert x.grad.shape == hidden


def check_step(config: Config, module: nn.Module) -> None:
    """Forward and backward of one micro-batch of the unsharded model."""
    shape = config.training.micro_batch_size, config.data.sequence_length
    tokens_BS = torch.zeros(shape, dtype=torch.long)
    losses_BS = losses_of(module, tokens_BS, tokens_BS)
    assert (losses_BS.shape, losses_BS.dtype) == (shape, torch.float32)
    losses_BS.mean().backward()


def check_kept(config: Config, layers: Layers) -> None:
    """What a block saves of a micro-batch for its backward pass, with the kernel of GPUs: the formula of docs/scaling.md."""
    batch, length = config.training.micro_batch_size, config.data.sequence_length
    model = config.model.model_copy(update={"attention_kernel": "sdpa"})
    block = Block(model, layers).bfloat16()
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return saved

    x_SBH = torch.zeros(length // layers.size, batch, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = make_positions(model, length, 0, x_SBH.dtype, x_SBH.device, None, layers.own(model.num_heads))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        out = block(x_SBH, positions)  # holds what is kept
    assert sum(kept.values()) == pytest.approx(batch * length * kept_of_a_token(model, layers.size), rel=0.02)
    assert out.shape == x_SBH.shape


def kept_of_a_token(model: ModelConfig, tensor: int) -> float:
    """Bytes; docs/scaling.md explains the terms."""
    heads = model.num_heads * model.head_width
    return (20 * model.hidden_size + 6 * heads + 8 * model.ffn_width) / tensor + 10 * model.head_width


def unsharded_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by name, from the formulas of docs/attention.md and of a gated MLP."""
    assert model.attention in ("mhe_add", "mhe_mul")
    assert (model.activation, model.norm, model.position, model.bias) == ("swiglu", "rmsnorm", "rope", False)
    assert model.head_dim is not None
    assert model.vocab_size is not None
    width, inner, heads = model.hidden_size, model.ffn_width, (model.num_heads, model.head_dim)
    block: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (width,),
        "attention.qkv.weight": (3 * model.head_dim, width),
        "attention.query_embedding": heads,
        "attention.value_embedding": heads,
        "attention.out.weight": (width, math.prod(heads)),
        "mlp_norm.weight": (width,),
        "mlp.gate.weight": (inner, width),
        "mlp.up.weight": (inner, width),
        "mlp.down.weight": (width, inner),
    }
    if model.key_embedding:
        block["attention.key_embedding"] = heads
    ends: dict[str, tuple[int, ...]] = {"token_embedding.weight": (model.vocab_size, width), "final_norm.weight": (width,)}
    if not model.tie_embeddings:
        ends["output.weight"] = (model.vocab_size, width)
    blocks = {f"blocks.{number}.{name}": shape for number in range(model.num_layers) for name, shape in block.items()}
    return ends | blocks


def shard_of(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """What a tensor-parallel rank holds of a parameter, from the table of docs/tensor_parallel.md."""
    if name.endswith(("norm.weight", "query_embedding", "key_embedding", "value_embedding")):
        return shape
    dim = 1 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0
    assert shape[dim] % tensor == 0, name
    return (*shape[:dim], shape[dim] // tensor, *shape[dim + 1 :])


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, by their names in the unsharded model."""
    named = {re.sub(r"^\d+\.", "", name): tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert len(named) == sum(1 for _ in module.parameters())
    return named


@contextmanager
def one_of(config: Config, rank: int, ranks: int) -> Iterator[Layout]:
    """This process as one rank, with fake tensors; the others do not exist."""
    parallel = config.parallel
    sizes = {"pipeline": parallel.pipeline, "replicate": parallel.replicate, "tensor": parallel.tensor}
    layout = Layout(rank, ranks, rank % NODE, NODE, sizes=sizes)
    with layout.opened(FakeStore(), backend="fake"), FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", apply)
        yield layout


def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, on which `.to` and `.bfloat16` are built, for fake parameters.

    torch's own swaps each parameter with its new value, and fails if there is a weak reference to it, as FakeTensorMode has.
    """
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):  # has no data to be set
        return torch_apply(module, function, recurse)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            with torch.no_grad():
                value = function(parameter)
            if value.device == parameter.device:
                parameter.data = value
            else:  # as torch's own does where the kinds of tensors differ
                part.register_parameter(name, nn.Parameter(value))
    return module


def without_fake_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def real(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return real
