"""English found on any machine.

Python's help topics and the docstrings of its standard library and of the installed packages: prose with some code.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def prose(limit: int) -> list[str]:
    """Documents with at least `limit` characters in total, if this machine has them."""
    from pydoc_data.topics import topics

    documents = list(topics.values())
    size = sum(map(len, documents))
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(Path(folder).rglob("*.py")):
            found = list(_docstrings(file)) if size < limit and "test" not in str(file) else []
            if found:
                documents.append("\n\n".join(found))
                size += len(documents[-1])
    return documents


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 200:  # leaves out one-liners
                yield text
