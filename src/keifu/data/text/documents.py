"""Documents streamed from files, folders and the catalogue.

A source is the name of a catalogue entry, a file, a folder (all files below it with one of `SUFFIXES`, sorted by path),
or a pattern such as "src/**/*.py". A catalogue name has priority over a file of the same name; "./sotu" is the file.

In a .jsonl, .json, .csv, .tsv or .parquet file each record is a document, whose text is in one field. An .html file is
one document: its text without tags, scripts and styles. Any other file is one unchanged document, also Markdown, unless
lines that are exactly <|endoftext|> split it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keifu import files, folders
from keifu.data import records
from keifu.data.catalogue import catalogue
from keifu.data.records import UTF8, Problem, lines, refuse
from keifu.data.text.passages import PAGES, html_text
from keifu.errors import UserError, unknown

MARK = "<|endoftext|>"
SUFFIXES = ".txt", ".md", *PAGES, ".jsonl", ".parquet"  # of a folder; tables too if their field is given
LIMIT = 1 << 20  # characters: longer documents come in chunks, so that they need not fit into memory


@dataclass(frozen=True)
class TextChunk:
    """Consecutive whole lines of one document. It states whether the document ends here, its part of a split, and the
    path of its file ("" for a text of the catalogue)."""

    text: str
    ends: bool
    part: int = 0
    file: str = ""


@dataclass(frozen=True)
class TextFileFormat:
    """Format of text files: the field with the text of a record (None: "text"), and the encoding of files without a
    byte order mark."""

    field: str | None = None
    encoding: str = UTF8

    def settings(self) -> dict[str, str]:
        """Return the settings that differ from the defaults, for the fingerprint of a prepared text."""
        changed = {} if self.field in (None, "text") else {"field": self.field}
        return changed if self.encoding == UTF8 else changed | {"encoding": self.encoding}


PLAIN = TextFileFormat()


def read_chunks(source: str | Path, form: TextFileFormat = PLAIN, problem: Problem = refuse) -> Iterator[TextChunk]:
    """Yield all documents of a source in a fixed order, long ones in several chunks.

    `problem` gets a sentence for each fault with its position: bytes that are not in the encoding, a record without the
    field, a binary file, a source without text. If it returns, invalid bytes become U+FFFD, and a faulty record or file
    is skipped.
    """
    blank, faulty = True, False

    def noted(sentence: str) -> None:
        nonlocal faulty
        faulty = True
        problem(sentence)

    for piece in _all(source, form, noted):
        blank = blank and not piece.text.strip()
        yield piece
    if blank and not faulty:  # a fault says by itself why there is no text
        problem(f"There is no text in {source}: it is empty.")


def documents(source: str | Path, form: TextFileFormat = PLAIN) -> Iterator[str]:
    """Yield the documents of a source as whole strings."""
    parts: list[str] = []
    for piece in read_chunks(source, form):
        parts.append(piece.text)
        if piece.ends:
            yield "".join(parts)
            parts.clear()


def chunks(pieces: Iterable[TextChunk], characters: int) -> Iterator[list[TextChunk]]:
    """Group consecutive pieces into lists of about `characters` characters."""
    group, size = list[TextChunk](), 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def content_hash(source: str | Path, form: TextFileFormat = PLAIN) -> str:
    """Return the SHA-256 of a source's content in hexadecimal. Names and folders of the files do not count."""
    if source in catalogue.CATALOGUE:
        return files.hash_of([catalogue.identity(str(source))])
    return files.hash_of(["\n".join(f"{path.suffix}:{files.sha256(path)}" for path in paths(source, form))])


def paths(source: str | Path, form: TextFileFormat = PLAIN) -> list[Path]:
    """List the files of a source that is not in the catalogue, in order. Raises `UserError` if there are none."""
    path, matching = Path(source).expanduser(), folders.matching(source)
    if path.is_dir():
        kinds = SUFFIXES if form.field is None else (*SUFFIXES, *records.SUFFIXES)
        return [file for file in matching if file.suffix.lower() in kinds] or _nothing(path, matching)
    if matching:
        return matching
    raise unknown("file, folder or catalogue entry", str(source), [*catalogue.names(), *folders.neighbours(path)])


def _all(source: str | Path, form: TextFileFormat, problem: Problem) -> Iterator[TextChunk]:
    if source in catalogue.CATALOGUE:
        for text in catalogue.documents(str(source)):
            yield from _in_chunks(text)
        return
    for path in paths(source, form):
        for piece in _of_file(path, form, problem):
            yield replace(piece, file=str(path))


def _of_file(path: Path, form: TextFileFormat, problem: Problem) -> Iterator[TextChunk]:
    suffix = path.suffix.lower()
    if suffix in records.SUFFIXES:
        field = form.field or "text"
        for where, record in records.read_records(path, problem, form.encoding, only=field):
            yield from _field(record, field, where, problem)
    elif suffix in PAGES:
        yield from _in_chunks(html_text(lines(path, problem, form.encoding)))
    elif path.stat().st_size:
        yield from _gather(lines(path, problem, form.encoding), MARK)
    else:
        yield TextChunk("", True)


def _field(record: Mapping[str, Any], field: str, where: str, problem: Problem) -> Iterator[TextChunk]:
    """Yield the text of one record."""
    if field not in record:
        wrong = str(unknown("field", field, record)).removeprefix("T")
        problem(f"{where}: t{wrong} Name the one that holds the text (--text-field; in a mixture, `field`).")
        return
    text = record[field]
    if not isinstance(text, str):
        problem(f"{where}: the field {field!r} is {type(text).__name__}, not text.")
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        problem(f"{where}: the field {field!r} holds half of a surrogate pair, which is no character.")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    yield from _in_chunks(text)


def _gather(lines: Iterable[str], mark: str | None = None) -> Iterator[TextChunk]:
    """Join lines to documents, which end at the line `mark`, in chunks of about LIMIT characters.

    A chunk begins with a line that is not blank, because tokenizers join blank lines to the text before them.
    """
    gathered, size = list[str](), 0
    for line in lines:
        ended = mark is not None and line.strip() == mark
        if ended or (size >= LIMIT and not line[0].isspace()):
            yield TextChunk("".join(gathered), ended)
            gathered, size = [], 0
        if not ended:
            gathered.append(line)
            size += len(line)
    if gathered:
        yield TextChunk("".join(gathered), True)


def _in_chunks(text: str) -> Iterator[TextChunk]:
    if len(text) <= LIMIT:
        yield TextChunk(text, True)
    else:
        yield from _gather(text.splitlines(keepends=True))


def _nothing(folder: Path, inside: list[Path]) -> list[Path]:
    endings = sorted({file.suffix or file.name for file in inside})[:8]
    start = f"The folder {folder} holds no {', '.join(SUFFIXES)} file; it "
    if not endings:
        raise UserError(f"{start}is empty.")
    raise UserError(f"{start}holds {', '.join(endings)}: name them with a pattern such as {folder}/**/*{endings[0]}.")
