"""Documents out of files, folders and the catalogue, streamed; it knows no tokenizer.

A source is the name of a catalogue entry, a file, a folder (every .txt, .md, .jsonl and .parquet file under it, in the
order of their paths), or a pattern such as "src/**/*.py". A name of the catalogue wins over a file of the same name;
"./sotu" is the file.

In a .jsonl file each line is a document, in a .parquet file each row, whose text stands in one field. Any other file is
UTF-8 text and one document, unless lines that are exactly <|endoftext|> part it into several.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keifu import files
from keifu.data import catalogue
from keifu.errors import UserError, unknown

MARK = "<|endoftext|>"
SUFFIXES = ".txt", ".md", ".jsonl", ".parquet"
LIMIT = 1 << 20  # characters: a longer document is handed on in pieces, so that none need fit into memory


@dataclass(frozen=True)
class Piece:
    """A run of whole lines of one document, whether the document ends with it, and which part of a split it is in."""

    text: str
    ends: bool
    part: int = 0


def refuse(problem: str) -> None:
    """What is done about a fault in the data unless told otherwise: stop, with the sentence that names its place."""
    raise UserError(problem)


def pieces(source: str | Path, field: str = "text", problem: Callable[[str], None] = refuse) -> Iterator[Piece]:
    """All documents of a source, in a fixed order, the long ones in several pieces.

    `problem` is called with a sentence for each fault that has a place: bytes that are not UTF-8 (the line is named), a
    line without the field, a binary file. If it returns, the faulty bytes become U+FFFD, and a faulty line, row or file
    is left out. A source without any text is a fault too.
    """
    found = False
    for piece in _all(source, field, problem):
        found = found or bool(piece.text.strip())
        yield piece
    if not found:
        problem(f"There is no text in {source}: it is empty.")


def documents(source: str | Path, field: str = "text") -> Iterator[str]:
    """All documents of a source, each whole."""
    held: list[str] = []
    for piece in pieces(source, field):
        held.append(piece.text)
        if piece.ends:
            yield "".join(held)
            held.clear()


def chunks(pieces: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Lists of pieces that have about so many characters together."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield held
            held, size = [], 0
    if held:
        yield held


def in_catalogue(source: str | Path) -> bool:
    """Whether a source is the name of a catalogue entry."""
    return isinstance(source, str) and source in catalogue.CATALOGUE


def content_hash(source: str | Path) -> str:
    """A hexadecimal SHA-256 of what a source holds; where its files lie and what they are called does not count."""
    if in_catalogue(source):
        return hashlib.sha256(catalogue.identity(str(source)).encode()).hexdigest()
    listing = [f"{path.suffix}:{files.sha256(path)}" for path in paths(source)]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def paths(source: str | Path) -> list[Path]:
    """The files of a source that is not in the catalogue, in order; none is a `UserError`."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        return sorted(file for file in inside if file.suffix.lower() in SUFFIXES) or _nothing(path, inside)
    if found := sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()):
        return found
    beside = [str(path.with_name(each.name)) for each in path.parent.glob("*")] if path.parent.is_dir() else []
    raise unknown("file, folder or catalogue entry", str(source), [*_texts(), *beside])


def _all(source: str | Path, field: str, problem: Callable[[str], None]) -> Iterator[Piece]:
    if in_catalogue(source):
        for text in catalogue.documents(str(source)):
            yield from _in_pieces(text)
        return
    for path in paths(source):
        reader = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix.lower(), _plain)
        yield from reader(path, field, problem)


def _plain(path: Path, field: str, problem: Callable[[str], None]) -> Iterator[Piece]:
    if not path.stat().st_size:
        yield Piece("", True)
    yield from _gathered(lines(path, problem), MARK)


def _json_lines(path: Path, field: str, problem: Callable[[str], None]) -> Iterator[Piece]:
    for number, line in enumerate(lines(path, problem), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                problem(f"{path}, line {number}: this is no JSON ({error.msg}, column {error.colno}).")
                continue
            yield from _field(record, field, f"{path}, line {number}", problem)


def _parquet(path: Path, field: str, problem: Callable[[str], None]) -> Iterator[Piece]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise UserError(f"Reading {path} needs pyarrow: install it with `pip install 'keifu[parquet]'`.") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path} is no Parquet file, or it is damaged: {error}") from error
    with file:
        columns = [field] if field in file.schema_arrow.names else None
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, record in enumerate(rows, 1):
            yield from _field(record, field, f"{path}, row {number}", problem)


def _field(record: Any, field: str, place: str, problem: Callable[[str], None]) -> Iterator[Piece]:
    """The text of one record."""
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            problem(f"{place}: the field {field!r} holds half of a surrogate pair, which is no character.")
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield from _in_pieces(text)
    elif not isinstance(record, dict):
        problem(f"{place}: this is {type(record).__name__}, not an object with fields.")
    elif field in record:
        problem(f"{place}: the field {field!r} is {type(text).__name__}, not text.")
    else:
        has = ", ".join(map(repr, list(record)[:10]))
        problem(f"{place}: there is no field {field!r}; it has {has or 'none'}: say which of them is the text.")


def lines(path: Path, problem: Callable[[str], None]) -> Iterator[str]:
    """Lines with "\\n" at their ends, whatever the file has; a byte order mark is dropped."""
    with path.open("rb") as file:
        start = file.read(8192)
        if b"\0" in start:
            problem(_binary(path, start))
            return
        file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                wrong = " ".join(f"0x{byte:02X}" for byte in line[error.start : max(error.end, error.start + 1)])
                problem(f"{path}, line {number}: {wrong} at byte {error.start + 1} of the line is not UTF-8.")
                text = line.decode(errors="replace")
            yield text[:-2] + "\n" if text.endswith("\r\n") else text


def _gathered(lines: Iterable[str], mark: str | None = None) -> Iterator[Piece]:
    """Lines put together to documents, which end at the mark, and to pieces of about LIMIT characters.

    A piece begins with a line that starts with text, for tokenizers join blank lines to what stands before them.
    """
    held: list[str] = []
    size = 0
    for line in lines:
        ended = mark is not None and line.strip() == mark
        if ended or (size >= LIMIT and not line[0].isspace()):
            yield Piece("".join(held), ended)
            held, size = [], 0
        if not ended:
            held.append(line)
            size += len(line)
    if held:
        yield Piece("".join(held), True)


def _in_pieces(text: str) -> Iterator[Piece]:
    if len(text) <= LIMIT:
        yield Piece(text, True)
    else:
        yield from _gathered(text.splitlines(keepends=True))


def _binary(path: Path, start: bytes) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{path} is UTF-16: convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`."
    return f"{path} is binary, not text: byte {start.index(0)} is zero."


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nothing(folder: Path, inside: list[Path]) -> list[Path]:
    others = sorted({file.suffix or file.name for file in inside})[:8]
    start = f"The folder {folder} holds no {', '.join(SUFFIXES)} file; it "
    if not others:
        raise UserError(f"{start}is empty.")
    raise UserError(f"{start}holds {', '.join(others)}: name them with a pattern such as {folder}/**/*{others[0]}.")


def _texts() -> list[str]:
    return [name for name, entry in catalogue.CATALOGUE.items() if entry.gives]
