"""Which text a run is validated on."""

from __future__ import annotations

from pathlib import Path

from configs.schema import DataConfig, ValidationConfig
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.sets import validation_sets
from tests.helpers import write_text_files


def test_sources_with_the_split_are_sets_unless_others_are_named(tmp_path: Path, prepared: Path) -> None:
    texts, tokenizer = str(write_text_files(tmp_path / "texts", documents=12, seed=1)), prepared / "tokenizer.json"
    for name, split in {"wiki": (1, 1, 0), "code": (1, 0, 1)}.items():
        prepare(PrepareOptions(inputs=(texts,), output=tmp_path / name, split=split, tokenizer=tokenizer))
    paths = {"prose": str(prepared), "code": str(tmp_path / "code"), "wiki": str(tmp_path / "wiki")}
    sources = [{"path": path, "weight": 1.0, "name": "prose" if name == "prose" else None} for name, path in paths.items()]
    mixture = DataConfig(sources=sources, sequence_length=16)  # type: ignore[arg-type]
    alone = DataConfig(path=paths["wiki"], sequence_length=16)
    none, named = ValidationConfig(), ValidationConfig(sets={"mine": paths["wiki"]})
    assert validation_sets(mixture, none) == {"prose": paths["prose"], "wiki": paths["wiki"]}
    assert validation_sets(alone, none) == {"": paths["wiki"]}
    assert validation_sets(mixture, named) == validation_sets(alone, named) == {"mine": paths["wiki"]}
