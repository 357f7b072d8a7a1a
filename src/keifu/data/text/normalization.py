"""Normalisation of text for comparison: ignores case, spaces, punctuation and compatibility forms."""

import hashlib
import unicodedata


class KeptCharacters(dict[int, int | None]):
    """Table for str.translate: a character's code, or None for spaces, punctuation and control characters."""

    def __missing__(self, code: int) -> int | None:
        stripped = unicodedata.category(chr(code))[0] in "PZC"
        self[code] = None if stripped else code
        return self[code]


KEPT_CHARACTERS = KeptCharacters()


def normalize(sentence: str) -> str:
    """Convert a sentence to NFKC and lower case, and remove spaces and punctuation.

    A sentence that consists only of punctuation keeps it.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", sentence).lower())
    bare = unicodedata.normalize("NFKC", text.translate(KEPT_CHARACTERS))
    return bare or "".join(text.split())


def key(text: str) -> str:
    """Return a hash of a normalised text, in hexadecimal."""
    return hashlib.sha256(normalize(text).encode()).hexdigest()
