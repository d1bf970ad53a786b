"""Soak tests of checkpoints: `python -m tests.soak --seed 1 --pairs 40 --kills 50`, or `make soak`.

Pairs resume from a drawn layout on another (tests/soak/pairs.py), kills end runs at drawn moments (tests/soak/kills.py). A case
follows from the seed and its number. Prints one line for each; exit status 1 if any failed, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from data_pipeline.prepare.prepare import PrepareOptions, prepare
from tests.helpers import write_text_files
from tests.soak.draw import pair
from tests.soak.kills import ENGINES, Kills
from tests.soak.pairs import check_pair
from tests.soak.worlds import RunFailedError, Worlds


@dataclass
class Row:
    """A case and what came of it: a line on the screen, and of the file that --rows names."""

    seed: int
    part: str  # pair or kill
    number: int
    what: str
    seconds: float = 0.0
    loss: float | None = None  # the largest relative difference
    grad_norm: float | None = None
    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = "FAILED" if self.faults else "ok"
        figures = "" if self.loss is None else f"; loss {self.loss:.0e}, norm {self.grad_norm:.0e}"
        killed = f"; killed {len(self.kills)} times: {', '.join(self.kills)}" if self.part == "kill" else ""
        return f"{self.part} {self.number:>3}  {found}  {self.seconds:5.1f} s  {self.what}{figures}{killed}"


def main() -> int:
    arguments = _arguments()
    done = _known(arguments.rows, arguments.seed)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        data = prepared(folder)
        failed = []
        for row in _cases(arguments, done, folder, data):
            if arguments.rows:
                with arguments.rows.open("a") as rows:
                    rows.write(json.dumps(asdict(row)) + "\n")
            if row.faults:
                failed.append(row)
                print("  " + "\n  ".join(row.faults), flush=True)
                print(f"  repeat it: python -m tests.soak --seed {row.seed} --{row.part} {row.number} --folder DIR", flush=True)
    print(f"{len(failed)} cases failed: {', '.join(f'{row.part} {row.number}' for row in failed)}" if failed else "all passed")
    return 1 if failed else 0


def prepared(folder: Path) -> Path:
    """Tokens of so few documents that every run comes to its second epoch."""
    if not (folder / "data" / "manifest.json").exists():
        texts = write_text_files(folder / "texts", documents=12)
        prepare(PrepareOptions(inputs=(str(texts),), output=folder / "data", vocab_size=300, split=(70, 20, 10)))
    return folder / "data"


def _cases(arguments: argparse.Namespace, done: list[Row], folder: Path, data: Path) -> Iterator[Row]:
    alone = arguments.pair or arguments.kill
    if not arguments.kill:
        numbers = [arguments.pair] if arguments.pair else range(1, arguments.pairs + 1)
        yield from _pairs(arguments.seed, [number for number in numbers if _not_in(done, "pair", number)], folder, data)
    if arguments.kill or not alone:
        yield from _kills(arguments, done, folder, data)


def _pairs(seed: int, numbers: list[int], folder: Path, data: Path) -> Iterator[Row]:
    clock = _Clock(len(numbers))
    with Worlds() as worlds:
        for number in numbers:
            case, began = pair(seed, number), time.monotonic()
            row = Row(seed, "pair", number, str(case))
            try:
                outcome = check_pair(case, worlds, folder / f"pair_{number}", data)
                row.loss, row.grad_norm, row.faults = outcome.loss, outcome.grad_norm, outcome.faults
            except RunFailedError as error:
                row.faults = [str(error)]
            row.seconds = round(time.monotonic() - began, 1)
            print(row, clock.left(1), flush=True)
            yield row


def _kills(arguments: argparse.Namespace, done: list[Row], folder: Path, data: Path) -> Iterator[Row]:
    """Cases until there were as many kills as asked for, or five have failed."""
    seed, engines = arguments.seed, dict[str, Kills]()
    wanted = 1 if arguments.kill else arguments.kills - sum(len(row.kills) for row in done)
    clock, number, failed = _Clock(wanted), arguments.kill or 1, 0
    while wanted > 0 and failed < 5:
        if arguments.kill or _not_in(done, "kill", number):
            engine = list(ENGINES)[number % len(ENGINES)]
            draw, began = random.Random(f"{seed}, kill {number}"), time.monotonic()
            launcher = draw.choice((draw.choice(ENGINES[engine][0]), "forked"))  # which takes a tenth of the time
            row = Row(seed, "kill", number, f"{engine}, {launcher}")
            if engine not in engines:
                engines[engine] = Kills(engine, folder / f"kills_{engine.replace(' ', '_')}", data)
            result = engines[engine].case(draw, f"case_{number}", launcher)
            row.kills, row.faults = result.kills, result.faults + [result.output[-4000:]] * bool(result.faults)
            row.seconds = round(time.monotonic() - began, 1)
            wanted = 0 if arguments.kill else wanted - len(row.kills)
            failed += bool(row.faults)
            print(row, clock.left(len(row.kills)), flush=True)
            yield row
        number += 1


class _Clock:
    """The time that is left, by the time that was taken."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def left(self, more: int) -> str:
        self.done += more
        if not self.done or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"(left {timedelta(seconds=round(seconds))})"


def _known(file: Path | None, seed: int) -> list[Row]:
    """Cases that an earlier start has passed."""
    if file is None or not file.exists():
        return []
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    return [row for row in rows if row.seed == seed and not row.faults]


def _not_in(done: list[Row], part: str, number: int) -> bool:
    return all((row.part, row.number) != (part, number) for row in done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of layouts (default: 40)")
    parser.add_argument("--kills", type=int, default=50, help="kills, over as many runs as it takes (default: 50)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="adds a JSON line for each case; what passed is left out")
    parser.add_argument("--folder", type=Path, help="where to run, kept; default: a temporary folder")
    parser.add_argument("--pair", type=int, metavar="NUMBER", help="this pair alone")
    parser.add_argument("--kill", type=int, metavar="NUMBER", help="this run alone")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
