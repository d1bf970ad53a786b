"""Folders that appear whole or not at all: written under a temporary name beside the final one, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from data_pipeline.manifest import MANIFEST


@contextmanager
def whole_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; on a clean exit its files are on the disk and it is renamed to `final`.

    With an error or an interruption nothing appears at `final`. Where a folder with content stands there already, it is
    replaced, or, without `replace`, kept. An OSError (disk full, no permission) becomes a UserError.
    """
    final = final.resolve()
    building = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        building.mkdir(parents=True)
        yield building
        for file in building.iterdir():
            _sync(file)
        _sync(building)
        if replace and final.exists():
            final.rename(old := building.with_name(building.name + "-old"))
            building.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        elif not final.exists() or not any(final.iterdir()):
            building.rename(final)
        _sync(final.parent)
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """UserError unless `output` is free, or holds a prepared folder that may be replaced."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if (output / MANIFEST).is_file():
        if not overwrite:
            raise UserError(f"--output {output}: already holds prepared data; --overwrite replaces it")
    elif any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty and holds no prepared data; name another folder")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
