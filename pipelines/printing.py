"""What the commands print on standard output: tables for people, JSON for programs; and how a failing disk is told."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.errors import PipelineError

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


@contextmanager
def system_errors_explained() -> Iterator[None]:
    """A disk or network that fails is told in one sentence, as other errors that the user can mend."""
    try:
        yield
    except OSError as error:
        advice = "check the path, its permissions, the free space and the network, then run again"
        raise PipelineError(f"{error}; {advice}") from error


def megabytes(num_bytes: float) -> str:
    """A size for people.

    Example:
        >>> megabytes(1_234_567)
        '1.2 MB'
    """
    return f"{num_bytes / 1e6:,.1f} MB"
