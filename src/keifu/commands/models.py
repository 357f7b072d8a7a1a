"""`keifu models`: every published size with its parameters counted; knows no model by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from keifu.commands import flags, tables


@dataclass(frozen=True)
class Options:
    """Every published size: its parameters counted, the paper's figure, and the difference."""


def sizes() -> Iterator[tuple[str, int, float | None]]:
    """Name, parameters counted on the meta device (a shared tensor once), and the paper's figure where it gives one."""
    from keifu.checkpoints.families import FAMILIES

    modules = {family.module.__name__: family.module for family in FAMILIES.values()}
    for module in modules.values():
        for name, config in module.SIZES.items():
            yield name, count(module, config), module.PAPER_PARAMETERS.get(name)


def count(module: Any, config: Any) -> int:
    """The number of parameters of a size, without memory for any."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in module.build(config).parameters())


def run(options: Options) -> None:
    """Prints the table."""
    rows = [(name, f"{n:,}", *_beside(n, paper)) for name, n, paper in sizes()]
    tables.show(("model", "parameters", "paper", "difference"), rows)


def _beside(counted: int, paper: float | None) -> tuple[str, str]:
    if paper is None:
        return "-", "-"
    figure = f"{paper / 1e9:,.4g} B" if paper >= 1e9 else f"{paper / 1e6:,.4g} M"
    return figure, f"{counted / paper - 1:+.1%}"


parse = flags.parser(Options, run, "keifu models")
