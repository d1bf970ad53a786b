"""Limits that keep the code readable, and where unit tests are found."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOLDERS = ("configs", "model", "data_pipeline", "pretrain", "launch", "benchmarks", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MOST_LINES = {"file": 450, "function": 60}
LONG = {
    "model/attention/shared_scores/triton_kernels.py",  # a kernel is one function
}


def too_long(name: str, source: str) -> Iterator[str]:
    """What of a file exceeds the limits; a function's lines include its signature, not its decorators."""
    if (lines := len(source.splitlines())) > MOST_LINES["file"]:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES["function"]:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines"


def test_files_and_functions_are_short() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    assert len(sources) > 200
    found = {name: list(too_long(name, source)) for name, source in sources.items()}
    assert [fault for name, faults in found.items() if name not in LONG for fault in faults] == []
    assert all(found[name] for name in LONG), "an exception that is not needed any more"


@pytest.mark.parametrize("lines", [60, 61])
def test_lines_of_a_function(lines: int) -> None:
    source = "@decorator\nasync def f(\n    a,\n):\n" + "    pass\n" * (lines - 3)
    assert len(list(too_long("name", source))) == (lines == 61)


@pytest.mark.parametrize("lines", [450, 451])
def test_lines_of_a_file(lines: int) -> None:
    assert len(list(too_long("name", "pass\n" * lines))) == (lines == 451)


def test_folders_of_unit_tests_mirror_those_of_the_code() -> None:
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("*.py")}
    assert Path("model/attention") in folders
    assert [folder for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []
    rooms = {path.parent.relative_to(ROOT) for path in FILES if path.name != "__init__.py"}
    packages = ("configs", "data_pipeline", "model", "pretrain", "launch")
    assert [room for room in sorted(rooms) if room.parts and room.parts[0] in packages and room not in folders] == []
