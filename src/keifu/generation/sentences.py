"""A text cut into sentences by its punctuation, Latin or Japanese, and put together again; knows no model, and of
languages no more than where they put their full stops.
"""

import re
from collections.abc import Iterable

OPENING, CLOSING = "「『（〈《【［｛“(", "」』）〉》】］｝”)"
FULL_WIDTH = "。！？｡"  # a sentence ends here whatever follows
HALF_WIDTH = ".!?…"  # and here where a space follows
QUOTES = "\"'»’"
PARTICLES = tuple("とっをはがにのもでへやなだじ、")  # what goes on with the sentence after a Japanese quotation
WORD = 60  # the longest word and the most spaces that are looked at
SHORTENED = """mr mrs ms dr prof st sr jr vs no nos vol pp ed eds cf al fig figs gen col capt lt sgt rev hon approx dept
est jan feb mar apr jun jul aug sep sept oct nov dec bzw ca vgl nr str mme mlle sra srta"""
ABBREVIATIONS = frozenset(SHORTENED.split())  # a name or a number may follow; single letters are seen without them
LANGUAGE = re.compile(r"\s*(>>[^<>\s]+<<)\s*")  # how Marian's multilingual models are told the language to write
WIDE = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f]")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order and without the spaces between them; none of a text of spaces.

    A full stop inside a quotation or brackets that are closed later ends no sentence, nor does one after an initial, a
    usual abbreviation or within a number. A text without such marks is one sentence, however long. A language's mark at
    the beginning (>>fra<<) is put before each sentence.
    """
    if mark := LANGUAGE.match(text):
        return [f"{mark[1]} {sentence}" for sentence in sentences(text[mark.end() :])]
    found, start = [], 0
    for end in _ends(text):
        if text[start:end].strip():
            found.append(text[start:end].strip())
            start = end
    return found + ([text[start:].strip()] if text[start:].strip() else [])


def joined(parts: Iterable[str]) -> str:
    """Sentences as one text: a space between them, but none beside a Japanese or Chinese character."""
    text = ""
    for part in filter(None, (part.strip() for part in parts)):
        space = " " if text and not WIDE.match(text[-1]) and not WIDE.match(part[0]) else ""
        text += space + part
    return text


def _ends(text: str) -> list[int]:
    """The places behind which a new sentence begins."""
    enclosed = _enclosed(text)
    ends, place = [], 0
    while place < len(text):
        last = text[place]
        place += 1
        if last not in FULL_WIDTH + HALF_WIDTH:
            continue
        while place < len(text) and text[place] in FULL_WIDTH + HALF_WIDTH + QUOTES + CLOSING:
            last = text[place] if text[place] in FULL_WIDTH else last
            place += 1
        quotation = text[place - 1] in CLOSING and text[place : place + 1] in PARTICLES
        if not enclosed[place] and not quotation and (last in FULL_WIDTH or _begins_anew(text, place)):
            ends.append(place)
    return ends


def _begins_anew(text: str, place: int) -> bool:
    """Whether the half-width mark before `place` ends a sentence: a space follows, then no small letter."""
    before, rest = text[max(0, place - WORD) : place].split()[-1], text[place : place + WORD].lstrip()
    if not rest or not text[place].isspace() or rest.lstrip(OPENING + QUOTES)[:1].islower():
        return False
    if not before.endswith(".") or before.endswith(".."):
        return True
    word = before.strip(OPENING + CLOSING + QUOTES).rstrip(".").rpartition(".")[2].lower()
    return word not in ABBREVIATIONS and not (len(word) == 1 and word.isalpha())


def _enclosed(text: str) -> list[bool]:
    """For each character, and the end, whether it stands within brackets or quotation marks that match."""
    inside, opened = [False] * (len(text) + 1), []
    for place, character in enumerate(text):
        if character in OPENING:
            opened.append((character, place))
        elif character in CLOSING:
            wanted = OPENING[CLOSING.index(character)]
            while opened:
                mark, start = opened.pop()
                if mark == wanted:
                    inside[start + 1 : place] = [True] * (place - start - 1)
                    break
    return inside
