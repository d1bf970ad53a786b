"""Files that survive a crash: on the disk before anyone relies on them."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Create or replace `path` by `text`: the old or the new content is there, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")  # as it is: its hash must not change
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
