"""What the verbs for language models share: a model that writes, and a text from wherever it comes; knows no verb."""

import sys
from pathlib import Path
from typing import Any

from keifu.errors import UserError


def load_writer(name: str) -> tuple[Any, Any]:
    """A model that writes text, and its tokenizer; for any other kind of model a `UserError`."""
    from keifu.checkpoints import load
    from keifu.generation.decoding import Model, writes_nothing

    model, tokenizer = load(name)
    if tokenizer is None or not isinstance(model, Model):
        raise UserError(f"{name} writes no text: {writes_nothing(model)}")
    return model, tokenizer


def text_from(argument: str | None, file: Path | None, example: str) -> str:
    """The text of the argument, the file or standard input; the line break at a file's end is no part of it."""
    if argument is not None and file is not None:
        raise UserError(f"There are two texts, the argument and {file}: give one of them.")
    if argument is not None:
        return argument
    if file is None and sys.stdin.isatty():
        raise UserError(f"There is no text: write it behind the model ({example}), pipe it in, or name its --file.")
    return decoded(file.read_bytes() if file else sys.stdin.buffer.read(), str(file or "standard input"))


def decoded(data: bytes, place: str, first_line: int = 1) -> str:
    """UTF-8 bytes as text without a last line break; anything else is a `UserError` that names the line."""
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise UserError(f"{place} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}.") from error
