"""Tables for the terminal, and the same cells separated by tabs in a pipe."""

import sys
from collections.abc import Iterable, Sequence


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows of text under their columns' names; cells that look like numbers stand to the right."""
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
        table.add_row(*map(Text, row))
    Console().print(table)
