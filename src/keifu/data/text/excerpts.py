"""Excerpts of text files: consecutive lines with their numbers, so that an answer can cite "notes.md:12-18"."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from keifu.data.text.passages import HEADING, LONGEST, Passage
from keifu.errors import UserError
from keifu.folders import matching
from keifu.untrusted import read_text

SUFFIXES = (".md", ".txt", ".rst", ".py")
LARGEST = 2**21  # bytes of a file
MOST = 20_000  # excerpts of a conversation
SHORT = 300  # characters; a block that is shorter is joined with the next one
LINE_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Excerpt(Passage):
    """Passage of whole lines, with the number of its last line. A line that is too long is several excerpts."""

    last_line: int

    @property
    def source(self) -> str:
        """File and lines: "notes.md:12-18"."""
        lines = str(self.line) if self.line == self.last_line else f"{self.line}-{self.last_line}"
        return f"{self.file}:{lines}"


@dataclass(frozen=True)
class FileState:
    """Path of a document with its size and time of change, by which a changed document is noticed."""

    path: Path
    size: int
    changed: int


class FolderOfDocuments:
    """Text files of a folder as excerpts. `refresh` reads again the files that have changed.

    report: receives one sentence for all files of other kinds, and one for each document that cannot be read.
    """

    def __init__(self, folder: Path, report: Callable[[str], object]):
        self.folder, self.report = folder, report
        self._stored: dict[FileState, list[Excerpt]] = {}
        self._reported: set[str] = set()

    def refresh(self) -> list[Excerpt]:
        """Return the excerpts of all documents. Raises `UserError` if there are none, or too many."""
        stored = self._stored
        self._stored = {state: stored[state] if state in stored else self._read(state) for state in self._states()}
        excerpts = [excerpt for of_file in self._stored.values() for excerpt in of_file]
        if not excerpts:
            raise UserError(f"The documents of {self.folder} have no text: write some, or name another folder.")
        if len(excerpts) > MOST:
            text = f"The documents of {self.folder} have {len(excerpts):,} passages, and at most {MOST:,} are searched"
            raise UserError(f"{text}: name a smaller folder.")
        return excerpts

    def _states(self) -> Iterator[FileState]:
        root = self.folder.expanduser()
        if not root.exists():
            raise UserError(f"There is no folder {self.folder}: name one with {', '.join(SUFFIXES)} files.")
        inside = [path for path in matching(root) if path.resolve().is_relative_to(root.resolve())]
        documents = [path for path in inside if path.suffix.lower() in SUFFIXES]
        others = sorted({*inside} - {*documents})
        if not documents:
            raise UserError(f"{self.folder} holds no document: {', '.join(SUFFIXES)} files are read.")
        if others:
            names = ", ".join(path.name for path in others[:3]) + ", ..." * (len(others) > 3)
            self._report(f"Left out {len(others)} files that are not {', '.join(SUFFIXES)}: {names}.")
        for path in documents:
            about = path.stat()
            yield FileState(path, about.st_size, about.st_mtime_ns)

    def _read(self, state: FileState) -> list[Excerpt]:
        root = self.folder.expanduser()
        name = state.path.name if state.path == root else state.path.relative_to(root).as_posix()
        try:
            if state.size > LARGEST:
                raise UserError(f"{name} has {state.size:,} bytes, and at most {LARGEST:,} are read of a document.")
            return cut_excerpts(read_text(state.path), name)
        except (UserError, OSError) as error:
            self._report(f"Left out: {error}")
            return []

    def _report(self, sentence: str) -> None:
        if sentence not in self._reported:
            self._reported.add(sentence)
            self.report(sentence)


def cut_excerpts(text: str, name: str) -> list[Excerpt]:
    """Cut a document into excerpts of at most `LONGEST` characters, at empty lines and headings if possible.

    name: of the file, stored in each excerpt. Raises `UserError` for a binary file.
    """
    if "\0" in text:
        raise UserError(f"{name} is binary: it has the character U+0000.")
    excerpts, heading = list[Excerpt](), ""
    lines, first = list[str](), 1

    def close(number: int) -> None:
        """Store the lines before this number."""
        body = [*lines]
        last = number - 1
        while body and not body[-1].strip():
            body.pop()
            last -= 1
        if body:
            excerpts.append(Excerpt(name, first, heading, "\n".join(body), last))
        lines.clear()

    marks = not name.lower().endswith(".py")  # in Python, # begins a comment
    for number, line in enumerate(LINE_BREAK.split(text), 1):
        match = HEADING.fullmatch(line) if marks else None
        length = sum(map(len, lines)) + len(lines)
        ends_block = bool(lines) and not line.strip() and length >= SHORT
        if match or ends_block or length + len(line) > LONGEST:
            close(number)
        heading = match[1] if match else heading
        if not lines and not line.strip():
            continue
        first = number if not lines else first
        if match:
            continue
        while len(line) > LONGEST:
            excerpts.append(Excerpt(name, number, heading, line[:LONGEST], number))
            line = line[LONGEST:]
        lines.append(line)
    close(number + 1)
    return excerpts


def cut_all(documents: Sequence[tuple[str, str]]) -> list[Excerpt]:
    """Return the excerpts of documents that are given as pairs of name and text. Raises `UserError` for too many."""
    excerpts = [excerpt for name, text in documents for excerpt in cut_excerpts(text, name)]
    if len(excerpts) > MOST:
        raise UserError(
            f"The documents have {len(excerpts):,} passages, and at most {MOST:,} are searched: send fewer."
        )
    return excerpts
