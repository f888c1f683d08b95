from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE_NAMES = [
    "<img src=x onerror=alert(1)>",
    "=cmd|' /C calc'!A0",
    "</style><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }} $x^$",
    "up\r\ndown \u202e \ud800",
    "Moving something from left to right",
    "Moving something from right to left",
]

# What the templates themselves use; anything else on a page came from data.
ALLOWED_ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "src",
    "alt",
    "href",
    "rel",
    "open",
    "style",
    "tabindex",
}


class PageReader(HTMLParser):
    """Collects what a browser would see, and refuses what could run or load anything."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert {name for name, _ in attrs} <= ALLOWED_ATTRIBUTES, attrs
        for name, value in attrs:
            if name == "src":
                assert (value or "").startswith(tuple(f"data:image/{kind};base64," for kind in ("png", "jpeg", "gif")))
            if name == "href":
                assert (value or "").startswith(("http://", "https://")) or value == "interactive.html"  # beside the page

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def hostile_names() -> list[str]:
    return list(HOSTILE_NAMES)


@pytest.fixture
def read_page():
    def read(path: Path) -> PageReader:
        reader = PageReader()
        text = path.read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        assert "url(" not in text
        assert "@import" not in text
        reader.feed(text)
        reader.close()
        return reader

    return read
