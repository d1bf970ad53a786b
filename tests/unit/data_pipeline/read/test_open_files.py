"""A mixture of more sources than a process may open files for by default."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import load_config
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
def run(tmp_path: Path, prepared: Path) -> tuple[Path, list[str]]:
    """A configuration and overrides that make its data a mixture of copies."""
    sources = []
    for number in range(SOURCES):
        folder = tmp_path / f"s{number}"
        shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("index"))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["seed"] = number
        (folder / "manifest.json").write_text(json.dumps(manifest))
        sources.append({"path": str(folder), "weight": 1})
    return write_run(tmp_path, prepared), ["--data.path=null", f"--data.sources={json.dumps(sources)}"]


def opened(folders: Path) -> int:
    """Open files of this process, and those that it maps, in a folder."""
    paths = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(folders in path.parents for path in paths)


def test_the_limit_is_raised_and_all_sources_are_read(tmp_path: Path, run: tuple[Path, list[str]], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limit))
    path, overrides = run
    text = load_config(str(path), overrides, world_size=1)
    faults = data_faults({name: getattr(text, name) for name in ("run", "data", "model")})
    assert [fault for fault in faults if "same text" not in fault.allowed] == []  # copies, which are refused for that alone
    sources = training_sources(text)
    with TrainLoader(training_samples(text, sources), 2 * SOURCES, 1, 0, 1, steps=1) as loader:
        loader.step(0)
        assert 512 < opened(tmp_path) < FILES * SOURCES
    for source in sources:
        source.release()


def test_a_system_that_allows_too_few_is_named(run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1024))
    text = load_config(str(run[0]), run[1], world_size=1)
    (fault,) = (fault for fault in data_faults({"data": text.data, "run": text.run}) if fault.key == "data.sources")
    splits = 2 * SOURCES
    assert fault.allowed.startswith(f"{splits} splits of folders may need {OTHERS + FILES * splits:,} open files in each")
    assert "allows 1,024 (`ulimit -Hn`)" in fault.allowed
