"""The validation sets of a run. Torch-free."""

from __future__ import annotations

from pathlib import Path

from configs.schema import DataConfig, ValidationConfig
from data_pipeline.read.manifest import manifest_or_reason

UNNAMED = ""  # the only set of a run with one source that names none: its figures have no name of a set


def validation_sets(data: DataConfig, validation: ValidationConfig) -> dict[str, str]:
    """Name → prepared folder, of which the split `valid` counts: those that are named, else the sources that have one."""
    if validation.sets:
        return dict(validation.sets)
    if len(data.parts) == 1:
        return {UNNAMED: data.parts[0].path}
    return {source.label: source.path for source in data.parts if _has_text(source.path)}


def _has_text(folder: str) -> bool:
    manifest = manifest_or_reason(Path(folder))
    return not isinstance(manifest, str) and manifest.has("valid")
