import pytest

from data_pipeline.prepare import PrepareOptions, prepare
from tests.helpers import write_text_files


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    """A small prepared folder: about 60 documents, 300 ids."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = write_text_files(folder / "texts")
    prepare(PrepareOptions(inputs=(str(texts),), output=folder / "data", vocab_size=300, split=(70, 20, 10)))
    return folder / "data"
