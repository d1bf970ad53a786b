from pathlib import Path

import pytest

from data_pipeline.prepare.prepare import PrepareOptions, prepare
from tests.helpers import train, write_run, write_text_files


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared folder: about 60 documents, 300 ids."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = write_text_files(folder / "texts")
    prepare(PrepareOptions(inputs=(str(texts),), output=folder / "data", vocab_size=300, split=(70, 20, 10)))
    return folder / "data"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The config of a run on `prepared` that has a checkpoint at step 3 of 6; its folder has the config's name."""
    config = write_run(tmp_path_factory.mktemp("finished"), prepared)
    train(config, "--training.steps=3")
    return config
