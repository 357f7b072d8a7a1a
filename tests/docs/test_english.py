"""The English of README and the pages: none of the words that readers stumble over."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if not path.name.endswith(".ja.md"))
PAGES = [ROOT / "README.md", *DOCS]
HIDDEN = re.compile(r"^```.*?^```|^\$\$.*?^\$\$|<!--.*?-->", re.DOTALL | re.MULTILINE)
NOT_PROSE = re.compile(r"^\s*(\||#|!\[|\[←|---).*$", re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
CODE = re.compile(r"`[^`]*`|\$[^$]*\$")


def prose(page: str) -> str:
    """Return the sentences of a page without code, tables and headings. A link becomes its text, and code one word."""
    text = NOT_PROSE.sub("", HIDDEN.sub("", page))
    return CODE.sub("Code", LINK.sub(r"\1", text)).replace("**", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_uses_the_words_that_readers_stumble_over(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    assert re.findall(r"(?i)\b(?:bought|buys|stands|lies|in place of|of which|is told|are told)\b", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_headings_are_nouns_of_the_field(page: Path) -> None:
    headings = re.findall(r"(?m)^#+ (.*)$", HIDDEN.sub("", page.read_text(encoding="utf-8")))
    assert [title for title in headings if re.search(r"(?i)\b(beside|bought|told|one's|what one)\b", title)] == []


def test_prose_leaves_out_code_tables_and_headings() -> None:
    page = "# Beside\n\nYou run `beside`. It stands beside [the bought one](x.md).\n\n"
    page += "```\nwhat\n```\n\n| what | where |\n"
    assert prose(page).split() == ["You", "run", "Code.", "It", "stands", "beside", "the", "bought", "one."]
