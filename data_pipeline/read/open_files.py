"""How many files a process may have open: a run maps those of all its sources into memory, each of which counts."""

from __future__ import annotations

import resource

FILES = 12  # of a split: tokens and documents, and three arrays and a lock for each of two epochs, with room to spare
OTHERS = 512  # what else a process has open: libraries, sockets, logs, checkpoints


def lacking_files(splits: int) -> str | None:
    """Let this process open so many splits; why it cannot, if the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHERS + FILES * splits
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    if hard != resource.RLIM_INFINITY and hard < needed:
        return (
            f"{splits} splits of folders may need {needed:,} open files in each process, and this system allows {hard:,} "
            "(`ulimit -Hn`); raise that limit, or join folders"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return None
