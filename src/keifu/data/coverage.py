"""How much of a text a tokenizer's vocabulary can spell; knows no language by name and no model."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError

SHOWN = 8  # characters named in a sentence


@dataclass(frozen=True)
class Coverage:
    """Of the characters of a text, spaces aside: how many there are, how many stand in no token, and which of those.

    lost: how many of them become the unknown token, or cannot be encoded; the others are spelled in bytes.
    """

    characters: int
    missing: int
    lost: int
    examples: str

    @property
    def share(self) -> float:
        """Of the characters, those that stand in tokens of the vocabulary."""
        return 1 - self.missing / max(1, self.characters)

    def sentence(self, name: str) -> str:
        """What is said about a text."""
        if not self.missing:
            return f"Every character of {name} stands in the tokenizer's vocabulary."
        rest = "are spelled in bytes, so nothing is unknown"
        if self.lost:
            rest = f"are not, and {self.lost:,} of {self.characters:,} characters become unknown"
        stand = f"{self.share:.2%} of the characters of {name} stand in the tokenizer's vocabulary"
        return f"{stand}; the others ({self.examples}) {rest}."


def coverage(tokenizer: Tokenizer, texts: Iterable[str]) -> Coverage:
    """Counts the characters of texts by what the tokenizer makes of them."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    spelled = "".join(tokenizer.token_bytes(n).decode(errors="ignore") for n in range(tokenizer.vocab_size))
    known = {character for character in counts if character.isspace()} | set(spelled)
    missing = [c for c, _ in counts.most_common() if not set(_normalised(tokenizer, c)) <= known]
    lost = [c for c in missing if _is_lost(tokenizer, c)]
    return Coverage(
        characters=sum(n for c, n in counts.items() if not c.isspace()),
        missing=sum(counts[c] for c in missing),
        lost=sum(counts[c] for c in lost),
        examples="".join((lost or missing)[:SHOWN]) + ("..." if len(lost or missing) > SHOWN else ""),
    )


def _normalised(tokenizer: Tokenizer, character: str) -> str:
    normalizer = tokenizer.backend.normalizer
    text = character if normalizer is None else normalizer.normalize_str(character)
    return text.replace("\N{LOWER ONE EIGHTH BLOCK}", "")


def _is_lost(tokenizer: Tokenizer, character: str) -> bool:
    unknown = tokenizer.special.get("unk_token")
    try:
        ids = tokenizer.encode(character)
    except UserError:
        return True
    return unknown is not None and tokenizer.token_id(unknown) in ids
