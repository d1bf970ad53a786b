"""The generated input of the benchmark of preparation."""

from pathlib import Path

from benchmarks.prepare import documents, write_input
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.sources import find_sources


def test_three_kinds_of_files_hold_the_size_that_was_asked_for(tmp_path: Path) -> None:
    write_input(tmp_path / "in", 300_000)
    (source,) = find_sources([str(tmp_path / "in")])
    texts = list(source.documents(ReadOptions()))
    assert len(source.files) == 3
    assert all(isinstance(text, str) for text in texts)
    size = sum(len(text) for text in texts if isinstance(text, str))
    assert 300_000 <= size < 400_000
    assert texts[-1] == list(documents(100_000, 0))[-1]  # of plain.jsonl
