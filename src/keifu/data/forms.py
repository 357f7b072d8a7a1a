"""The four forms in which GPT-1 is given a task, and the tokens that hold them together; it knows no table, no model.

(Radford et al., 2018, figure 1 and section 3.3.) A form says how the texts of an example become sequences of tokens:

    classification   start text extract
    entailment       start premise delimiter hypothesis extract
    similarity       start first delimiter second extract, and start second delimiter first extract
    choice           start context delimiter answer extract, for each answer
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import unknown

Ids = list[int]
START, DELIMITER, EXTRACT = TOKENS = "_start_", "_delimiter_", "_classify_"  # as the released code calls them


class Marks(NamedTuple):
    """The ids before, between and after the parts of a sequence; each may be none, one or several."""

    start: tuple[int, ...]
    delimiter: tuple[int, ...]
    extract: tuple[int, ...]

    def sequence(self, *parts: Sequence[int]) -> Ids:
        """Start, the parts with a delimiter between any two, extract."""
        rest = (token for part in parts[1:] for token in (*self.delimiter, *part))
        return [*self.start, *parts[0], *rest, *self.extract]


@dataclass(frozen=True)
class Form:
    """How an example is read and laid out.

    columns: what its texts' columns are called unless told otherwise. orders: from the number of its texts, which of
    them each sequence holds. answers: whether its label is the number of one of its texts.
    """

    name: str
    columns: tuple[str, ...]
    orders: Callable[[int], list[tuple[int, ...]]]
    answers: bool = False

    def sequences(self, texts: Sequence[Ids], marks: Marks, limit: int | None = None) -> list[Ids]:
        """The sequences of an example whose texts have these ids.

        limit: where one would have more tokens, its longest texts lose as many as needed from their ends.
        """
        return [self._sequence([texts[place] for place in order], marks, limit) for order in self.orders(len(texts))]

    def _sequence(self, parts: list[Ids], marks: Marks, limit: int | None) -> Ids:
        whole = marks.sequence(*parts)
        if limit is None or len(whole) <= limit:
            return whole
        room = limit - (len(whole) - sum(map(len, parts)))
        return marks.sequence(*(part[:kept] for part, kept in zip(parts, shares(parts, room), strict=True)))


def shares(parts: Sequence[Ids], room: int) -> list[int]:
    """How many tokens each part keeps of so many in all: as many of the longer ones as of the others, or all.

    What is left over when that does not come out even is not used, so that both orders of a pair are cut alike.
    """
    level, lengths = max(map(len, parts)), list(map(len, parts))
    while level and sum(min(length, level) for length in lengths) > room:
        level -= 1
    return [min(length, level) for length in lengths]


FORMS = {
    form.name: form
    for form in (
        Form("classification", ("text",), lambda texts: [(0,)]),
        Form("entailment", ("premise", "hypothesis"), lambda texts: [(0, 1)]),
        Form("similarity", ("first", "second"), lambda texts: [(0, 1), (1, 0)]),
        Form("choice", ("context", "answers"), lambda texts: [(0, n) for n in range(1, texts)], answers=True),
    )
}


def form_of(name: str) -> Form:
    """The form of that name, or a `UserError` with the nearest one."""
    if name not in FORMS:
        raise unknown("form", name, FORMS)
    return FORMS[name]


def with_marks(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with start, delimiter and extract tokens, and their ids; those that it has already stay.

    It puts them around a text and between two by itself, and pads with the start token where it had no other: so a
    sequence's last token that is no padding is always extract, which is where transformers reads its classes too.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    single, pair = f"{START} $A {EXTRACT}", f"{START} $A {DELIMITER} $B {EXTRACT}"
    vocabulary = backend.get_vocab()
    ids = [vocabulary[token] for token in TOKENS]
    given = list(zip(TOKENS, ids, strict=True))
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=given)
    special = {"pad_token": START} | tokenizer.special
    return tokenizer.replace(backend=backend, special=special), ids


def marks_of(tokenizer: Tokenizer, ids: Sequence[int | None]) -> Marks:
    """The marks of a model whose start, delimiter and extract tokens have these ids.

    Where there are none, its texts stand as the tokenizer itself makes them, with whatever it puts around them.
    """
    if ids[0] is None and ids[2] is None:
        bare, whole = tokenizer.encode("a"), tokenizer.encode("a", special=True)
        first = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        return Marks(tuple(whole[:first]), (), tuple(whole[first + len(bare) :]))
    start, delimiter, extract = (() if each is None else (each,) for each in ids)
    return Marks(start, delimiter, extract)
