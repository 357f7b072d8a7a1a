"""The row of each model: the names that other programs give it, declared at the end of its own file.

A new model is registered by its file. `python -m keifu.models.sizes NAME` adds it to the index, from which the
registry learns the names of a file without importing it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from keifu.models.registration.gguf import GgufArchitecture

TABLE = Path(__file__).with_name("index.json")
CONSTANT = re.compile(r"^(SIZES|WEIGHT_NAMES|WRITES_TEXT)\b", re.MULTILINE)  # a file without them is a part of others


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """Constants at the end of a model's file. The name of the constant is that of the field, in capitals.

    - model_types: published model_type of config.json → the architecture that is written next to it.
    - other_model_types: published model_types that another file reads and writes.
    - keifu_type: model_type of keifu's own form of config.json. The default is keifu_ and the name of the file.
    - gguf: name of an architecture of llama.cpp → how its files correspond to a Config. The first that fits is written.
    - refused: gguf, native (step), tensor (parallelism), plan or adapters → why the model has none: words of the error
      that keifu raises, such as the class of a layer. For gguf it is a clause that the error repeats.
    """

    name: str
    model_types: Mapping[str, str] = field(default_factory=dict)
    other_model_types: tuple[str, ...] = ()
    keifu_type: str
    gguf: Mapping[str, GgufArchitecture] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The class of the model's Config."""
        return import_module(f"keifu.models.{self.name}").Config

    @property
    def all_model_types(self) -> tuple[str, ...]:
        """The model_types of all forms, keifu's last."""
        return tuple(dict.fromkeys((*self.model_types, *self.other_model_types, self.keifu_type)))


@cache
def row(name: str) -> ModelRow:
    """Import a model's file, and return its row. name: the file under keifu.models."""
    constants = vars(import_module(f"keifu.models.{name}"))
    fields = [key for key in ModelRow.__dataclass_fields__ if key.upper() in constants]
    values: dict[str, Any] = {"keifu_type": f"keifu_{name.rpartition('.')[2]}"}
    return ModelRow(name=name, **values | {key: constants[key.upper()] for key in fields})


@dataclass(frozen=True)
class Names:
    """Names of a model that are known without importing its file.

    model_types: those of its config.json, keifu's last. gguf: llama.cpp's architectures.
    """

    model_types: tuple[str, ...]
    gguf: tuple[str, ...]


def read_index() -> dict[str, Names]:
    """Return the names of every model."""
    stored = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Names(tuple(types), tuple(gguf)) for name, types, gguf in stored}


def model_files() -> list[str]:
    """Return the names of all files of models: those of the index in its order, then new ones."""
    folder = TABLE.parent.parent
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("[!_]*.py"))}
    paths = [path for path, text in texts.items() if "\ndef build(" in text and CONSTANT.search(text)]
    present = [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]
    indexed_names = [name for name in read_index() if name in present] if TABLE.exists() else []
    return [*indexed_names, *(name for name in present if name not in indexed_names)]


def write_index() -> None:
    """Write the index, with one line for each model."""
    rows = [row(name) for name in model_files()]
    lines = [json.dumps([one.name, one.all_model_types, [*one.gguf]]) for one in rows]
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
