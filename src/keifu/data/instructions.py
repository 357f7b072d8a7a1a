"""Instructions with their answers, made of the catalogue's texts by fixed phrases; knows no template.

Nobody wrote these questions: the answers are Wikipedia's, Wikibooks' and Tatoeba's (see `keifu data list` for licences
and whom to name), the questions are one phrase each around a title or a sentence.
"""

from collections.abc import Callable, Iterator

from keifu.data import catalogue
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


INSTRUCTIONS: dict[str, Callable[[], Iterator[Conversation]]] = {
    "summary-instructions": summaries,
    "recipe-instructions": recipes,
    "translation-instructions": translations,
}
