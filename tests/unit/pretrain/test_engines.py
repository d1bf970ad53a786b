"""What the registry of engines says, against the classes it names and the fields of the schema."""

import inspect
from pathlib import Path

import pytest

from configs.load import SECTIONS, load_config
from configs.schema import Config
from pretrain.backends.base import Backend
from pretrain.engines import backend_class, engine, engine_faults, engine_names
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
