"""Faults of validation sets, which are found before a run starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.schema import DataConfig, ModelConfig, Section, ValidationConfig
from data_pipeline.faults import data_faults
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.manifest import read_manifest
from tests.helpers import write_text_files


def faults(data: Path, **sets: Path) -> list[tuple[str, str]]:
    """Key and reason of each fault of a run with these validation sets."""
    named = {name: str(path) for name, path in sets.items()}
    sections: dict[str, Section] = {
        "data": DataConfig(path=str(data), sequence_length=16),
        "validation": ValidationConfig(sets=named),
    }
    found = data_faults(sections)
    assert all(fault.value == named.get(fault.key.rpartition(".")[2], str(data)) for fault in found)
    return [(fault.key, fault.allowed) for fault in found]


@pytest.fixture
def others(tmp_path: Path, prepared: Path) -> dict[str, Path]:
    """Folders that were prepared from other text: with the run's tokenizer, with one of their own, and without the split."""
    texts = str(write_text_files(tmp_path / "texts", documents=12, seed=1))
    tokenizer = prepared / "tokenizer.json"
    made = {"good": ((0, 1, 0), tokenizer), "foreign": ((1, 1, 0), None), "unsplit": ((1, 0, 0), tokenizer)}
    for name, (split, given) in made.items():
        size = {"vocab_size": 290} if given is None else {}
        prepare(PrepareOptions(inputs=(texts,), output=tmp_path / name, split=split, tokenizer=given, **size))  # type: ignore[arg-type]
    return {name: tmp_path / name for name in made}


def test_a_set_needs_no_training_text_and_the_data_then_no_validation_text(others: dict[str, Path]) -> None:
    assert faults(others["unsplit"], wiki=others["good"]) == []
    assert [key for key, _ in faults(others["unsplit"])] == ["data.path"]


def test_every_fault_of_every_set_is_listed(tmp_path: Path, prepared: Path, others: dict[str, Path]) -> None:
    tokens = read_manifest(others["good"]).splits["valid"].tokens
    short = shutil.copytree(others["good"], tmp_path / "short")
    tree = json.loads((short / "manifest.json").read_text())
    tree["splits"]["valid"]["tokens"] = 16
    (short / "manifest.json").write_text(json.dumps(tree))
    truncated = shutil.copytree(others["good"], tmp_path / "truncated")
    (truncated / "valid.bin").write_bytes(b"")
    assert tokens > 16
    found = faults(prepared, none=tmp_path / "none", **others, short=short, truncated=truncated)
    expected = {
        "none": "no such folder; launch/prepare.py makes one",
        "foreign": f"prepared with another tokenizer than {prepared}; prepare it with --tokenizer {prepared}/tokenizer.json",
        "unsplit": "has no documents in split valid; give it a share in --split of launch/prepare.py",
        "short": "its split valid has 16 tokens, too few for data.sequence_length (16) + 1; prepare more text",
        "truncated": f"valid.bin has 0 bytes instead of {2 * tokens}, so it is truncated; "
        "copy it again or run launch/prepare.py",
    }
    assert found == [(f"validation.sets.{name}", reason) for name, reason in expected.items()]


def test_sets_are_checked_where_the_data_is_missing(tmp_path: Path, others: dict[str, Path]) -> None:
    found = faults(tmp_path / "data", unsplit=others["unsplit"], good=others["good"])
    assert [key for key, _ in found] == ["data.path", "validation.sets.unsplit"]


def test_a_short_set_is_enough_where_samples_are_filled_up(tmp_path: Path, prepared: Path, others: dict[str, Path]) -> None:
    tokens = read_manifest(others["good"]).splits["valid"].tokens
    for packing, keys in {"documents": ["validation.sets.wiki"], "best_fit": []}.items():
        data = DataConfig(path=str(prepared), sequence_length=tokens, packing=packing)  # type: ignore[arg-type]
        found = data_faults({"data": data, "validation": ValidationConfig(sets={"wiki": str(others["good"])})})
        assert [fault.key for fault in found if fault.key.startswith("validation")] == keys


@pytest.mark.parametrize(("end", "count"), [(None, 0), (0, 0), (5, 1)])
def test_documents_end_where_the_tokenizer_says(prepared: Path, end: int | None, count: int) -> None:
    """A run's config.yaml has the end of its own tokenizer, and may be copied for other data."""
    assert read_manifest(prepared).end_of_document == 0
    model = ModelConfig(attention="mha", hidden_size=16, num_layers=2, num_heads=2, end_of_document=end)
    sections = {"data": DataConfig(path=str(prepared), sequence_length=16, packing="documents"), "model": model}
    found = [(fault.key, fault.value, fault.allowed) for fault in data_faults(sections)]
    assert found == [("model.end_of_document", 5, "the tokenizer's (0), or null")] * count
