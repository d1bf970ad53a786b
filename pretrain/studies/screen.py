"""Progress of a sweep on one screen: a table that is redrawn on a terminal, plain lines anywhere else. Torch-free."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.studies.children import Child, counted_children
from pretrain.studies.progress import standing
from pretrain.studies.records import Outcome, read_outcome
from pretrain.studies.running import Running

if TYPE_CHECKING:
    from pretrain.studies.sweep import Sweep

REDRAWN = 1.0  # seconds
LINES = 60.0  # seconds between lines where nothing is redrawn


@dataclass
class Screen:
    """Prints to standard output."""

    terminal: bool = field(default_factory=lambda: sys.stdout.isatty())
    every: float = LINES
    drawn: int = 0  # lines of the table that is on the screen
    shown_at: float = field(default_factory=time.monotonic)

    def started(self, child: Child) -> None:
        if not self.terminal:
            self.say(f"start    {child.name}")

    def ended(self, child: Child, outcome: Outcome) -> None:
        words = f"{outcome.status:<8} {child.name} after {duration(outcome.seconds)}"
        self.say(words + (f": {outcome.error}" if outcome.error else ""))

    def show(self, sweep: Sweep) -> None:
        """The state of the whole, if it is time."""
        if time.monotonic() - self.shown_at < (REDRAWN if self.terminal else self.every):
            return
        self.shown_at = time.monotonic()
        lines = table(sweep)
        if self.terminal:
            width, height = shutil.get_terminal_size()
            self.clear()
            lines = [line[: width - 1] for line in lines][: max(2, height - 1)]
            self.drawn = len(lines)
        print("\n".join(lines), flush=True)

    def end(self, sweep: Sweep) -> None:
        self.say(summary(sweep))

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
            self.drawn = 0


def summary(sweep: Sweep) -> str:
    """One line for the whole."""
    done, failed, running = sweep.count("finished"), sweep.count("failed"), len(sweep.running)
    left = len(sweep.children) - done - failed - running
    counts = f"{done:,} of {len(sweep.children):,} done, {failed:,} failed, {left:,} left"
    parts = [counts, f"{running:,} running" if running else ""]
    if sweep.stopped_by is not None and sweep.running:
        parts.append("stopping; once more kills")
    elif sweep.running and (rest := time_left(sweep)) is not None:
        speeds = [standing(one.child.folder).tokens_per_second or 0.0 for one in sweep.running]
        parts.append(f"{sum(speeds):,.0f} tok/s, {duration(rest)} to go")
    if sweep.out_of_time and left:
        parts.append(f"budget.hours {sweep.hours:g} are spent; raise them to run what is left")
    return f"sweep    {', '.join(part for part in parts if part)}; {duration(sweep.spent + sweep.elapsed)} so far"


def table(sweep: Sweep) -> list[str]:
    """The whole, and a line for each child that runs."""
    return [summary(sweep), *(row(running) for running in sweep.running)]


def row(running: Running) -> str:
    """A running child: its step, loss, speed and time left."""
    stands, steps = standing(running.child.folder), running.child.steps
    words = [f"         {running.child.name}", f"step {stands.step:,}/{steps:,}"]
    if stands.loss is not None:
        words.append(f"loss {stands.loss:.4f}")
    if stands.tokens_per_second:
        words.append(f"{stands.tokens_per_second:,.0f} tok/s")
        seconds = (steps - stands.step) * running.child.tokens / steps / stands.tokens_per_second
        words.append(f"left {duration(seconds)}")
    return " | ".join(words)


def time_left(sweep: Sweep) -> float | None:
    """Seconds that the rest takes if its FLOPs take as long as those so far; None before there are any."""
    done = sweep.flops_done + sum(running.flops_done for running in sweep.running)
    ended = {name for name, outcome in sweep.outcomes.items() if outcome.status != "stopped"}
    left: float = sum(child.flops for child in sweep.children if child.name not in ended)
    left -= sum(standing(running.child.folder).step / running.child.steps * running.child.flops for running in sweep.running)
    return sweep.elapsed * left / done if done > 0 else None


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def listing(children: Sequence[Child]) -> str:
    """All children with their sizes, and how those ended that have."""
    outcomes = {child.name: read_outcome(child.folder) for child in children}
    ended = {name: outcome.status if outcome else "" for name, outcome in outcomes.items()}
    rows = [("", "child", "parameters", "steps", "tokens", "FLOPs", "")]
    for child in children:
        figures = (f"{child.parameters:,}", f"{child.steps:,}", f"{child.tokens:,}", f"{child.flops:.3g}")
        rows.append((f"{child.number}", child.name, *figures, ended[child.name]))
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    lines = []
    for cells in rows:
        aligned = [text.rjust(width) for text, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([aligned[0], cells[1].ljust(widths[1]), *aligned[2:-1], cells[-1]]).rstrip())
    tokens, flops = sum(child.tokens for child in children), sum(child.flops for child in children)
    lines.append(f"{counted_children(len(children))}, {tokens:,} tokens, {flops:.3g} FLOPs")
    left = [child.number for child in children if ended[child.name] != "finished"]
    if left:
        lines.append(f"left: {ranges(left)}")
    return "\n".join(lines)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `sbatch --array` takes them: 1-4,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
