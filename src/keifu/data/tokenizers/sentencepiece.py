"""SentencePiece's `.model` files (Kudo and Richardson, 2018): converted to `tokenizers` objects, or used to split text.

A file is a protocol buffer message. Only the few fields needed for encoding and decoding are read here, because the
`sentencepiece` package gives them only if `protobuf` is installed. The `tokenizers` object encodes like SentencePiece,
with one intended difference: a special token is recognised only where control text is allowed, and the text after it
begins with the space that every text begins with. A second difference: the `tokenizers` library applies a table of
character replacements to whole grapheme clusters, and loses the combining marks of a replaced character. The tables of
SentencePiece's rules NFKC are therefore applied after NFKC itself, which brings several marks of one letter into order,
as SentencePiece does not. A table of one's own is applied as it is. The models of LLaMA and Mistral have no table.

`Pieces` splits text by the `sentencepiece` package. Marian has a separate vocabulary for the ids of pieces, which may
contain pieces unknown to the model, so it needs pieces as text.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from keifu.errors import UserError

SPACE = "▁"  # U+2581, a space in pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces, in the file and in GGUF
UNIGRAM, BPE = 1, 2  # kinds of models
# names of SentencePiece's replacement tables → characters that they keep, unlike NFKC and lower case
RULES = {"nfkc": "", "nmt_nfkc": "～", "nfkc_cf": "İ", "nmt_nfkc_cf": "～İ"}
HIDING = "\ufdd0\ufdd1"  # no characters of any text


@dataclass(frozen=True)
class SentencePiece:
    """Entry of the vocabulary. Its id is its index."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class SentencePieceSettings:
    """Settings of the conversion from text to pieces. The defaults are those of LLaMA's BPE."""

    model: int = BPE
    unknown_id: int = 0
    byte_fallback: bool = True
    dummy_prefix: bool = True  # each text begins with a space
    single_spaces: bool = False  # spaces at the ends are removed, runs become one space
    escape_spaces: bool = True  # a space becomes U+2581
    character_map: bytes = b""  # SentencePiece's compiled table of replacements, such as NFKC
    rule: str = ""  # name of the table


@dataclass
class SentencePieceModel:
    """Content of a file: pieces, settings, and the special tokens' roles as in tokenizer_config.json."""

    pieces: list[SentencePiece]
    settings: SentencePieceSettings
    special: dict[str, str] = field(default_factory=dict)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of the fields of one message. Integers stay integers; other values are bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if (wire := key & 7) not in (0, 1, 2, 5):  # integer, 8 bytes, length and data, 4 bytes
            raise ValueError(f"wire type {wire}")
        size, position = (8, position) if wire == 1 else (4, position) if wire == 5 else _varint(data, position)
        value, position = (size, position) if wire == 0 else (data[position : position + size], position + size)
        if position > len(data):
            raise IndexError("the message ends early")
        yield key >> 3, value


def _piece(message: bytes) -> SentencePiece:
    values = dict(_fields(message))
    (score,) = struct.unpack("<f", bytes(values.get(2, bytes(4))))
    return SentencePiece(bytes(values[1]).decode(), score, int(values.get(3, NORMAL)))


def _roles(trainer: dict[int, int | bytes]) -> dict[str, int]:
    """Return the ids of the special tokens. -1, stored as a 64-bit number, means none."""
    defaults = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    ids = {role: int(trainer.get(number, default)) for role, (number, default) in defaults.items()}
    return {role: position for role, position in ids.items() if 0 <= position < 1 << 31}


def parse(data: bytes, name: str) -> SentencePieceModel:
    """Parse the bytes of a `.model` file. Raises `UserError`, with the file's name, for another type or a truncated
    file."""
    try:
        top = list(_fields(data))
        pieces = [_piece(value) for number, value in top if number == 1 and isinstance(value, bytes)]
        messages = {n: dict(_fields(value)) for n, value in top if n in (2, 3) and isinstance(value, bytes)}
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{name} is not a SentencePiece model, or it is torn ({error}).{_hint(data)}") from error
    trainer, normalizer = messages.get(2, {}), messages.get(3, {})
    if not pieces:
        raise UserError(f"{name} is not a SentencePiece model: it holds no pieces.{_hint(data)}")
    algorithm = int(trainer.get(3, UNIGRAM))
    if algorithm not in (UNIGRAM, BPE) or trainer.get(24):
        what = {3: "a word model", 4: "a character model"}.get(algorithm, "one that puts spaces at the ends of words")
        raise UserError(f"{name} is {what}; keifu reads SentencePiece's BPE and Unigram models.")
    roles = _roles(trainer)
    check_character_map(bytes(normalizer.get(2, b"")), name)
    settings = SentencePieceSettings(
        model=algorithm,
        unknown_id=roles.get("unk_token", 0),
        byte_fallback=bool(trainer.get(35, False)),
        dummy_prefix=bool(normalizer.get(3, True)),
        single_spaces=bool(normalizer.get(4, True)),
        escape_spaces=bool(normalizer.get(5, True)),
        character_map=bytes(normalizer.get(2, b"")),
        rule=bytes(normalizer.get(1, b"")).decode(errors="replace"),
    )
    special = {role: pieces[position].text for role, position in roles.items() if position < len(pieces)}
    return SentencePieceModel(pieces, settings, special)


def check_character_map(table: bytes, name: str) -> None:
    """Raise `UserError` for a replacement table that would crash the tokenizers library.

    The table is a tree (a double array with 32 bits per unit, the highest bit for leaves) whose leaves are positions in
    the text after it.
    """
    size = int.from_bytes(table[:4], "little")
    if table and (len(table) < 4 or size % 4 or 4 + size > len(table)):
        claims = f"{len(table):,} bytes, of which its tree claims {size:,}"
        raise UserError(f"{name} has a damaged table of character replacements: {claims}.")
    try:
        table[4 + size :].decode()
    except UnicodeDecodeError:
        raise UserError(f"{name} has a damaged table of character replacements: they are not UTF-8.") from None
    if table:
        units = np.frombuffer(table, "<u4", size // 4, 4)
        if not _leads_into(units, np.frombuffer(table[4 + size :], np.uint8)):
            raise UserError(f"{name} has a damaged table of character replacements: its tree leads outside its text.")


def _leads_into(units: np.ndarray, text: np.ndarray) -> bool:
    """Return whether every lookup in a double array stays inside it, and every leaf is the position of a character of
    `text`.

    The lowest bits of a unit are the byte that leads to it. Bit 8 says whether it has a leaf; bits 10 and up are an
    offset, which bit 9 multiplies by 256. Position xor offset is the leaf's position; that xor a byte is a child's
    position (format of darts-clone).
    """
    labels = np.arange(1, 256)
    reached = np.zeros(len(units), bool)
    offsets = _offsets(units[:1])
    while len(offsets):
        if (offsets | 255).max() >= len(units):
            return False
        reached[offsets] = True
        children = offsets[:, None] ^ labels
        children = children[(units[children] & 0x800000FF) == labels]
        following = children ^ _offsets(units[children])
        leaves = following[units[children] >> 8 & 1 == 1]
        if len(leaves):
            if leaves.max() >= len(units):
                return False
            positions = units[leaves] & 0x7FFFFFFF
            if positions.max() >= len(text) or (text[positions] & 0xC0 == 0x80).any():
                return False
        offsets = np.unique(following)
        offsets = offsets[~reached[np.minimum(offsets, len(units) - 1)] | (offsets >= len(units))]
    return True


def _offsets(units: np.ndarray) -> np.ndarray:
    return (units >> 10).astype(np.int64) << ((units & 1 << 9) >> 6)


def _hint(data: bytes) -> str:
    tiktoken = re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data)
    return " It looks like tiktoken's list of tokens: give the tokenizer.json instead." if tiktoken else ""


def merges_by_score(pieces: Sequence[SentencePiece]) -> list[tuple[str, str]]:
    """Return SentencePiece's BPE merges, the pieces with the highest scores first."""
    mergeable = {piece.text: (-piece.score, position) for position, piece in enumerate(pieces) if piece.kind == NORMAL}
    ranked = [
        (mergeable[text], text[:cut], text[cut:])
        for text in mergeable
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
    return [(left, right) for _, left, right in sorted(ranked)]


def numbered(tokens: Iterable[str], where: str) -> dict[str, int]:
    """Return the id of each token, which is its index. Raises `UserError` for a token that occurs twice."""
    ids: dict[str, int] = {}
    for position, token in enumerate(tokens):
        if ids.setdefault(token, position) != position:
            raise UserError(f"{where} has the token {token!r} twice, with the ids {ids[token]} and {position}.")
    return ids


def backend_from_pieces(pieces: Sequence[SentencePiece], settings: SentencePieceSettings) -> tokenizers.Tokenizer:
    """Build a `tokenizers` object that encodes and decodes with these pieces like SentencePiece."""
    texts = numbered((piece.text for piece in pieces), "The vocabulary")
    if settings.unknown_id >= len(pieces):
        raise UserError(f"The unknown piece has the id {settings.unknown_id}, but there are {len(pieces)} pieces.")
    defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    if settings.model == BPE:
        model = models.BPE(
            texts, merges_by_score(pieces), unk_token=pieces[settings.unknown_id].text, fuse_unk=True,
            byte_fallback=settings.byte_fallback, ignore_merges=bool(defined),
        )  # fmt: skip
    else:
        model = models.Unigram([(p.text, p.score) for p in pieces], settings.unknown_id, settings.byte_fallback)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(_normalizers(settings))
    cuts = [_user_defined_splitter(defined)] if defined else []
    if settings.model == UNIGRAM and settings.byte_fallback:
        cuts.append(no_byte_names())
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    backend.decoder = decoder(settings.byte_fallback, settings.dummy_prefix)
    special = (piece.text for piece in pieces if piece.kind in (CONTROL, UNKNOWN))
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return backend


def _user_defined_splitter(pieces: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Split the user-defined pieces off the text, the longest first. SentencePiece does this before other steps."""
    pattern = "|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def no_byte_names() -> pre_tokenizers.PreTokenizer:
    """Split text such as "<0x41>" after its "<", because a Unigram model would otherwise use the byte token."""
    return pre_tokenizers.Split(tokenizers.Regex(r"<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")


def _normalizers(settings: SentencePieceSettings) -> list[normalizers.Normalizer]:
    """Return the steps in SentencePiece's order: replacement table, spaces at the ends and runs of spaces, first space,
    escape."""
    steps: list[normalizers.Normalizer] = []
    if settings.character_map:
        steps += _tabled(settings)
    if settings.single_spaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(r" {2,}"), " "))
    space = SPACE if settings.escape_spaces else " "
    if settings.dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if settings.escape_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _tabled(settings: SentencePieceSettings) -> list[normalizers.Normalizer]:
    """Return the steps of the replacement table.

    `Precompiled` looks up a whole grapheme cluster, and replaces it by the entry of its first character: the mark of
    "？" with U+0349 would be lost, and か with U+3099 would not become が. So NFKC comes first, and lower case before a
    folding table: it then finds almost nothing to replace. Characters that the table keeps are hidden from these steps.
    """
    table = normalizers.Precompiled(settings.character_map)
    if settings.rule not in RULES:
        return [table]
    hidden = list(zip(RULES[settings.rule], HIDING, strict=False))
    first = [normalizers.NFKC(), *([normalizers.Lowercase()] if settings.rule.endswith("_cf") else [])]
    hide = [normalizers.Replace(character, mark) for character, mark in hidden]
    return [*hide, *first, table, *[normalizers.Replace(mark, character) for character, mark in hidden]]


def decoder(byte_fallback: bool, dummy_prefix: bool) -> decoders.Decoder:
    """Return the decoder of pieces: U+2581 becomes a space, and byte pieces become bytes. If encoding added a space at
    the start, it is removed."""
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


class Pieces:
    """SentencePiece model that splits text into pieces. data: content of its file. name: of the file, for errors."""

    def __init__(self, data: bytes, name: str):
        from sentencepiece import SentencePieceProcessor

        self.data, self.settings = data, parse(data, name).settings
        self._processor = SentencePieceProcessor(model_proto=data)

    def cut(self, texts: Sequence[str]) -> list[list[str]]:
        """Split each text into pieces. A run of characters that is not in the vocabulary stays one piece."""
        return self._processor.encode(list(texts), out_type=str)
