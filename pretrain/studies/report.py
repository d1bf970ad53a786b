"""`launch/sweep.py report`: what a study has brought so far, as text, CSV, JSON and a page. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from configs.durable import write_text
from configs.errors import UserError
from pretrain.studies.collected import Expected, collect, laws
from pretrain.studies.data import as_json, groups_csv, rows_csv
from pretrain.studies.page import study_page
from pretrain.studies.pool import pools
from pretrain.studies.table import across, terminal

REPORT = "report"  # in a study's folder


def report(name: str, folder: Path, expected: Expected, output: Path | None = None) -> Iterator[str]:
    """Write the report of a study, finished or not, and yield it as lines for the terminal.

    `expected` are its children by part; those that have no folder in `folder` are missing. Files go to `output`, by
    default to the folder `report` in that of the study: runs.csv, groups.csv, report.json, report.html.
    """
    parts = collect(folder, expected)
    fits = [laws(part) for part in parts]
    for part, of_part in zip(parts, fits, strict=True):
        yield from terminal(part, of_part)
        yield ""
    for members in pools(parts):
        yield from across(members)
        yield ""
    files = {
        "runs.csv": rows_csv(parts),
        "groups.csv": groups_csv(parts),
        "report.json": as_json(parts, fits),
        "report.html": study_page(name, parts, fits),
    }
    yield write_files(output or folder / REPORT, files)


def write_files(folder: Path, files: Mapping[str, str]) -> str:
    """Write them, and say so. UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder with --output") from error
    return f"written {folder}: {', '.join(files)}"
