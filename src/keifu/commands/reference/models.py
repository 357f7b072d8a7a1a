"""`keifu models`: every published model size with its number of parameters."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from keifu.commands.shared import tables
from keifu.errors import unknown
from keifu.models.sizes import Size, published_sizes


@dataclass(frozen=True)
class Options:
    """Every published size: its parameters counted, the paper's figure, and the difference."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """Only the sizes with this in their name or of this model, such as llama."""


def run(options: Options) -> None:
    """Print the table."""
    rows = [(size.name, f"{size.parameters:,}", *_beside(size)) for size in matching_sizes(options.name)]
    tables.show(("model", "parameters", "paper", "difference"), rows)


def matching_sizes(name: str | None) -> list[Size]:
    """Return the published sizes that a name selects. Raises `UserError`, with the nearest names, if there is none."""
    sizes = published_sizes()
    query = (name or "").lower()
    matching = [size for size in sizes if query in size.name.lower() or query == size.model]
    if not matching:
        raise unknown("published size", query, [size.name for size in sizes])
    return matching


def _beside(size: Size) -> tuple[str, str]:
    paper = size.paper
    if paper is None:
        return "-", "-"
    figure = f"{paper / 1e9:,.4g} B" if paper >= 1e9 else f"{paper / 1e6:,.4g} M"
    return figure, f"{size.parameters / paper - 1:+.1%}"
