"""A mixture of more sources than a process may open files for by default."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config, SourceConfig
from data_pipeline.faults import data_faults
from data_pipeline.mix.mixture import training_samples, training_sources
from data_pipeline.read.loader import TrainLoader
from data_pipeline.read.open_files import FILES, OTHERS
from tests.helpers import write_run

SOURCES = 120


@pytest.fixture
def limit() -> Iterator[int]:
    """So many files as this process may have open; what the test changes is put back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def mixture(tmp_path: Path, prepared: Path) -> Config:
    """Of copies, which are refused for that alone."""
    sources = []
    for number in range(SOURCES):
        folder = tmp_path / f"s{number}"
        shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("index"))
        sources.append(SourceConfig(path=str(folder), weight=1))
    config = load_config(str(write_run(tmp_path, prepared)), world_size=1)
    return config.model_copy(update={"data": config.data.model_copy(update={"path": None, "sources": sources})})


def opened(folders: Path) -> int:
    """Open files of this process, and those that it maps, in a folder."""
    paths = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(folders in path.parents for path in paths)


def test_the_limit_is_raised_and_all_sources_are_read(tmp_path: Path, mixture: Config, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limit))
    faults = data_faults({"data": mixture.data, "run": mixture.run})
    assert [fault for fault in faults if "same text" not in fault.allowed] == []
    sources = training_sources(mixture)
    with TrainLoader(training_samples(mixture, sources), 2 * SOURCES, 1, 0, 1, steps=1) as loader:
        loader.step(0)
        assert 512 < opened(tmp_path) < FILES * SOURCES
    for source in sources:
        source.release()


def test_a_system_that_allows_too_few_is_named(mixture: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1024))
    (fault,) = (fault for fault in data_faults({"data": mixture.data}) if fault.key == "data.sources")
    splits = SOURCES  # of train nothing is opened without a section `run`
    assert fault.allowed.startswith(f"{splits} splits of folders may need {OTHERS + FILES * splits:,} open files in each")
    assert "allows 1,024 (`ulimit -Hn`)" in fault.allowed
