"""Sizes and tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def size_words(count: int) -> str:
    """Bytes as 512 B, 1.5 kB, 20 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def shape_words(shape: Sequence[int]) -> str:
    """A shape as 300 × 32; of one number "scalar"."""
    return " × ".join(map(str, shape)) or "scalar"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns as wide as their content; those whose titles are words of `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    flush = [title in right.split() for title in titles]
    lines = [
        "  ".join(
            text.rjust(width) if to_the_right else text.ljust(width)
            for text, width, to_the_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in (titles, *rows)
    ]
    return "\n".join(lines)
