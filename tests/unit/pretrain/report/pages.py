"""Pages of figures, read by another parser than a browser's, which forgives nothing."""

from __future__ import annotations

from html.parser import HTMLParser

SHAPES = {"path", "rect", "image", "circle"}  # close themselves where they have no title


class Page(HTMLParser):
    """Raises ValueError where elements do not nest; collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []  # open elements from the outside in, text
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        if self.open:
            raise ValueError(f"not closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag != "meta":  # never closed
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in SHAPES:
            raise ValueError(f"<{tag}/> at {self.getpos()}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop()[0] != tag:
            raise ValueError(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.texts.append(([f"{tag}#{values.get('id', '')}.{values.get('class', '')}" for tag, values in self.open], data))

    def within(self, *elements: str) -> list[str]:
        """Texts inside all of these elements, each named tag#id.class."""
        return [text for path, text in self.texts if all(element in path for element in elements)]
