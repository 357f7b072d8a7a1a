"""Tokenizers with a source and a target side: Marian's in Hugging Face's format, and any pair of tokenizers.

Marian: source.spm splits source text, target.spm splits target text, and vocab.json maps the pieces of both to ids.
With target_vocab.json each language has separate ids.

Pair of tokenizers: a directory has the source side in the usual files. The target side is in target_tokenizer.json,
with the tokens of its roles under "target" in tokenizer_config.json.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import tokenizers
from tokenizers import AddedToken, models

from keifu.data.tokenizers import formats
from keifu.data.tokenizers.sentencepiece import Pieces, decoder
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, unknown
from keifu.files import hash_of, write_atomic
from keifu.untrusted import plain_file

SOURCE_TOKENIZER, TARGET_TOKENIZER = "tokenizer.json", "target_tokenizer.json"
SOURCE, TARGET, VOCABULARY, TARGET_VOCABULARY = "source.spm", "target.spm", "vocab.json", "target_vocab.json"
LANGUAGE = re.compile(r">>.*?<<", re.DOTALL)  # at the start of a text: target language of a multilingual model
ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
Side = TypeVar("Side", bound=Tokenizer)


class TwoSidedTokenizer(Tokenizer, Generic[Side]):
    """Tokenizer that encodes source text with one vocabulary, and decodes (and encodes target text) with another.

    The BOS, EOS and padding ids are those of the target side. `vocab_size` is the source side's. For training,
    `encode_target_batch` encodes target text.
    """

    PARTS = "source", "target"

    def __init__(self, source: Side, target: Side):
        super().__init__(*(vars(target)[part] for part in Tokenizer.PARTS))
        self.source, self.target, self.vocab_size = source, target, source.vocab_size

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """Encode each source text."""
        return self.source.encode_batch(texts, special, allow_special)

    def encode_target_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encode each target text."""
        return self.target.encode_batch(texts, special)

    def replace(self, **parts: Any) -> "TwoSidedTokenizer":
        """Return a copy with some arguments of the target side changed."""
        target: Any = self.target.replace(**parts)
        return type(self)(self.source, target)

    @property
    def sides(self) -> tuple[Tokenizer, Tokenizer]:
        return self.source, self.target

    @property
    def target_vocab_size(self) -> int | None:
        return self.target.vocab_size

    def save(self, directory: str | Path) -> None:
        """Write the files of both sides."""
        directory = Path(directory)
        self.source.save(directory)
        write_atomic(directory / TARGET_TOKENIZER, self.target.backend.to_str(pretty=True))
        settings = directory / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) | {"target": self.target.special}
        write_atomic(settings, json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of both sides. Equal fingerprints mean equal ids."""
        return hash_of([f"{self.source.fingerprint} {self.target.fingerprint}"])


def read_two_sided(directory: Path) -> TwoSidedTokenizer:
    """Load the tokenizer of a directory that has a target_tokenizer.json."""
    config = formats.settings_beside(directory)
    sides = (directory / SOURCE_TOKENIZER, config), (directory / TARGET_TOKENIZER, config.get("target", {}))
    sides_read = ((formats.reader(path)(path, roles), directory, roles) for path, roles in sides)
    return TwoSidedTokenizer(*(formats.finish_backend(*side) for side in sides_read))


class MarianSide(Tokenizer):
    """One language of a Marian tokenizer: `pieces` splits a text, and the backend maps pieces to ids and joins them.

    `encode(text, special=True)` ends with the end-of-sentence token. A text may begin with `>>code<<`, its target
    language.
    """

    PARTS = "pieces", *Tokenizer.PARTS

    def __init__(self, pieces: Pieces, *parts: Any, **keywords: Any):
        super().__init__(*parts, **keywords)
        self.pieces, self.vocabulary = pieces, self.backend.get_vocab()

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """Encode each text."""
        end = [self.special["eos_token"]] if special else []
        pattern = re.compile("(" + "|".join(map(re.escape, self.special.values())) + ")")
        parts = [pattern.split(text) if allow_special else [text] for text in texts]
        cut = iter(self._cut([part for text in parts for part in text[::2]]))
        unknown_id = self.vocabulary[self.special["unk_token"]]
        rows = [[piece for n, part in enumerate(text) for piece in ([part] if n % 2 else next(cut))] for text in parts]
        return [[self.vocabulary.get(piece, unknown_id) for piece in [*row, *end]] for row in rows]

    @cached_property
    def language_codes(self) -> list[str]:
        """Tokens `>>code<<` of a model with several target languages."""
        return [token for token in self.vocabulary if LANGUAGE.fullmatch(token)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pieces and the vocabulary."""
        return hash_of([self.pieces.data, super().fingerprint])

    def _cut(self, texts: Sequence[str]) -> list[list[str]]:
        """Split each text into pieces. A language code at its start is one piece."""
        codes = [LANGUAGE.match(text) for text in texts]
        for code in (match[0] for match in codes if match and self.language_codes):  # else it is text
            if " " not in code and code not in self.vocabulary:
                raise unknown("language code", code, self.language_codes)
        uncoded_texts = [text[code.end() :] if code else text for text, code in zip(texts, codes, strict=True)]
        with self._explaining(uncoded_texts):
            cut = self.pieces.cut(uncoded_texts)
        return [[*([code[0]] if code else []), *pieces] for code, pieces in zip(codes, cut, strict=True)]


class MarianTokenizer(TwoSidedTokenizer[MarianSide]):
    """Marian's source and target language. If both have one backend, they share ids."""

    @property
    def target_vocab_size(self) -> int | None:
        return None if self.source.backend is self.target.backend else self.target.vocab_size

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of these target ids, without spaces at its ends."""
        return super().decode(ids, skip_special).strip()

    def save(self, directory: str | Path) -> None:
        """Write the SentencePiece models, the vocabulary and tokenizer_config.json, for AutoTokenizer."""
        directory, separate = Path(directory), self.target_vocab_size is not None
        config = self._config("MarianTokenizer") | {"separate_vocabs": separate}
        sides = {VOCABULARY: self.source} | ({TARGET_VOCABULARY: self.target} if separate else {})
        for name, side in sides.items():
            vocabulary = dict(sorted(side.vocabulary.items(), key=lambda entry: entry[1]))
            write_atomic(directory / name, json.dumps(vocabulary, ensure_ascii=False, indent=2) + "\n")
        write_atomic(directory / SOURCE, self.source.pieces.data)
        write_atomic(directory / TARGET, self.target.pieces.data)
        write_atomic(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of both languages. Equal fingerprints mean equal ids."""
        facts = [self.source.vocabulary, self.target.vocabulary, self.special]
        return hash_of([self.source.pieces.data, self.target.pieces.data, json.dumps(facts, sort_keys=True)])


def read_marian(directory: Path, config: Mapping[str, Any]) -> MarianTokenizer:
    """Load the tokenizer of a directory with a source.spm. Raises `UserError` for a missing file."""
    separate = bool(config.get("separate_vocabs"))
    file_names = [SOURCE, TARGET, VOCABULARY, *([TARGET_VOCABULARY] if separate else [])]
    if missing_files := [name for name in file_names if not (directory / name).exists()]:
        raise UserError(f"{directory} has a Marian tokenizer without {' and '.join(missing_files)}.")
    roles, length = formats.roles_beside(config)
    special = ROLES | {role: token for role, token in roles.items() if role in ROLES}
    source, target = (Pieces(plain_file(directory / name).read_bytes(), name) for name in (SOURCE, TARGET))
    text_files = [source, target] if separate else [source]  # used by transformers to decode too
    backends = [
        _backend(directory / name, special, tokens) for name, tokens in zip(file_names[2:], text_files, strict=True)
    ]
    ends = formats.stop_ids(formats.generation_config(directory))
    sides = zip((source, target), (backends[0], backends[-1]), strict=True)
    return MarianTokenizer(*(MarianSide(*side, special, ends, max_length=length) for side in sides))


def _backend(path: Path, special: Mapping[str, str], pieces: Pieces) -> tokenizers.Tokenizer:
    """Build a backend that only maps pieces to ids and joins them. It never splits text."""
    vocabulary = formats.read_vocabulary(path)
    for role, token in special.items():
        if token not in vocabulary:
            raise UserError(f"{VOCABULARY} has no {token!r}, which tokenizer_config.json names as its {role}.")
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, special["unk_token"]))
    backend.decoder = decoder(pieces.settings.byte_fallback, pieces.settings.dummy_prefix)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    return backend
