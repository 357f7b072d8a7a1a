"""Options of `keifu train RECIPE`: those of the recipe with those of every run.

A recipe's file imports torch, which takes seconds. So the help and completion of keifu's recipes are stored in a table,
and a test compares it with the recipes. `python -m keifu.commands.shared.recipe_options` writes the table.
"""

import json
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from keifu.commands.shared.flags import Device
from keifu.commands.shared.help_text import Argument, arguments_of
from keifu.distributed.mesh import Mesh
from keifu.ranges import Count, Natural
from keifu.recipes.files import is_own, recipe_module, recipe_names

TABLE = Path(__file__).with_name("recipe_options.json")


def _option(hint: Any, text: str) -> Any:
    return Annotated[hint, tyro.conf.arg(help=text)]


COMPUTING = {  # added to any recipe that lacks an option of that name
    "precision": _option(Literal["auto", "float32", "bfloat16", "float16"] | None, "Precision of matrix "
        "multiplications; weights stay in float32. auto: bfloat16 if supported, else float16. Unset: the recipe's."),
    "compile": _option(bool, "Compile the objective and the model with torch.compile."),
    "activation_checkpointing": _option(Literal["none", "blocks", "selective"] | None, "Activations that are computed "
        "again in the backward pass. blocks: all but their inputs. selective: all but results of multiplied matrices."),
    "optimizer_state": _option(Literal["float32", "int8"] | None, "AdamW's averages. int8: 2 bytes per weight, not 8."),
    "deterministic": _option(bool, "Whether a GPU uses only kernels that give the same bits each time (slower)."),
}  # fmt: skip
UNSET: dict[str, Any] = dict.fromkeys(COMPUTING) | {"compile": False, "deterministic": False}


def with_folder(recipe_class: type, name: str) -> Any:
    """Return a dataclass with the options of a recipe and those of every run."""
    folder = field(default=Path("runs") / Path(name).stem)
    options = [
        ("recipe", Annotated[recipe_class, tyro.conf.arg(name="")]),
        ("out", Annotated[Path, tyro.conf.arg(help="Folder of the run.")], folder),
        ("resume", Annotated[bool, tyro.conf.arg(help="Go on with the run in that folder, with its options.")], False),
        ("replace", Annotated[bool, tyro.conf.arg(help="Start over although a run is in that folder.")], False),
        ("device", Device, field(default=None)),
        ("mesh", Mesh, Mesh()),
        ("processes", Annotated[Count | None, tyro.conf.arg(help="Processes on this machine that share the training.")],
         None),
        ("restarts", Annotated[Natural, tyro.conf.arg(help="Times that the processes are started again, from the last "
         "state, if one dies.")], 0),
        *((name, COMPUTING[name], UNSET[name]) for name in COMPUTING if not has_option(recipe_class, name)),
    ]  # fmt: skip
    return make_dataclass("Train", options, frozen=True)


def has_option(recipe: type, name: str) -> bool:
    """Return whether a recipe, or a dataclass nested in it, has an option of that name."""
    inside = [type(_default(field)) for field in fields(recipe) if is_dataclass(_default(field))]
    return any(field.name == name for field in fields(recipe)) or any(has_option(nested, name) for nested in inside)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def arguments(name: str) -> list[Argument]:
    """Return the arguments of `keifu train NAME`: from the table, or from a user's file, which is executed."""
    return computed(name) if is_own(name) else stored()[name]


def computed(name: str) -> list[Argument]:
    """Return the arguments of `keifu train NAME` by executing the recipe's file."""
    return arguments_of(with_folder(recipe_module(name).Recipe, name))


def stored() -> dict[str, list[Argument]]:
    """Return the stored table of each recipe's arguments."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: [Argument(tuple(names), *texts) for names, *texts in rows] for name, rows in table.items()}


def write() -> None:
    """Execute every recipe's file and write the table, with one line for each argument."""
    rows = {name: ",\n".join(json.dumps([*vars(row).values()]) for row in computed(name)) for name in recipe_names()}
    table = ",\n".join(f'"{name}": [\n{text}\n]' for name, text in rows.items())
    TABLE.write_text(f"{{\n{table}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
