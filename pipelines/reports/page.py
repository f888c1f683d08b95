"""What all pages and tables for people have in common.

Names, reasons and messages come from data sets and decoders: a page escapes every value and its policy forbids scripts and
requests; a table disarms what a spreadsheet would take for a formula.
"""

import base64
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.storage import atomic_path, write_bytes

_TEMPLATES = Path(__file__).parent
# OWASP's list; the last four are the full-width forms of the first four, which spreadsheets read alike.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template of this folder and write it as one file that needs no other.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not in `values`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, seconds=_seconds, megabytes=_megabytes, count=_count)
    write_bytes(path, environment.get_template(template).render(values).encode("utf-8", errors="replace"))
    return path


def data_uri(picture: Path) -> str:
    """A picture, ".png" or ".gif", as a part of the page."""
    kind = picture.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a table for spreadsheets: texts that look like formulas get an apostrophe in front; numbers stay numbers."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(columns)
        writer.writerows([_safe_cell(row[name]) for name in columns] for row in rows)
    return path


def markdown_text(text: str) -> str:
    r"""A text as a part of Markdown: shown as it is, on one line, whatever is in it.

    Example:
        >>> markdown_text("a_b_ <img> | [c](d)")
        'a\\_b\\_ &lt;img&gt; &#124; \\[c\\](d)'
    """
    marked = re.sub(r"([\\`*_{}\[\]#~])", r"\\\1", " ".join(text.split()))
    return marked.replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def percent(fraction: float | None) -> str:
    """A fraction as people read it.

    Example:
        >>> percent(0.9125), percent(None)
        ('91.2 %', '-')
    """
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _safe_cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA_STARTS) else value


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.1f}".removesuffix(".0")
