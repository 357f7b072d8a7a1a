"""Text of an HTML page: without tags, scripts and styles, with one line for each block."""

import re
from collections.abc import Collection, Iterable
from html.parser import HTMLParser
from typing import NamedTuple

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
        self.hidden = 0
        self.verbatim = 0

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

    def _break(self, tag: str, shown: str) -> None:
        if tag in BLOCKS:
            self.parts.append(HtmlPart("\n", self.getpos()[0], shown))


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
