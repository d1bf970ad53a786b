"""What pictures in SVG share. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def picture(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """An SVG element with a name for those who do not see it."""
    name, size = escape(title), f"{width:g} {height:g}"
    head = f'<svg role="img" aria-label="{name}" viewBox="0 0 {size}" width="{width:g}" height="{height:g}">'
    return f"{head}<title>{name}</title>{''.join(parts)}</svg>"
