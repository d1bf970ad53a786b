"""What the registry of engines says, against the classes it names and the fields of the schema."""

import inspect
from pathlib import Path

import pytest

from configs.load import SECTIONS, load_config
from configs.schema import Config
from pretrain.backends.base import Backend
from pretrain.engines import backend_class, engine, engine_faults, engine_names
from pretrain.optim import registry as optimizers
from pretrain.optim.registry import Kept, OptimizerKind
from tests.helpers import write_run

METHODS = [name for name, member in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")]


def config(folder: Path, *overrides: str) -> Config:
    return load_config(write_run(folder, folder / "data"), overrides, [engine_faults], world_size=2)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "DeepSpeedBackend"),
        (["--parallel.pipeline=2"], "PipelineBackend"),
        (["--backend=fsdp"], "FSDPBackend"),
    ],
)
def test_each_entry_names_a_backend(tmp_path: Path, overrides: list[str], name: str) -> None:
    backend = backend_class(config(tmp_path, *overrides))
    assert backend.__name__ == name
    assert METHODS
    assert [method for method in METHODS if not hasattr(backend, method)] == []


@pytest.mark.parametrize("name", engine_names())
def test_options_are_fields_of_the_schema(name: str) -> None:
    for option in engine(name).options:
        section, _, field = option.partition(".")
        assert field in SECTIONS[section].model_fields


def test_labels_say_how_an_engine_shards(tmp_path: Path) -> None:
    zero, fsdp = config(tmp_path, "--parallel.zero_stage=3"), config(tmp_path, "--backend=fsdp", "--parallel.replicate=2")
    assert engine("deepspeed").label(zero.parallel) == "deepspeed ZeRO 3"
    assert engine("fsdp").label(fsdp.parallel) == "fsdp, 2 replicas"
    assert (engine("deepspeed").sharding(zero.parallel), engine("fsdp").sharding(fsdp.parallel)) == ("zero3", "fsdp")


SHARDED = "optimizer.kind: needs unsharded matrices: take backend deepspeed with parallel.zero_stage 0 and parallel.tensor 1"


@pytest.mark.parametrize(
    ("overrides", "faults"),
    [
        (["--parallel.zero_stage=0"], 0),
        (["--parallel.zero_stage=0", "--parallel.pipeline=2"], 0),
        (["--parallel.zero_stage=0", "--parallel.tensor=2"], 1),
        (["--parallel.zero_stage=1"], 1),
        (["--parallel.zero_stage=2"], 1),
        (["--parallel.zero_stage=3"], 1),
        (["--backend=fsdp"], 1),
    ],
)
def test_an_optimizer_that_needs_unsharded_matrices_is_refused_where_they_are_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], faults: int
) -> None:
    entry = OptimizerKind("", {"matrices": Kept(("momentum_buffer",))}, unsharded_matrices=True)
    monkeypatch.setitem(optimizers._KINDS, "whole", entry)
    path = write_run(tmp_path, tmp_path / "data")
    sections = load_config(path, ["--optimizer.kind=whole", *overrides], world_size=2)
    found = engine_faults({name: getattr(sections, name) for name in (*SECTIONS, "backend")})
    assert [f"{fault.key}: {fault.allowed}" for fault in found] == [SHARDED] * faults
    others = load_config(path, overrides, world_size=2)
    assert engine_faults({name: getattr(others, name) for name in (*SECTIONS, "backend")}) == []
