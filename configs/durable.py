"""Files that survive a crash: on the disk before anyone relies on them; folders that nobody else uses."""

import os
from pathlib import Path

from configs.errors import UserError


def check_new_folder(path: Path) -> None:
    """UserError unless `path` can become a new folder, or replace an empty one."""
    try:
        if path.is_symlink():
            raise UserError(f"{path}: is a link; name the folder itself")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; name a new folder")
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path}: is there already and not empty; choose another folder or delete it")
        if path.resolve() == Path.cwd() or path.is_mount():
            raise UserError(f"{path}: is the current folder or a mount point, which cannot be replaced; name a folder in it")
        if not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.resolve().parent}")
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        raise UserError(f"{path}: {error.strerror}") from error


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
