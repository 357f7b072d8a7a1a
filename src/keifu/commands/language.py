"""What the verbs for language models share: a model that writes, and a text from wherever it comes; knows no verb."""

import sys
from pathlib import Path
from typing import Any

from keifu.errors import UserError


def load_writer(name: str) -> tuple[Any, Any]:
    """A model that writes text, and its tokenizer; for any other kind of model a `UserError`.

    A person at a terminal is told that it is being loaded.
    """
    notice(f"Loading {name} ...")
    from keifu.checkpoints import load
    from keifu.generation.decoding import Model, writes_nothing

    model, tokenizer = load(name)
    if tokenizer is None or not isinstance(model, Model):
        raise UserError(f"{name} writes no text: {writes_nothing(model)}")
    return model, tokenizer


def notice(line: str) -> None:
    """A line on stderr for a person at a terminal; where stderr is a file or a pipe, nothing."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def at_terminal() -> bool:
    """Whether a person sits at standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def text_from(file: Path | None, example: str) -> str:
    """The text of the file, or of standard input where there is none; at a terminal a `UserError` with an example."""
    if file is None and at_terminal():
        raise UserError(f"There is no text: write it behind the model ({example}), pipe it in, or name its --file.")
    return _of_file(file) if file else read_pipe()


def join_texts(argument: str | None, file: Path | None) -> str:
    """One text: the argument, then the file, then what comes through a pipe, with an empty line between them."""
    parts = [argument, _of_file(file) if file else None, None if at_terminal() else read_pipe()]
    return "\n\n".join(part for part in parts if part)


def read_pipe() -> str:
    """All of standard input; empty where there is none."""
    return "" if sys.stdin is None else decoded(sys.stdin.buffer.read(), "standard input")


def _of_file(file: Path) -> str:
    return decoded(file.read_bytes(), str(file))


def decoded(data: bytes, place: str, first_line: int = 1) -> str:
    """UTF-8 bytes as text without a last line break; anything else is a `UserError` that names the line."""
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise UserError(f"{place} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}.") from error
