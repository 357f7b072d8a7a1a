"""Decoding of token ids to text, whole or token by token, from the description of a tokenizer's decoder.

Every decoder here is a function from one token to its bytes. So the cost of a token in a stream does not depend on the
length of the text. A character is withheld until its last byte has arrived.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from keifu.errors import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# WordPiece's clean-up of English, applied to each token with the space before it (Hugging Face `tokenizers`, decoders).
CLEAN_UP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
CLEAN_UP += [(" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that represent bytes in a byte-level vocabulary (GPT-2, 2019), each with its byte.

    Printable Latin-1 characters represent themselves. The other bytes get the next free characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(unprintable)}


def byte_value(token: str) -> int | None:
    """Return the byte of a byte-fallback token such as `<0xE3>`; None for any other token."""
    match = BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Return one replacement character for each invalid byte, as in SentencePiece."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("keifu.each-byte", _each_byte)


@dataclass(frozen=True)
class DecodingRule:
    """Rule that converts tokens to bytes. `piece(token, first)` returns a token's bytes; `first`: whether it begins the
    text."""

    piece: Callable[[str, bool], bytes]
    strip: int = 0  # number of spaces to remove at the start of the text (encoding added them)
    errors: str = "replace"  # handling of invalid bytes, a name known to `codecs`
    drops_last_space: bool = False  # a space at the end came from an end-of-word mark


def _byte_level(token: str, first: bool) -> bytes:
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token that is written as text
        return token.encode()


def _marked_byte_level(word_end: str, token: str, first: bool) -> bytes:
    return _byte_level(token.removesuffix(word_end), first) + b" " * token.endswith(word_end)


def _wordpiece(prefix: str, cleanup: bool) -> DecodingRule:
    def piece(token: str, first: bool) -> bytes:
        if not first:
            token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        for dirty, clean in CLEAN_UP if cleanup else ():
            token = token.replace(dirty, clean)
        return token.encode()

    return DecodingRule(piece)


def _sequence(steps: list[dict[str, Any]]) -> DecodingRule:
    """Return the rule of SentencePiece's decoders: replacements in each token, bytes for byte tokens, and removal of
    the first space."""
    kinds = [step["type"] for step in steps]
    if len(steps) == 1:
        return decoding_rule(steps[0])
    replacements = [(s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"]
    strips = [s for s in steps if s["type"] == "Strip"]
    regular = all(old is not None for old, _ in replacements) and all(s["stop"] == 0 for s in strips)
    if not set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} or not regular:
        raise UserError(f"The tokenizer's decoder is a sequence of {', '.join(kinds)}, which keifu cannot decode with.")
    bytes_fall_back = "ByteFallback" in kinds

    def piece(token: str, first: bool) -> bytes:
        byte = byte_value(token) if bytes_fall_back else None
        if byte is not None:
            return bytes([byte])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    errors = "keifu.each-byte" if bytes_fall_back else "replace"
    return DecodingRule(piece, strip=sum(s["start"] for s in strips), errors=errors)


def decoding_rule(decoder: dict[str, Any] | None, word_end: str = "") -> DecodingRule:
    """Convert the `decoder` entry of a tokenizer.json to a rule. Raises `UserError` for an unknown type.

    word_end: mark of a word's last piece in a byte-level vocabulary (CLIP); "" if there is none.
    """
    match decoder:
        case None:
            return DecodingRule(lambda token, first: (token if first else f" {token}").encode())
        case {"type": "ByteLevel"} if word_end:
            return DecodingRule(partial(_marked_byte_level, word_end), drops_last_space=True)
        case {"type": "ByteLevel"}:
            return DecodingRule(_byte_level)
        case {"type": "Fuse"}:
            return DecodingRule(lambda token, first: token.encode())
        case {"type": "Metaspace", "replacement": space}:
            start = " " if decoder.get("prepend_scheme", "always") == "never" else ""
            return DecodingRule(lambda token, first: token.replace(space, start if first else " ").encode())
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            return _wordpiece(prefix, cleanup)
        case {"type": "BPEDecoder", "suffix": suffix}:
            return DecodingRule(lambda token, first: token.replace(suffix, " ").encode(), drops_last_space=True)
        case {"type": "Sequence", "decoders": steps}:
            return _sequence(steps)
        case {"type": ("Replace" | "ByteFallback")}:
            return _sequence([decoder, {"type": "Fuse"}])
    raise UserError(f"The tokenizer's decoder is of the kind {decoder['type']!r}, which keifu cannot decode with.")


class StreamDecoder:
    """Incremental decoder: `push` returns the characters that a token completes, `flush` returns the rest at the end.

    Joined, these are the result of `Tokenizer.decode` for all ids. An unknown id gives U+FFFD. The cost of a push does
    not depend on the length of the text.
    """

    def __init__(self, how: DecodingRule, token_of: Callable[[int], str | None], skipped: frozenset[int] = frozenset()):
        self._how, self._token_of, self._skipped = how, token_of, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(how.errors)
        self._first = True
        self._strip = how.strip
        self._space = b""  # a space that is output only if a token follows

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes, often none."""
        return self._utf8.decode(self._bytes(token_id))

    def flush(self) -> str:
        """Return the rest of the text at the end; U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", True)

    def decode_all(self, token_ids: Iterable[int]) -> str:
        """Decode all tokens at once. Call it only on a new decoder."""
        return b"".join(map(self._bytes, token_ids)).decode("utf-8", self._how.errors)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        token = self._token_of(token_id)
        data = REPLACEMENT.encode() if token is None else self._how.piece(token, self._first)
        self._first = False
        while self._strip and data:
            data, self._strip = (data[1:], self._strip - 1) if data.startswith(b" ") else (data, 0)
        if self._how.drops_last_space:
            data, self._space = self._space + data, b""
            if data.endswith(b" "):
                data, self._space = data[:-1], b" "
        return data
