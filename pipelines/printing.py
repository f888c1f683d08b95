"""What the commands print on standard output: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH_OF_A_PIPE = 10_000  # nothing is cut or wrapped for a width that nobody has


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None) -> None:
    """Print a table; texts are taken as they are, and only a terminal's width wraps them.

    Args:
        header: names of the columns.
        rows: a text a column.
        numbers_from: the first of the columns that stand to the right.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        right = numbers_from is not None and index >= numbers_from
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def print_card(card: Mapping[str, Any]) -> None:
    """Print a reproduction card, as `reproduction_card` gives it."""
    from pipelines.reproduction import CARD_HEADER, card_rows

    print(f"\n{card['sentence']}")
    if rows := card_rows(card):
        print_table(CARD_HEADER, rows)
    print()
