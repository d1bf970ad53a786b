"""A page of figures in one file, without scripts or external resources, for light and dark displays. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

_TEMPLATE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def html_page(title: str, facts: str, sections: Iterable[str], style: str = "") -> str:
    """The page as text; `title` and the line of `facts` below it are plain text, `sections` HTML, `style` further CSS."""
    return _TEMPLATE.substitute(title=escape(title), facts=escape(facts), sections="\n".join(sections), style=style)
