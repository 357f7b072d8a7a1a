"""Tables for a terminal. In a pipe the cells are separated by tabs."""

import sys
from collections.abc import Iterable, Sequence

from keifu.errors import printable


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows under column names. Cells that look like numbers are right-aligned."""
    rows = [list(row) for row in rows]
    if not sys.stdout.isatty():
        print("\n".join("\t".join(cells) for cells in [columns, *rows]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        figures = all(row[number][:1] in "0123456789+-~." for row in rows)
        table.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
