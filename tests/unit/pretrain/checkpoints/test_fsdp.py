"""Checkpoints of FSDP are tensors: whatever else a file holds is refused, and nothing in it runs."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from configs.errors import UserError
from pretrain.checkpoints.fsdp import load_whole, read, shard_folder, weight_files, write

WEIGHTS = {"embedding": torch.arange(15.0).view(5, 3), "norm": torch.ones(3)}
STATE = {
    **{f"model.{name}": weight for name, weight in WEIGHTS.items()},
    "exp_avg.norm": torch.zeros(3),
    "step": torch.tensor(4.0),
}
SHAPES = {name: weight.shape for name, weight in WEIGHTS.items()}


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A group of one, as a run on one process has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What one rank wrote."""
    written = write(shard_folder(tmp_path, 0), STATE, None)
    assert sorted(path.name for path in written) == [".metadata", "__0_0.distcp"]
    return tmp_path / "mp_rank_00"


def blank() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in STATE.items()}


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read(folder, blank(), None)
    with pytest.raises(UserError, match=match):
        load_whole(folder.parent, 1, SHAPES)


def test_what_was_written_comes_back(folder: Path) -> None:
    state = blank()
    read(folder, state, None)
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    weights = load_whole(folder.parent, 1, SHAPES)
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in WEIGHTS.items())
    assert weight_files(folder.parent, 1) == [folder / ".metadata", folder / "__0_0.distcp"]


def test_torch_reads_it_too(folder: Path) -> None:
    state: dict[str, Any] = blank()
    dcp.load(state, checkpoint_id=folder)
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


def test_shards_of_tensor_parallel_ranks_are_joined(tmp_path: Path) -> None:
    """The second shard of 5 rows has 2 and one that only fills it up."""
    whole = WEIGHTS["embedding"]
    shards = whole[:3], torch.cat([whole[3:], torch.zeros(1, 3)])
    for rank, shard in enumerate(shards):
        write(shard_folder(tmp_path, rank), {"model.embedding": shard, "model.norm": WEIGHTS["norm"]}, None)
    weights = load_whole(tmp_path, 2, SHAPES)
    assert torch.equal(weights["embedding"], whole)
    assert torch.equal(weights["norm"], WEIGHTS["norm"])


def changed(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the index as one who may run code would."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


class Command:
    """Unpickling it runs a command."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return subprocess.check_call, (["touch", str(self.created)],)


def test_no_command_in_the_index_runs(folder: Path, tmp_path: Path) -> None:
    content = pickle.dumps({"x": Command(tmp_path / "created")})
    (folder / ".metadata").write_bytes(content)
    refused(folder, r"\.metadata: is no index of a checkpoint \(it asks for subprocess\.check_call\)")
    assert not (tmp_path / "created").exists()
    pickle.loads(content)
    assert (tmp_path / "created").exists(), "the file would have run a command"


def test_no_command_in_the_tensors_runs(folder: Path, tmp_path: Path) -> None:
    data = folder / "__0_0.distcp"
    torch.save(Command(tmp_path / "created"), data)

    def point_there(index: Any) -> None:
        for place in index.storage_data.values():
            place.offset, place.length = 0, data.stat().st_size

    changed(folder, point_there)
    refused(folder, r"cannot be read \(Weights only load failed")
    assert not (tmp_path / "created").exists()
    torch.load(data, weights_only=False)
    assert (tmp_path / "created").exists(), "the file would have run a command"


def test_objects_are_refused_even_where_torch_wrote_them(tmp_path: Path) -> None:
    folder = shard_folder(tmp_path, 0)
    dcp.save({"model.norm": torch.ones(3), "object": Command(tmp_path / "created")}, checkpoint_id=folder)
    refused(folder, "it asks for (pathlib|torch.distributed.checkpoint.metadata.BytesStorageMetadata)")
    assert not (tmp_path / "created").exists()


def test_a_pickle_cannot_change_the_classes_it_names(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}Vversion\nVchanged\nstb.")
    refused(folder, "is no index")
    assert Metadata.version is None


def first(values: dict[Any, Any]) -> Any:
    return next(iter(values.values()))


def outside(index: Any) -> None:
    first(index.storage_data).relative_path = "../__0_0.distcp"


def transformed(index: Any) -> None:
    first(index.storage_data).transform_descriptors = ["stream.zstd"]


def negative(index: Any) -> None:
    first(index.storage_data).offset = -1


def without_part(index: Any) -> None:
    index.state_dict_metadata["model.norm"].chunks.clear()


def without_place(index: Any) -> None:
    del index.storage_data[next(key for key in index.storage_data if key.fqn == "model.norm")]


def beyond(index: Any) -> None:
    index.state_dict_metadata["model.norm"].chunks[0].offsets = torch.Size([1])


def double(index: Any) -> None:
    index.state_dict_metadata["model.norm"].properties.dtype = torch.float64


def without_tensor(index: Any) -> None:
    del index.state_dict_metadata["model.norm"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (outside, r"it points to '\.\./__0_0\.distcp'"),
        (transformed, "it points to"),
        (negative, "are no lengths"),
        (without_part, "parts of model.norm are missing"),
        (without_place, "no place for parts of model.norm"),
        (beyond, "a part lies outside"),
        (double, "is no index"),
        (without_tensor, "holds (no model.norm|other parameters)"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder: Path, change: Callable[[Any], None], match: str) -> None:
    changed(folder, change)
    refused(folder, match)


def test_files_that_are_cut_short_or_missing_are_named(folder: Path) -> None:
    data, index = folder / "__0_0.distcp", folder / ".metadata"
    data.write_bytes(data.read_bytes()[:200])
    refused(folder, f"{folder}: cannot be read")
    data.unlink()
    refused(folder, "No such file")
    index.write_bytes(index.read_bytes()[:-10])
    refused(folder, f"{index}: is no index")
    index.unlink()
    refused(folder, f"{index}: cannot be read")


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.embedding has shape \(5, 3\), not \(4, 3\)"):
        read(folder, {"model.embedding": torch.empty(4, 3)}, None)
    with pytest.raises(UserError, match="do not fit the model"):
        load_whole(folder.parent, 1, {**SHAPES, "embedding": torch.Size([6, 3])})
    with pytest.raises(UserError, match="other parameters"):
        load_whole(folder.parent, 1, {"embedding": torch.Size([5, 3])})


def test_what_cannot_be_written_raises_oserror(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00" / "__0_0.distcp").mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"):
        write(tmp_path / "mp_rank_00", STATE, None)
