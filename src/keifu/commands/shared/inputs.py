"""Inputs of commands: models with tokenizers, texts from arguments, files, pipes and a terminal, and image files."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from keifu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.inference.text.paged.folder import CacheFolder

QUOTES = '"""'
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LARGEST_SIZE = 2**60  # bytes
CACHE_SIZE = "4G"  # default limit of a cache folder
MORE = "... "  # prompt for further lines of a text


def load_writer(name: str, weights: str | None = None, takes: Callable[[Any], bool] | None = None) -> tuple[Any, Any]:
    """Load a model that writes text, and its tokenizer. Raises `UserError` for any other kind of model.

    weights: packed format; None: as stored. takes: whether a model is of the wanted kind; None: whether it is causal. A
    terminal shows that the model is being loaded.
    """
    notice(f"Loading {name} ...")
    from keifu.checkpoints import load
    from keifu.inference.text.model import explain_not_causal, is_writer

    model, tokenizer = load(name, weights=weights or "own")
    if tokenizer is None or not (takes or is_writer)(model):
        raise UserError(f"{name} writes no text: {explain_not_causal(model)}")
    return model, tokenizer


def proposer(draft: str | None, guesses: int | None, weights: str | None) -> Any:
    """Return the source of guesses for speculative decoding: the draft model of that name, or the number of guesses."""
    if draft is None:
        return guesses
    if guesses == 0:
        raise UserError("--draft guesses tokens, and --guesses 0 asks for none: leave out one of them.")
    from keifu.inference.text.draft import Draft

    return Draft(*load_writer(draft, weights), guesses)


def size_of(text: str, option: str) -> int:
    """Parse a size such as "4G" or "500M". Return the number of bytes."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT])?(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if not 0 < size < LARGEST_SIZE:
        raise UserError(f"{option} is {text[:60]!r}, which must be a size such as 500M or 4G.")
    return size


def open_cache_folder(path: Path | None, size: str | None) -> "CacheFolder | None":
    """Return the folder in which keys and values are kept. None: none was named."""
    if path is None:
        if size is not None:
            raise UserError("--cache-size limits the cache folder, and none is named: give one with --cache-folder.")
        return None
    limit = size_of(size or CACHE_SIZE, "--cache-size")
    from keifu.inference.text.paged.folder import CacheFolder

    return CacheFolder(path, limit)


def notice(line: str) -> None:
    """Print a line on stderr if it is a terminal."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def at_terminal() -> bool:
    """Return whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def edit_lines() -> None:
    """Enable line editing and history for input() by readline. Windows has no readline, but its console edits lines."""
    with suppress(ImportError):
        import readline  # noqa: F401 (its import is what does it)


def ask(prompt: str, example: str) -> str:
    """Ask for a text. Raises `UserError`, with an example of a command, if nothing is entered."""
    edit_lines()
    with suppress(EOFError):
        if text := read_rest(input(prompt)).strip():
            return text
    no_text(example)


def no_text(example: str) -> NoReturn:
    """Raise the `UserError` for a missing text."""
    raise UserError(f"There is no text: write it after the model ({example}), pipe it in, or name a file with --file.")


def read_rest(line: str) -> str:
    """Return a text that begins with this line. Read its further lines.

    A text that begins with three quotation marks continues to the line that ends with three. Any other text continues
    after a line that ends with a backslash.
    """
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(input(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)


def text_from(file: Path | None, example: str) -> str:
    """Read the text of a file, or of standard input if there is none. At a terminal raise `UserError` with an
    example."""
    if file is None and at_terminal():
        no_text(example)
    return _of_file(file) if file else read_pipe()


def join_texts(argument: str | None, file: Path | None, argument_last: bool = False) -> str:
    """Join the argument, the file's text and the piped text, with an empty line between them.

    argument_last: whether the argument comes after the others, which then are a common beginning of several prompts.
    """
    others = [_of_file(file) if file else None, None if at_terminal() else read_pipe()]
    parts = [*others, argument] if argument_last else [argument, *others]
    return "\n\n".join(part for part in parts if part)


def read_pipe() -> str:
    """Return all of standard input; empty if nothing is piped."""
    return "" if sys.stdin is None else decode_utf8(sys.stdin.buffer.read(), "standard input")


def _of_file(file: Path) -> str:
    return decode_utf8(file.read_bytes(), str(file))


def decode_utf8(data: bytes, source: str, first_line: int = 1) -> str:
    """Decode UTF-8 and remove the last line break. Raises `UserError`, with the line number, if the bytes are not
    UTF-8."""
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        text = error.object  # the data without a byte order mark
        line = text.count(b"\n", 0, error.start) + first_line
        raise UserError(f"{source} is not UTF-8 text: line {line} has the byte 0x{text[error.start]:02x}.") from error


def texts_from(arguments: Sequence[str], file: Path | None, example: str) -> list[str]:
    """Return the arguments, each a text. Without arguments return the lines of the file or of standard input.

    An empty text raises `UserError` with its line number: skipping it would shift the numbering of the results.
    """
    if arguments and file is not None:
        raise UserError(f"There are two sources of texts, the arguments and {file}: give one of them.")
    source = "The command line" if arguments else file or "Standard input"
    texts = list(arguments) or [line.removesuffix("\r") for line in text_from(file, example).split("\n")]
    empty = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if len(empty) == len(texts):
        raise UserError(f"{source} holds no text.")
    if empty:
        what = "text" if arguments else "line"
        raise UserError(f"{source}: {what} {empty[0]} of {len(texts)} is empty; put words there, or take it out.")
    return texts


def read_pictures(files: Sequence[Path]) -> list[Any]:
    """Read the pictures that belong to a question."""
    from keifu.data.images.io import read_image

    if remote := [file for file in files if str(file).startswith(("http:/", "https:/"))]:
        raise UserError(f"--image takes a file, and {remote[0].name} is on the network: download it first.")
    return [read_image(file).image for file in files]


def load_encoder(name: str, *other_kinds: type) -> tuple[Any, Any]:
    """Load a bidirectional encoder or a CLIP, and its tokenizer. Raises `UserError` for any other model.

    other_kinds: interfaces that are taken as well.
    """
    from keifu.checkpoints import load
    from keifu.inference.text.model import Encoder, TwoTowers

    model, tokenizer = load(name)
    if tokenizer is None or not isinstance(model, (Encoder, TwoTowers, *other_kinds)):
        class_name = type(model).__name__
        raise UserError(
            f"{name} is a {class_name}, which gives no vectors for texts: choose an encoder, such as minilm."
        )
    return model, tokenizer


def load_reranker(name: str) -> tuple[Any, Any]:
    """Load a cross-encoder and its tokenizer. Raises `UserError` for any other model."""
    notice(f"Loading {name} ...")
    from keifu.checkpoints import load
    from keifu.inference.embeddings.reranker import reranker

    model, tokenizer = load(name)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it reads no text: choose a cross-encoder with one.")
    reranker(model, name)
    return model, tokenizer


def warn_of_language(model: str, *groups: Sequence[str]) -> None:
    """Warn if an English encoder cannot read most texts of a group."""
    from keifu.inference.embeddings.search import language_warning

    if warning := language_warning(model, *groups):
        print(warning, file=sys.stderr)


def ids(model: Any, tokenizer: Any, texts: Sequence[str], cut: bool) -> Any:
    """Return the token ids of texts. Print on stderr how many were cut."""
    from keifu.inference.embeddings.encoders import encode_texts

    limit = model.config.context_length
    rows, shortened = encode_texts(tokenizer, texts, limit, cut)
    if shortened:
        print(f"{shortened} of {len(texts)} texts were cut to the model's {limit} tokens.", file=sys.stderr)
    return rows


def is_picture(text: str) -> bool:
    """Return whether a text is the name of a picture file, existing or not. A sentence that ends like a file name is
    not."""
    from keifu.data.images.sources import SUFFIXES

    return text.lower().endswith(SUFFIXES) and (Path(text).is_file() or not any(map(str.isspace, text)))


def pictures_among(path: Path) -> list[str] | None:
    """Return the sorted paths of the pictures in a folder and its subfolders; None if the path is not a folder."""
    if not path.is_dir():
        return None
    files = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and is_picture(str(file))]
    if not files:
        raise UserError(f"The folder {path} holds no picture.")
    return files


def embed_inputs(model: Any, tokenizer: Any, inputs: Sequence[str], cut: bool, batch_size: int) -> "Tensor":
    """Return the embedding of each input, in order. An input is a text or the name of a picture file."""
    import torch

    from keifu.inference.embeddings.clip import embed_pictures, embed_texts

    are_pictures = [is_picture(path) for path in inputs]
    pictures, texts = (list(compress(inputs, (is_one is kind for is_one in are_pictures))) for kind in (True, False))
    pictured = iter(embed_pictures(model, open_image(pictures)) if pictures else ())
    text_embeddings = iter(embed_texts(model, tokenizer, texts, batch_size, cut) if texts else ())
    return torch.stack([next(pictured if is_one else text_embeddings) for is_one in are_pictures]).cpu()


def open_image(files: Sequence[str]) -> Any:
    """Return the pictures in these files. Each is read when it is requested."""
    from keifu.data.images.io import read_image

    return (read_image(Path(file)).image for file in files)
