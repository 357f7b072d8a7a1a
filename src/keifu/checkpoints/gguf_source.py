"""A GGUF file as a model to be loaded; knows no byte and no architecture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keifu.checkpoints.families import describe
from keifu.checkpoints.gguf_file import GGUFFile, open_file
from keifu.checkpoints.gguf_models import ARCHITECTURES, read_config, turned_head
from keifu.checkpoints.gguf_rope import FREQS
from keifu.checkpoints.own import check_types
from keifu.checkpoints.source import Source
from keifu.errors import UserError


def open_gguf(path: Path) -> Source:
    """The model in a GGUF file, its weights memory-mapped and not yet read."""
    file = open_file(path)
    parts = file.fields.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path} is one of {parts} parts; join them first with llama.cpp's llama-gguf-split --merge.")
    shapes = {name: place.shape for name, place in file.places.items()}
    freqs = file.read(FREQS) if FREQS in shapes else None
    name, config = read_config(file.fields, shapes, freqs, str(path))
    check_types(config, str(path))
    architecture, (family, _) = ARCHITECTURES[name], describe(config)
    stored = {key: tensor for key, tensor in file.stored().items() if key != FREQS}
    return Source(
        path, "GGUF", family, config, stored, file.read, _tokenizer(file.fields), architecture.names,
        turned_head(architecture, config), _notes(file),
    )  # fmt: skip


def _notes(file: GGUFFile) -> tuple[str, ...]:
    named = file.fields.get("general.name")
    notes = [f"The file calls itself {named!r}."] if named else []
    return (*notes, f"{FREQS} gives the rotary scaling.") if FREQS in file.places else tuple(notes)


def _tokenizer(fields: Mapping[str, Any]) -> Callable[[], Any]:
    def read() -> Any:
        from keifu.data.gguf_tokenizer import READ_FIELDS, gguf_tokenizer

        return gguf_tokenizer({key: value for key, value in fields.items() if key.startswith(READ_FIELDS)})

    return read
