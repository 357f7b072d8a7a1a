"""The table of all published sizes: counted parameters and the paper's number. Reading it does not import torch.

Counting builds the models, which takes seconds: so the counts are stored, and a test compares them with the models.
`python -m keifu.models.sizes` counts again and writes them.
"""

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("sizes.json")


class Size(NamedTuple):
    """A published size: the file of its model, its parameters (a shared tensor once), and the paper's number where it
    gives one."""

    name: str
    model: str
    parameters: int
    paper: float | None


def published_sizes() -> list[Size]:
    """The stored table, in the order of the models' files."""
    return [Size(*row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]


def count_sizes(models: Iterable[str]) -> list[Size]:
    """The table counted on models on the meta device."""
    found = {name: import_module(f"keifu.models.{name}") for name in models}
    return [
        Size(size, name, count(module, config), vars(module).get("PAPER_PARAMETERS", {}).get(size))
        for name, module in found.items()
        for size, config in module.SIZES.items()
    ]


def count(module: Any, config: Any) -> int:
    """The number of parameters of a size, from a model on the meta device."""
    from keifu.layers.meta import on_meta

    with on_meta():
        return sum(parameter.numel() for parameter in module.build(config).parameters())


def write(models: Iterable[str]) -> None:
    """Counts again and writes the table, one line a size."""
    rows = ",\n".join(json.dumps(row) for row in count_sizes(models))
    TABLE.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write(dict.fromkeys(size.model for size in published_sizes()))
