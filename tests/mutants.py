"""How many small faults in the source the tests notice: `python tests/mutants.py sample | locate | run`.

`sample` draws mutants (`<=` for `<`, 0 for 1, …) from the functions of the source. Each is known by its module's name, its
function, the expression and the one around it, so that `locate` finds it again after files have moved. `run` copies the project
with all mutants in it, each as `(mutant if _mutant(7) else original)`, and starts pytest there, once for each worker. For a
test, pytest forks itself: once with no mutant, to see whether the test passes and which mutants it comes past, then once for
each of these that no test has noticed yet. What was tried is kept, and a run that was ended goes on from there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "data_pipeline", "model", "pretrain", "launch")
LEFT_OUT = re.compile(r"_triton|^(modeling|configuration)_manyheads")  # compiled from their text, or copied into exports
SKIPPED = (ast.JoinedStr, ast.Assert, ast.Raise, ast.pattern, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
PAIRS = [("Lt", "LtE"), ("Gt", "GtE"), ("Eq", "NotEq"), ("In", "NotIn"), ("Is", "IsNot"), ("Add", "Sub"), ("Mult", "Div")]
PAIRS += [("And", "Or"), ("max", "min"), ("any", "all")]
OTHER = {"FloorDiv": "Div"} | dict(PAIRS) | {second: first for first, second in PAIRS}
RUNTIME = '''"""Which mutant is active; a file for each that this process or one that it starts comes past."""
import os

seen = set()


def mutant(number):
    folder = os.environ.get("MUTANT_REACH")  # asked each time: a fork server's children get their environment late
    if folder and (folder, number) not in seen:
        seen.add((folder, number))
        open(f"{folder}/{number}", "w").close()
    return os.environ.get("MUTANT") == str(number)


mutant._dynamo_marked_constant = True  # torch.compile asks once
'''


@dataclass(frozen=True)
class Mutant:
    """One change; `occurrence` counts those that are alike in all else of one function."""

    path: str
    function: str
    operator: str
    text: str
    within: str
    mutated: str
    occurrence: int = 0

    def likeness(self) -> Iterator[tuple[object, ...]]:
        """What it is known by, the most exact first."""
        change = (self.operator, self.text, self.mutated)
        exact = (*change, self.within, self.occurrence)
        yield 0, self.path, self.function, *exact
        yield 1, Path(self.path).parts[0], Path(self.path).name, self.function, *exact
        yield 2, self.function, *exact
        yield 3, self.function.rpartition(".")[2], *exact
        yield 4, self.function.rpartition(".")[2], *change


Place = tuple[tuple[int, int], tuple[int, int]]  # of an expression: line and byte where it starts, and where it ends


def changes(node: ast.AST) -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """The mutants of one node, its parts left alone: name of the change, old and new expression."""
    new: Any = copy.copy(node)
    kind = type(getattr(node, "op", node)).__name__
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            kind = type(operator).__name__
            new = ast.Compare(node.left, [*node.ops[:i], getattr(ast, OTHER[kind])(), *node.ops[i + 1 :]], node.comparators)
            yield f"{kind} {i}", node, new
    elif isinstance(node, ast.BinOp | ast.BoolOp) and kind in OTHER:
        new.op = getattr(ast, OTHER[kind])()
        yield kind, node, new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "Not", node, node.operand
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OTHER:
        new.func = ast.Name(OTHER[node.func.id])
        yield node.func.id, node, new
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = node.value
        other = not value if isinstance(value, bool) else 1 - value if value < 2 else value + 1
        yield type(value).__name__, node, ast.Constant(other)
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return", node.value, ast.Constant(None)


def walk(node: ast.AST | None, parent: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All nodes of a function's body with their parents, but for texts, checks, annotations and functions within."""
    if isinstance(node, ast.AnnAssign):
        yield from walk(node.value, node)
    elif node and not isinstance(node, SKIPPED):
        yield node, parent
        for child in ast.iter_child_nodes(node):
            yield from walk(child, node)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else prefix
        if isinstance(child, ast.FunctionDef):
            yield name, child
        yield from functions(child, name if name == prefix else f"{name}.")


def sources(tree: Path, folders: Iterable[str]) -> list[Path]:
    return sorted(path for name in folders for path in (tree / name).rglob("*.py") if not LEFT_OUT.search(path.name))


def candidates(tree: Path, folders: Iterable[str]) -> Iterator[tuple[Mutant, Place]]:
    """All mutants of the files of some folders."""
    alike: Counter[Mutant] = Counter()
    for path, (name, function) in (
        (p, found) for p in sources(tree, folders) for found in functions(ast.parse(p.read_bytes()))
    ):
        for node, parent in (pair for statement in function.body for pair in walk(statement, function)):
            for operator, old, new in changes(node):
                around = parent if isinstance(parent, ast.expr | ast.keyword) else old
                texts = ast.unparse(old), ast.unparse(around), ast.unparse(new)
                mutant = Mutant(path.relative_to(tree).as_posix(), name, operator, *texts)
                place = (old.lineno, old.col_offset), (old.end_lineno or 0, old.end_col_offset or 0)
                yield replace(mutant, occurrence=alike[mutant]), place
                alike[mutant] += 1


def sample(tree: Path, count: int, seed: int) -> list[Mutant]:
    """So many mutants, shared out over the packages by lines; at most two of a function, none inside another."""
    draw = random.Random(seed)
    lines = [sum(path.read_bytes().count(b"\n") for path in sources(tree, [name])) for name in PACKAGES]
    chosen: list[tuple[Mutant, Place]] = []
    for i, package in enumerate(PACKAGES):
        pool = list(candidates(tree, [package]))
        draw.shuffle(pool)
        for mutant, place in pool:
            own = [p for m, p in chosen if (m.path, m.function) == (mutant.path, mutant.function)]
            apart = all(end <= place[0] or place[1] <= start for start, end in own)
            if apart and len(own) < 2 and len(chosen) < round(count * sum(lines[: i + 1]) / sum(lines)):
                chosen.append((mutant, place))
    return [mutant for mutant, _ in chosen]


def locate(tree: Path, mutants: Sequence[Mutant]) -> dict[int, tuple[Mutant, Place]]:
    """Number of each mutant found → what it is called now, and where; what is not the only one of its kind is not found."""
    folders = [p.name for p in tree.iterdir() if p.is_dir() and p.name not in ("tests", "benchmarks", "examples", "docs")]
    known: dict[tuple[object, ...], list[tuple[Mutant, Place]]] = defaultdict(list)
    for candidate in candidates(tree, [name for name in folders if not name.startswith(".")]):
        for key in candidate[0].likeness():
            known[key].append(candidate)
    found: dict[int, tuple[Mutant, Place]] = {}
    for number, mutant in enumerate(mutants):
        only = next((known[key] for key in mutant.likeness() if len(known.get(key, [])) == 1), [])
        if only and only[0] not in found.values():
            found[number] = only[0]
        else:
            print(f"not found: {number} {mutant}")
    return found


def instrument(tree: Path, output: Path, mutants: dict[int, tuple[Mutant, Place]]) -> None:
    """A copy of the project with all mutants in it; lines keep their numbers."""
    shutil.copytree(tree, output, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs"))
    edits: dict[str, list[tuple[tuple[int, int], bytes]]] = defaultdict(list)
    for number, (mutant, place) in mutants.items():
        edits[mutant.path] += [(place[0], f"(({mutant.mutated}) if _mutant({number}) else (".encode()), (place[1], b"))")]
    for name, parts in edits.items():
        content = (output / name).read_bytes()
        first = next(s for s in ast.parse(content).body if not isinstance(s, ast.Expr))
        if isinstance(first, ast.ImportFrom) and first.module == "__future__":
            parts.append(((first.lineno, first.end_col_offset or 0), b"; from _mutants import mutant as _mutant"))
        else:
            parts.append(((first.lineno, 0), b"from _mutants import mutant as _mutant; "))
        lines = content.splitlines(keepends=True)
        for (line, column), text in sorted(parts, reverse=True):
            lines[line - 1] = lines[line - 1][:column] + text + lines[line - 1][column:]
        (output / name).write_bytes(b"".join(lines))


def read(rows: Path) -> dict[str, dict[str, Any]]:
    return {row["test"]: row for row in map(json.loads, rows.read_text().splitlines())}


def work_off(work: Path, mutants: Sequence[Mutant], options: argparse.Namespace) -> None:
    """Make the copies, start the workers, wait for them, report."""
    if not work.exists():
        found = locate(ROOT, mutants)
        for number in range(options.workers):
            instrument(ROOT, work / f"tree{number}", found)
            (work / f"tree{number}/_mutants.py").write_text(RUNTIME)  # where all that runs the copy looks for modules
            (work / f"tmp{number}").mkdir()
        (work / "lib").mkdir()
    shutil.copy(ROOT / "tests/mutants_plugin.py", work / "lib/_mutants_plugin.py")
    shutil.rmtree(work / "claims", ignore_errors=True)
    (work / "claims").mkdir()
    (work / "rows.jsonl").touch()
    settings = str(work), time.time() + 60 * options.minutes, options.limit, options.patience
    variables = {"MUTANT_OPTIONS": json.dumps(settings), "PYTHONPATH": str(work / "lib"), "OMP_NUM_THREADS": "1"}
    plugins = "-m pytest -p no:cacheprovider -p _mutants_plugin -o timeout=900"
    command = [sys.executable, *plugins.split(), *options.tests.split()]
    workers = []
    for number in range(options.workers):
        own = {"TMPDIR": str(work / f"tmp{number}"), "MUTANT_WORK": f"{work}/{number}"}
        with (work / f"output{number}.txt").open("w") as out:
            place = work / f"tree{number}"
            workers.append(subprocess.Popen(command, cwd=place, env=os.environ | variables | own, stdout=out, stderr=out))
    for worker in workers:
        worker.wait()


def report(work: Path, mutants: Sequence[Mutant], output: Path) -> None:
    """A line for each mutant, and the totals."""
    found, tests = locate(ROOT, mutants), read(work / "rows.jsonl").values()
    lines = []
    for number, mutant in enumerate(mutants):
        past = [row["test"] for row in tests if number in row["past"] and row["outcome"] == "passed"]
        trials = {row["test"]: row["trials"][str(number)] for row in tests if str(number) in row["trials"]}
        by = [f"{how}: {test}" for test, how in trials.items() if how != "passed"]
        outcome = "killed" if by else "survived" if trials else "untried" if past else "unreached"
        outcome = outcome if number in found else "not found"
        counts = {"tried": len(trials), "past": len(past)}
        lines.append({"number": number, **asdict(mutant), "outcome": outcome, "by": by, **counts})
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{Counter(row['outcome'] for row in tests)} tests without a mutant")
    print("not counted:", *(row["test"] for row in tests if row["outcome"] not in ("passed", "skipped")), sep="\n  ")
    print(Counter(line["outcome"] for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("sample", "locate", "run", "report"))
    parser.add_argument("--output", "--sample", type=Path, default="mutants.json", dest="sample", help="file of the mutants")
    parser.add_argument("--count", type=int, default=64, help="sample: how many")
    parser.add_argument("--seed", type=int, default=7, help="sample: of the draw")
    parser.add_argument("--work", type=Path, default="/tmp/mutants", help="run: folder of the copies and of what was tried")
    parser.add_argument("--tests", default="tests/unit tests/dist tests/e2e", help="run: arguments of pytest")
    parser.add_argument("--json", type=Path, default="mutants.jsonl", help="run, report: a line for each mutant")
    parser.add_argument("--workers", type=int, default=2, help="run: tests at once")
    parser.add_argument("--limit", type=float, default=150, help="run: seconds of tests for one mutant")
    parser.add_argument("--patience", type=float, default=10, help="run: tests of more seconds wait for the others")
    parser.add_argument("--minutes", type=float, default=600, help="run: start no test later")
    options = parser.parse_args()
    if options.step == "sample":
        drawn = [asdict(mutant) for mutant in sample(ROOT, options.count, options.seed)]
        options.sample.write_text(json.dumps(drawn, indent=1) + "\n")
    mutants = [Mutant(**row) for row in json.loads(options.sample.read_text())]
    if options.step == "run":
        work_off(options.work.resolve(), mutants, options)
    if options.step in ("run", "report"):
        report(options.work.resolve(), mutants, options.json)
    else:
        print(f"{len(locate(ROOT, mutants))} of {len(mutants)} found")


if __name__ == "__main__":
    main()
