"""The benchmark of data: its generated folders are sound, and its figures of packings those of a count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_packing import concatenated, packed
from benchmarks.generated_tokens import drawn_lengths, write_generated
from data_pipeline.prepare.check import check_folders
from data_pipeline.read.manifest import read_manifest


def test_generated_folders_are_sound_and_of_the_size_that_was_asked_for(tmp_path: Path, prepared: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        write_generated(folder, 30_000, prepared, seed)
    assert dict(check_folders(folders)) == {folder: [] for folder in folders}
    one, other = (read_manifest(folder).splits["train"] for folder in folders)
    assert one.tokens == other.tokens == 30_000
    assert one.bin.sha256 != other.bin.sha256
    assert int(drawn_lengths(30_000, seed=1).sum()) == 30_000


def test_waste_of_three_documents() -> None:
    """Samples of 4: the second and third document go over an end of a sample; a last sample is not full."""
    lengths = np.array([3, 5, 8], np.int32)
    assert concatenated(lengths, 4) == {
        "packing": "concatenate, documents",
        "padding_percent": 0.0,
        "left_out_percent": 25.0,
        "split_percent": pytest.approx(200 / 3),
    }
    found = packed(np.array([3, 5, 6], np.int32), 4)  # pieces of 4, 4, 3, 2 and 1
    assert found["padding_percent"] == pytest.approx(100 * 2 / 16)
    assert found["split_percent"] == pytest.approx(200 / 3)
