"""The text of an HTML page: tags removed, a line for each block, scripts and styles left out."""

import re
from collections.abc import Iterable
from html.parser import HTMLParser

BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr",
    "html", "legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "summary", "table", "td", "th",
    "title", "tr", "ul",
}  # fmt: skip
LEFT_OUT = {"script", "style", "template"}
APART = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "blockquote", "title"}  # blank line after


class _Page(HTMLParser):
    """Parser that collects the text; "\\n" ends a line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in LEFT_OUT
        self.verbatim += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in LEFT_OUT))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        self._break(tag)
        if tag in APART:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.verbatim:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            data = data.lstrip(" ") if not self.parts or self.parts[-1][-1:].isspace() else data
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")


def html_text(lines: Iterable[str]) -> str:
    """Return the text of a page given as lines: entities as characters, at most one empty line in a row."""
    page = _Page()
    for line in lines:
        page.feed(line)
    page.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
