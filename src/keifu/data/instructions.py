"""Instructions with their answers, made of the catalogue's texts by fixed phrases; knows no template.

Nobody wrote these questions: the answers are Wikipedia's, Wikibooks' and Tatoeba's (see `keifu data list` for licences
and whom to name), the questions are one phrase each around a title or a sentence. Sums are drawn and worked out here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from keifu.data import catalogue
from keifu.data.chain_sums import chain_sums
from keifu.data.readers import Conversation


def asked(question: str, answer: str) -> Conversation:
    """A conversation of one question."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def summaries() -> Iterator[Conversation]:
    """"What is X?" with Wikipedia's summary of X."""
    for document in catalogue.documents("wiki-summaries"):
        title, _, summary = document.partition("\n\n")
        if summary.strip():
            yield asked(f"What is {title.strip()}?", summary.strip())


def recipes() -> Iterator[Conversation]:
    """"How do I make X?" with Wikibooks' recipe for X."""
    for document in catalogue.documents("recipes"):
        title, _, recipe = document.partition("\n\n")
        if recipe.strip():
            yield asked(f"How do I make {title.strip()}?", recipe.strip())


def translations() -> Iterator[Conversation]:
    """"Translate into Japanese" with Tatoeba's translation; each sentence once."""
    seen = set()
    for japanese, english in catalogue.pairs("tatoeba-ja-en"):
        if english not in seen:
            seen.add(english)
            yield asked(f"Translate into Japanese: {english}", japanese)


def arithmetic() -> Iterator[Conversation]:
    """Chains of two to four numbers of one or two digits, with what they come to."""
    for record in chain_sums(10_000, (2, 4), 2, seed=1):
        yield asked(record["prompt"], record["answer"])


class Made(NamedTuple):
    """The catalogue entry that a set is made of, empty where it is none, and how."""

    entry: str
    how: str


PHRASED = "questions are one phrase each, nobody asked them"
MADE_OF = {
    "summary-instructions": Made("wiki-summaries", PHRASED),
    "recipe-instructions": Made("recipes", PHRASED),
    "translation-instructions": Made("tatoeba-ja-en", PHRASED),
    "arithmetic-instructions": Made("", "sums drawn and worked out here"),
    "chitchat-preferences": Made("chitchat", "whole talks rated by who had them; nobody saw two beside each other"),
}
INSTRUCTIONS: dict[str, Callable[[], Iterator[Conversation]]] = {
    "summary-instructions": summaries,
    "recipe-instructions": recipes,
    "translation-instructions": translations,
    "arithmetic-instructions": arithmetic,
}
