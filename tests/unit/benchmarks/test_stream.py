"""The benchmark of streams: a worker's tokens, and the way back to the end of a file."""

from pathlib import Path

from benchmarks.stream import reading, resuming
from configs.load import load_config
from tests.helpers import write_run


def test_figures_of_reading_and_resuming(tmp_path: Path, prepared: Path) -> None:
    texts = sorted((prepared.parent / "texts").iterdir())
    stream = f"--data.stream={{input: {[str(path) for path in texts]}, tokenizer: {prepared}, shards: 2}}"
    config = load_config(write_run(tmp_path, prepared), ["--data.path=null", stream, "--data.max_epochs=1000"])
    assert all(figure > 1000 for figure in reading(config, 200).values())
    found = resuming(config, 1e-3, tmp_path)
    assert 1e-3 <= found["text_gb"] < 1.1e-3
    assert found["compressed_gb"] * 1e9 == (tmp_path / "text.jsonl.zst").stat().st_size
    assert 0 < found["processor_seconds"] < found["seconds"] + 0.1
