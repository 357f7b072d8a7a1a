"""Text of an HTML page: without tags, scripts and styles, with one line for each block. Passages of documents for
search: Markdown, text and HTML files are split at paragraphs and headings."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from keifu.errors import UserError
from keifu.folders import matching
from keifu.untrusted import read_text

BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr",
    "html", "legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "td", "th",
    "title", "tr", "ul",
}  # fmt: skip
LEFT_OUT = {"script", "style", "template"}
APART = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "blockquote", "title"}  # blank line after


class HtmlPart(NamedTuple):
    """Text of a page with its first line number, or a line break with the tag that causes it: "p" or "/p"."""

    text: str
    line: int
    tag: str = ""


class _Page(HTMLParser):
    """Parser that collects the parts."""

    def __init__(self, left_out: Collection[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.left_out = left_out
        self.parts: list[HtmlPart] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.left_out
        self.verbatim += tag == "pre"
        self._break(tag, tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in self.left_out))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        self._break(tag, f"/{tag}")
        if tag in APART:
            self._break(tag, "")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        line = self.getpos()[0] + data.count("\n", 0, len(data) - len(data.lstrip()))
        if not self.verbatim:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            data = data.lstrip(" ") if not self.parts or self.parts[-1].text[-1:].isspace() else data
        if data:
            self.parts.append(HtmlPart(data, line))

    def _break(self, tag: str, text: str) -> None:
        if tag in BLOCKS:
            self.parts.append(HtmlPart("\n", self.getpos()[0], text))


def html_parts(lines: Iterable[str], left_out: Collection[str] = LEFT_OUT) -> list[HtmlPart]:
    """Return the texts and line breaks of a page, given as lines, without the content of tags in `left_out`."""
    page = _Page(left_out)
    for line in lines:
        page.feed(line)
    page.close()
    return page.parts


def html_text(lines: Iterable[str]) -> str:
    """Return the text of a page, given as lines: entities as characters, at most one consecutive empty line."""
    text = re.sub(r"[ \t]+\n", "\n", "".join(part.text for part in html_parts(lines)))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


TEXTS = (".md", ".markdown", ".txt", ".rst")
PAGES = (".html", ".htm")
LONGEST = 700  # characters of a passage; sentence encoders read little more
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
HEADING_ENDS = ("/h1", "/h2", "/h3", "/h4", "/h5", "/h6")
UNREAD = {*LEFT_OUT, "head", "noscript"}


@dataclass(frozen=True)
class Passage:
    """Part of a document: its file, the number of its first line, its heading and its text."""

    file: str
    line: int
    heading: str
    text: str

    @property
    def full_text(self) -> str:
        """Text with its heading before it. This is what is embedded."""
        return f"{self.heading}: {self.text}" if self.heading else self.text


Line = tuple[int, str]  # (number from 1, text)


def document_files(folder: Path) -> list[Path]:
    """List the documents in a folder and its subfolders, or the one file. Hidden files are skipped."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name one with {', '.join((*TEXTS, *PAGES))} files.")
    documents = [path for path in matching(folder) if path.suffix.lower() in (*TEXTS, *PAGES)]
    if not documents:
        raise UserError(f"The folder {folder} holds no document: {', '.join((*TEXTS, *PAGES))} files are searched.")
    return documents


def read_passages(path: Path, name: str) -> list[Passage]:
    """Read the passages of a document. name: of the file, stored in each passage. Raises `UserError` if it is not
    UTF-8."""
    text = read_text(path)
    blocks = _html_blocks(text) if path.suffix.lower() in PAGES else _text_blocks(text)
    return [Passage(name, line, heading, piece) for heading, lines in blocks for line, piece in _pieces(lines)]


def read_documents(names: Mapping[Path, str], leave_out: Callable[[Exception], object]) -> list[Passage]:
    """Read the passages of documents. Raises `UserError` if none has text.

    names: for each path the file's name in its passages. leave_out: receives the error of each document that cannot be
    read.
    """
    passages = list[Passage]()
    for path, name in names.items():
        try:
            passages += read_passages(path, name)
        except (UserError, OSError) as error:
            leave_out(error)
    if not passages:
        raise UserError(f"The documents hold no text to search: {len(names)} were read.")
    return passages


def _text_blocks(text: str) -> Iterator[tuple[str, list[Line]]]:
    """Yield the paragraphs of Markdown or plain text, each with its heading."""
    heading, lines, fenced = "", list[Line](), False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fenced ^= line.lstrip().startswith("```")
        match = None if fenced else HEADING.fullmatch(line)
        if match or not line.strip():
            if lines:
                yield heading, lines
            heading, lines = match[1] if match else heading, []
        elif not line.lstrip().startswith("```"):
            lines.append((number, line.strip()))
    if lines:
        yield heading, lines


def _html_blocks(text: str) -> Iterator[tuple[str, list[Line]]]:
    """Yield the blocks of an HTML page, each with its heading."""
    heading, lines = "", list[Line]()
    for part in [*html_parts([text], UNREAD), HtmlPart("\n", 0)]:
        if part.tag in HEADING_ENDS:
            heading, lines = " ".join(words for _, words in lines), []
        elif words := " ".join(part.text.split()):
            lines.append((part.line, words))
        elif part.text == "\n" and lines:
            yield heading, lines
            lines = []


def _pieces(lines: list[Line]) -> Iterator[Line]:
    """Split a block into passages of at most `LONGEST` characters. Yield (number of the first line, text)."""
    first, piece = lines[0][0], ""
    for number, text in lines:
        for part in (text[at : at + LONGEST] for at in range(0, len(text), LONGEST)):
            if piece and len(piece) + len(part) + 1 > LONGEST:
                yield first, piece
                first, piece = number, ""
            first = first if piece else number
            piece = f"{piece} {part}".strip()
    if piece:
        yield first, piece
