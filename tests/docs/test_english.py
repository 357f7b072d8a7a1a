"""The English of README and the pages: plain sentences to the reader, within limits that are counted."""

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
WORD = re.compile(r"[A-Za-z][\w'-]*")
LIMITS = {  # the most of a word per 1,000 words of prose
    "beside": (r"\bbeside\b", 0.2),
    "bought": (r"\b(bought|buys)\b", 0.0),
    "stands": (r"\b(stands|lies)\b", 0.0),
    "what": (r"\b[Ww]hat\b(?![^.?!]*\?)", 1.5),
    "where": (r"\b[Ww]here\b(?![^.?!]*\?)", 1.0),
}
YOU = re.compile(r"\b(you|your|yours|yourself)\b", re.IGNORECASE)


def prose(page: str) -> str:
    """Return the sentences of a page without code, tables and headings. A link becomes its text, and code one word."""
    text = NOT_PROSE.sub("", HIDDEN.sub("", page))
    return CODE.sub("Code", LINK.sub(r"\1", text)).replace("**", "")


def sentences(text: str) -> list[str]:
    """Return the sentences of prose. The end of a list item or of a paragraph ends a sentence."""
    parts = re.split(r"\n\s*\n|\n\s*(?:-|\d+\.)\s", text)
    return [s for part in parts for s in re.split(r"(?<=[.?!])\s+(?=[A-Z(\"*])", part.replace("\n", " ")) if s.strip()]


def per_thousand(pattern: str, text: str) -> float:
    return 1000 * len(re.findall(pattern, text)) / max(len(WORD.findall(text)), 1)


ALL = "\n\n".join(prose(page.read_text(encoding="utf-8")) for page in PAGES)


@pytest.mark.parametrize("word", LIMITS)
def test_a_word_is_not_used_too_often(word: str) -> None:
    pattern, most = LIMITS[word]
    assert per_thousand(pattern, ALL) <= most


def test_the_pages_speak_to_the_reader() -> None:
    assert per_thousand(YOU.pattern, ALL.lower()) >= 8


def test_long_sentences_are_rare() -> None:
    found = sentences(ALL)
    long = [sentence for sentence in found if len(WORD.findall(sentence)) > 40]
    assert len(long) <= 0.02 * len(found), "\n\n".join(long)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_uses_the_words_that_readers_stumble_over(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    assert re.findall(r"(?i)\b(?:bought|buys|stands|lies|in place of|of which|is told|are told)\b", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_headings_are_nouns_of_the_field(page: Path) -> None:
    headings = re.findall(r"(?m)^#+ (.*)$", HIDDEN.sub("", page.read_text(encoding="utf-8")))
    assert [title for title in headings if re.search(r"(?i)\b(beside|bought|told|one's|what one)\b", title)] == []


def test_counts_see_what_they_count() -> None:
    page = "# Beside\n\nYou run `beside`. It stands beside [the bought one](x.md).\n\n"
    page += "```\nwhat\n```\n\n| what | where |\n"
    text = prose(page)
    assert [len(re.findall(LIMITS[word][0], text)) for word in LIMITS] == [1, 1, 1, 0, 0]
    assert len(sentences(text)) == 2
    assert not re.findall(LIMITS["what"][0], "What is a token? You know what it is?")
    assert re.findall(LIMITS["what"][0], "It prints what it has.")
