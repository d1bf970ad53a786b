"""What `--profile` asks for. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_STEPS = 100  # a trace holds every operator of every step in memory until it is written
SYNTAX = "steps=A-B[,memory][,ranks=all]"


@dataclass(frozen=True)
class ProfiledSteps:
    """Optimizer steps `first` to `last` of a run, counted from 1.

    `memory`: note all allocations on GPUs, too. `all_ranks`: all write a trace, not only the ranks of one copy of the model.
    """

    first: int
    last: int
    memory: bool = False
    all_ranks: bool = False

    @property
    def words(self) -> str:
        """As in messages and in the name of the folder: steps_10-12."""
        return f"steps_{self.first}-{self.last}"

    @staticmethod
    def parse(text: str, steps: int) -> ProfiledSteps:
        """From the command line, for a run of so many steps; ValueError says what is wrong."""
        asked, *others = text.split(",")
        match = re.fullmatch(r"steps=(\d{1,9})(?:-(\d{1,9}))?", asked)
        if match is None or not set(others) <= {"memory", "ranks=all"}:
            raise ValueError(f"write {SYNTAX}, such as steps=10-12: optimizer steps, counted from 1")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if first < 1:
            raise ValueError("steps are counted from 1; take one after the first, which also builds caches: steps=10-12")
        if last < first:
            raise ValueError(f"step {last} comes before step {first}")
        if last > steps:
            raise ValueError(f"the run ends with step {steps} (training.steps)")
        if last - first >= MOST_STEPS:
            raise ValueError(f"at most {MOST_STEPS} steps; three show what happens")
        return ProfiledSteps(first, last, "memory" in others, "ranks=all" in others)
