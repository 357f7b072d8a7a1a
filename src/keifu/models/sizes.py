"""The table of all published sizes: counted parameters and the paper's number. Reading it does not import torch.

Counting builds the models, which takes seconds. So the counts are stored, and a test compares them with the models.
`python -m keifu.models.sizes` counts all models of this folder again, including new ones, and writes the table. With
the name of a model (variants.glm4) it counts this one alone. It keeps the papers' numbers: write that of a new size
into the table. It writes the index of names too (`keifu/models/registration`), by which a new file becomes known.
"""

import json
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from keifu.models import registration

TABLE = Path(__file__).with_name("sizes.json")


class Size(NamedTuple):
    """Published size: its name, the file of its model, its number of parameters (shared tensors once), and the paper's
    number, if any.

    active: number of parameters that one token uses, for a mixture of experts; otherwise None.
    """

    name: str
    model: str
    parameters: int
    paper: float | None
    active: int | None = None


def published_sizes() -> list[Size]:
    """Return the stored table, in the order of the models' files."""
    return [Size(*row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]


def count_sizes(models: Iterable[str]) -> list[Size]:
    """Count the parameters of all sizes of these models, on the meta device. The papers' numbers stay."""
    papers = {(size.model, size.name): size.paper for size in published_sizes()}
    modules = {name: import_module(f"keifu.models.{name}") for name in models}
    return [
        Size(size, name, *_counts(module, config, papers.get((name, size))))
        for name, module in modules.items()
        for size, config in vars(module).get("SIZES", {}).items()
    ]


def count(module: Any, config: Any) -> int:
    """Return the number of parameters of a size, counted on the meta device."""
    return _counts(module, config, None)[0]


def _counts(module: Any, config: Any, paper: float | None) -> tuple[int, float | None, int | None]:
    from keifu.layers.meta import on_meta
    from keifu.layers.mixture import idle_parameters

    with on_meta():
        model = module.build(config)
    total, idle = sum(parameter.numel() for parameter in model.parameters()), idle_parameters(model)
    return total, paper, total - idle if idle else None


def write(models: Iterable[str], counted: Iterable[str]) -> None:
    """Write the table, with one line for each size. counted: models to count again; the others keep their lines."""
    names, sizes = {*counted}, published_sizes()
    parts = [count_sizes([name]) if name in names else [s for s in sizes if s.model == name] for name in models]
    lines = [json.dumps(size[:4] if size.active is None else size) for part in parts for size in part]
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def model_files() -> list[str]:
    """Return the names of the files of models that have sizes: those of the table in its order, then new ones."""
    folder = Path(__file__).parent
    with_sizes = [name for name in registration.model_files() if "\nSIZES" in _text(folder, name)]
    counted_names = dict.fromkeys(size.model for size in published_sizes())
    return [
        *(name for name in counted_names if name in with_sizes),
        *(name for name in with_sizes if name not in counted_names),
    ]


def _text(folder: Path, name: str) -> str:
    return folder.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


if __name__ == "__main__":
    registration.write_index()
    write(model_files(), sys.argv[1:] or model_files())
