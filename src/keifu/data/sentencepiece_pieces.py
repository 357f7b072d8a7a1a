"""Text cut into SentencePiece's pieces themselves, exactly as SentencePiece cuts; knows no ids and no other format.

Marian numbers the pieces by a vocabulary of its own, and looks up even those that the model itself does not know, so
the pieces are needed as text. The table of replacements is applied here as SentencePiece does it, from left to right,
the longest match first (the `tokenizers` library goes by grapheme clusters instead).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tokenizers

from keifu.data.sentencepiece_model import backend_from_pieces, parse
from keifu.data.special_tokens import Shield


class CharacterMap:
    """SentencePiece's compiled replacements: a trie over UTF-8 in a double array (Yata's darts-clone), then the texts.

    table: the bytes of `precompiled_charsmap`; empty for none.
    """

    def __init__(self, table: bytes):
        size = int.from_bytes(table[:4], "little")
        self._units = np.frombuffer(table[4 : 4 + size], dtype="<u4").tolist()
        self._texts = table[4 + size :]

    def apply(self, text: str) -> str:
        """The text with every match replaced; a character that begins none stays."""
        if not self._units:
            return text
        data, place, out = text.encode(), 0, bytearray()
        while place < len(data):
            length, found = self._longest(data, place)
            if length:
                out += self._texts[found : self._texts.index(0, found)]
            else:
                length = 1 + sum(byte & 0xC0 == 0x80 for byte in _following(data, place))
                out += data[place : place + length]
            place += length
        return out.decode("utf-8", "replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """The length of the longest match from `start` on, 0 for none, and where its replacement begins."""
        units, length, found = self._units, 0, 0
        node = _offset(units[0])
        for place in range(start, len(data)):
            byte = data[place]
            node ^= byte
            if node >= len(units) or units[node] & 0x800000FF != byte:
                break
            leaf = units[node] >> 8 & 1
            node ^= _offset(units[node])
            if leaf:
                length, found = place + 1 - start, units[node] & 0x7FFFFFFF
        return length, found


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _following(data: bytes, place: int) -> bytes:
    """The bytes that may belong to the character at `place`."""
    first = data[place]
    return data[place + 1 : place + 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)]


class Pieces:
    """A SentencePiece model that gives pieces. data: its file; name: the file's name, for errors."""

    def __init__(self, data: bytes, name: str):
        model = parse(data, name)
        self.settings = model.settings
        self._map = CharacterMap(model.settings.character_map)
        backend = backend_from_pieces(model.pieces, replace(model.settings, character_map=b""))
        self._unknown = model.settings.unknown_id
        self._spaces = backend.normalizer
        self._backend = _without_normalizer(Shield(backend).backend)

    def cut(self, texts: Sequence[str]) -> list[list[str]]:
        """The pieces of each text; what no piece spells stands as it is, a run of it as one."""
        cleaned = [self._spaces.normalize_str(self._map.apply(text)) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        return [self._named(text, encoding) for text, encoding in zip(cleaned, encodings, strict=True)]

    def _named(self, text: str, encoding: tokenizers.Encoding) -> list[str]:
        found = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        return [text[start:end] if one == self._unknown else token for one, token, (start, end) in found]


def _without_normalizer(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.normalizer = None  # pyright: ignore[reportAttributeAccessIssue] (the stubs lack what the library takes)
    return backend
