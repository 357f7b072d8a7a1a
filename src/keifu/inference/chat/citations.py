"""Citations in an answer: after each sentence that a passage supports, the passage's file and lines.

A small model does not write citations that can be trusted, so keifu adds them. A sentence is cited to the passage that
has most of its words, if it has at least half of them and all of its numbers. Marks of the same form that the model
writes itself (a document may ask for that) get parentheses instead of the brackets.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keifu.data.text.excerpts import Excerpt

SUPPORT = 0.5  # least share of a sentence's words that a passage must have
WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")
END = re.compile(r"[.!?][\"')*]*$")  # before white space
END_WIDE = re.compile("[\u3002\uff01\uff1f][\u300d\u300f\uff09]*$")  # in Japanese, before any character
MARK = re.compile(r"\[[^\[\]\n]*:\d+(-\d+)?\]")
LONGEST_MARK = 200  # characters that are held back after a bracket
FREQUENT = {
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "did", "do", "does", "for", "from",
    "had", "has", "have", "he", "her", "his", "i", "in", "is", "it", "its", "not", "of", "on", "or", "our", "she",
    "so", "that", "the", "their", "them", "there", "they", "this", "to", "was", "we", "were", "what", "when",
    "where", "which", "who", "will", "with", "you", "your",
}  # fmt: skip


@dataclass(frozen=True)
class Citation:
    """Part of an answer that cites a passage. index: of the passage among those that the model read.

    start, end: characters of the cited sentence in the text without marks.
    """

    index: int
    excerpt: Excerpt
    start: int
    end: int

    @property
    def mark(self) -> str:
        """Text of the citation, with a space before it."""
        return f" [{self.excerpt.source}]"


def words_of(text: str) -> list[str]:
    """Return the words that carry content, in lower case. Each Japanese or Chinese character is a word."""
    return [word for word in WORD.findall(text.lower()) if word not in FREQUENT]


def supporting(sentence: str, passages: Sequence[Excerpt]) -> int | None:
    """Return the index of the passage that supports a sentence, the nearest to the question of several; None: none."""
    words = {*words_of(sentence)}
    numbers = {word for word in words if any(map(str.isdigit, word))}
    best, index = 0.0, None
    for position, passage in enumerate(passages):
        known = {*words_of(passage.full_text)}
        share = len(words & known) / len(words) if words else 0.0
        if share >= SUPPORT and share > best and numbers <= known:
            best, index = share, position
    return index


class Citer:
    """Splitter of a growing answer into text and citations. The parts do not depend on how the answer comes in pieces.

    text: the answer without marks. citations: all citations so far.
    """

    def __init__(self, passages: Sequence[Excerpt]):
        self.passages, self.text, self.citations = passages, "", list[Citation]()
        self._bracket, self._begun = "", 0

    def push(self, piece: str, last: bool = False) -> list[str | Citation]:
        """Add a piece. Return the parts of the answer that are now certain. last: whether the answer ends here."""
        parts = list[str | Citation]()
        for character in self._unmarked(piece, last):
            if character == "\n" or self._ends_before(character):
                parts += self._cite()
            self.text += character
            if parts and isinstance(parts[-1], str):
                parts[-1] += character
            else:
                parts.append(character)
        return parts + self._cite() if last else parts

    def _ends_before(self, character: str) -> bool:
        """Return whether a sentence is complete if this character comes next."""
        tail = self.text[self._begun :][-8:]
        return bool(END_WIDE.search(tail) or (character.isspace() and END.search(tail)))

    def _unmarked(self, piece: str, last: bool) -> Iterator[str]:
        """Yield the characters of the answer. Text in brackets waits for its end; a mark gets parentheses."""
        for character in piece:
            if character == "[" or (self._bracket and (character == "\n" or len(self._bracket) > LONGEST_MARK)):
                yield from self._bracket
                self._bracket = ""
            if not self._bracket and character != "[":
                yield character
                continue
            self._bracket += character
            if character == "]":
                yield from f"({self._bracket[1:-1]})" if MARK.fullmatch(self._bracket) else self._bracket
                self._bracket = ""
        if last:
            yield from self._bracket
            self._bracket = ""

    def _cite(self) -> list[str | Citation]:
        """Return the citation of the sentence that ends here, if a passage supports it."""
        sentence = self.text[self._begun :]
        start = self._begun + len(sentence) - len(sentence.lstrip())
        index = supporting(sentence, self.passages)
        self._begun = len(self.text)
        if index is None:
            return []
        self.citations.append(Citation(index, self.passages[index], start, len(self.text)))
        return [self.citations[-1]]


def with_marks(parts: Sequence[str | Citation]) -> str:
    """Return the parts of an answer as text, with a mark such as "[notes.md:12-18]" for each citation."""
    return "".join(part if isinstance(part, str) else part.mark for part in parts)
