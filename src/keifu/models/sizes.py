"""The table of all published sizes: counted parameters and the paper's number. Reading it does not import torch.

Counting builds the models, which takes seconds: so the counts are stored, and a test compares them with the models.
`python -m keifu.models.sizes` counts all models of this folder again, new ones too, and writes the table.
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


def model_files() -> list[str]:
    """Return the names of all model files: those of the table in its order, then new ones."""
    folder = Path(__file__).parent
    paths = [path for path in sorted(folder.rglob("[!_]*.py")) if "\nSIZES" in path.read_text(encoding="utf-8")]
    found = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    known = dict.fromkeys(size.model for size in published_sizes())
    return [*(name for name in known if name in found), *(name for name in found if name not in known)]


if __name__ == "__main__":
    write(model_files())
