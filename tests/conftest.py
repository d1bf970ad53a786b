import fcntl
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

gc.disable()  # until all tests are collected: importing leaves little garbage, and looking for it takes seconds


def pytest_collection_finish() -> None:
    """In a process that runs tests, not in the one that only hands them out, which therefore imports nothing large."""
    import torch

    torch.set_num_threads(1)  # workers and ranks share the cores
    gc.freeze()  # what is imported stays
    gc.enable()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the test session, filled by the first of xdist's workers that needs it; the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder / "made"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed: each then meets the failure itself
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder: about 60 documents, 300 ids."""

    from data_pipeline.prepare.prepare import PrepareOptions, prepare
    from tests.helpers import write_text_files

    def make(folder: Path) -> None:
        texts = write_text_files(folder / "texts")
        prepare(PrepareOptions(inputs=(str(texts),), output=folder / "data", vocab_size=300, split=(70, 20, 10)))

    return made_once(tmp_path_factory, "prepared", make) / "data"


@pytest.fixture(scope="session")
def masked_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `prepared`, with a mask token and 20 sentinels."""

    from tests.helpers import with_special_tokens

    def make(folder: Path) -> None:
        names = ["<|mask|>", *(f"<|sentinel_{number}|>" for number in range(20))]
        with_special_tokens(folder / "texts", folder / "data", names)

    return made_once(tmp_path_factory, "masked_data", make) / "data"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The config of a run on `prepared` that has a checkpoint at step 3 of 6; its folder has the config's name."""

    from tests.helpers import train, write_run

    def make(folder: Path) -> None:
        train(write_run(folder, prepared), "--training.steps=3")

    return made_once(tmp_path_factory, "finished", make) / "run.yaml"
