"""Tokenizers with a source and a target side: Marian's in Hugging Face's format, and any two tokenizers.

Marian: text of the source language is split by source.spm, text of the target language by target.spm, and vocab.json
maps the pieces of both to ids; with target_vocab.json each language has its own ids.

Two tokenizers: a directory has the source side in the usual files, and the target side beside it in
target_tokenizer.json, with the tokens of its roles under "target" in tokenizer_config.json.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from keifu.data.tokenizers.formats import (
    check_ids,
    finish_backend,
    generation_config,
    reader,
    roles_beside,
    settings_beside,
    stop_ids,
)
from keifu.data.tokenizers.sentencepiece import Pieces, decoder
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, unknown
from keifu.files import plain_file, read_json, write_atomic

SOURCE, TARGET, VOCABULARY, TARGET_VOCABULARY = "source.spm", "target.spm", "vocab.json", "target_vocab.json"
LANGUAGE = re.compile(r">>.*?<<", re.DOTALL)  # at the start of a text: which language a multilingual model is to write
ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Files:
    """The files of a Marian tokenizer; `target_vocabulary` is None where both sides share the ids."""

    source: bytes
    target: bytes
    vocabulary: Mapping[str, int]
    target_vocabulary: Mapping[str, int] | None = None
    special: Mapping[str, str] | None = None  # of each role; Marian's usual ones where None
    stop_ids: tuple[int, ...] = ()
    max_length: int | None = None


class MarianTokenizer(Tokenizer):
    """A `Tokenizer` that encodes the source language and decodes the target language.

    `encode(text, special=True)` ends with the end-of-sentence token, as the model expects of a source. Text of the
    target language, for training, is encoded by `encode_target_batch`.
    """

    def __init__(self, files: Files):
        self.files = files
        self._sides = [Pieces(files.source, SOURCE), Pieces(files.target, TARGET)]
        special = {**ROLES, **(files.special or {})}
        vocabularies = [files.vocabulary, files.target_vocabulary or files.vocabulary]
        for role, token in special.items():
            if any(token not in vocabulary for vocabulary in vocabularies):
                raise UserError(f"{VOCABULARY} has no {token!r}, which tokenizer_config.json names as its {role}.")
        self._vocabularies = vocabularies
        settings = self._sides[1 if files.target_vocabulary else 0].settings  # as transformers decodes, too
        super().__init__(
            _numbered_words(vocabularies[1], special, decoder(settings.byte_fallback, settings.dummy_prefix)),
            special,
            files.stop_ids,
            max_length=files.max_length,
        )
        self.vocab_size = len(files.vocabulary)

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """The ids of each text of the source language; one may begin with `>>code<<`, the language to write."""
        return self._encode(0, texts, special, allow_special)

    def encode_target_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each text of the target language; `special` puts the end-of-sentence token after it."""
        return self._encode(1, texts, special, False)

    @property
    def target_vocab_size(self) -> int | None:
        return None if self.files.target_vocabulary is None else len(self.files.target_vocabulary)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of these ids of the target language, without spaces at its ends."""
        return super().decode(ids, skip_special).strip()

    @cached_property
    def language_codes(self) -> list[str]:
        """The `>>code<<` tokens of a model that translates into several languages."""
        return [token for token in self.files.vocabulary if LANGUAGE.fullmatch(token)]

    def save(self, directory: str | Path) -> None:
        """Writes the SentencePiece models, the vocabulary and tokenizer_config.json, for AutoTokenizer."""
        directory, files = Path(directory), self.files
        config: dict[str, Any] = {"tokenizer_class": "MarianTokenizer", **self.special}
        config |= {"separate_vocabs": files.target_vocabulary is not None, "clean_up_tokenization_spaces": False}
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        written = {VOCABULARY: files.vocabulary, TARGET_VOCABULARY: files.target_vocabulary}
        for name, vocabulary in written.items():
            if vocabulary is not None:
                write_atomic(directory / name, json.dumps(vocabulary, ensure_ascii=False, indent=2) + "\n")
        write_atomic(directory / SOURCE, files.source)
        write_atomic(directory / TARGET, files.target)
        write_atomic(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def __reduce__(self) -> tuple[Any, ...]:
        return MarianTokenizer, (self.files,)

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256(self.files.source + self.files.target)
        digest.update(json.dumps([*self._vocabularies, self.special], sort_keys=True).encode())
        return digest.hexdigest()

    def _encode(self, side: int, texts: Sequence[str], special: bool, allow_special: bool) -> list[list[int]]:
        vocabulary, end = self._vocabularies[side], [self.special["eos_token"]] if special else []
        pattern = re.compile("(" + "|".join(map(re.escape, self.special.values())) + ")")
        parts = [pattern.split(text) if allow_special else [text] for text in texts]
        cut = iter(self._pieces(side, [part for text in parts for part in text[::2]]))
        missing = vocabulary[self.special["unk_token"]]
        rows = [[piece for n, part in enumerate(text) for piece in ([part] if n % 2 else next(cut))] for text in parts]
        return [[vocabulary.get(piece, missing) for piece in [*row, *end]] for row in rows]

    def _pieces(self, side: int, texts: Sequence[str]) -> list[list[str]]:
        """The pieces of each text; a language's code at its start is one."""
        codes = [LANGUAGE.match(text) for text in texts]
        for code in (found[0] for found in codes if found and self.language_codes):  # where there are none, it is text
            if " " not in code and code not in self.files.vocabulary:
                raise unknown("language code", code, self.language_codes)
        rest = [text[code.end() :] if code else text for text, code in zip(texts, codes, strict=True)]
        with self._explaining(rest):
            cut = self._sides[side].cut(rest)
        return [[*([code[0]] if code else []), *pieces] for code, pieces in zip(codes, cut, strict=True)]


def _numbered_words(vocabulary: Mapping[str, int], special: Mapping[str, str], shown: Any) -> tokenizers.Tokenizer:
    """A backend that only maps pieces to ids and joins them: it never splits text."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), special["unk_token"]))
    backend.decoder = shown
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    return backend


def read_marian(directory: Path, config: Mapping[str, Any]) -> MarianTokenizer:
    """The tokenizer of a directory that has a source.spm; a file that is missing is a `UserError`."""
    separate = bool(config.get("separate_vocabs"))
    needed = [SOURCE, TARGET, VOCABULARY, *([TARGET_VOCABULARY] if separate else [])]
    missing = [name for name in needed if not (directory / name).exists()]
    if missing:
        raise UserError(f"{directory} has a Marian tokenizer without {' and '.join(missing)}.")
    vocabularies = [read_json(directory / name) for name in needed[2:]]
    for name, vocabulary in zip(needed[2:], vocabularies, strict=True):
        if not isinstance(vocabulary, dict) or not vocabulary:
            raise UserError(f"{directory / name} holds no vocabulary: it must be a JSON object from tokens to ids.")
        check_ids(vocabulary, directory / name)
    special, length = roles_beside(config)
    return MarianTokenizer(
        Files(
            plain_file(directory / SOURCE).read_bytes(),
            plain_file(directory / TARGET).read_bytes(),
            vocabularies[0],
            vocabularies[1] if separate else None,
            {role: token for role, token in special.items() if role in ROLES},
            tuple(sorted(stop_ids(generation_config(directory)))),
            length,
        )
    )


SOURCE_TOKENIZER, TARGET_TOKENIZER = "tokenizer.json", "target_tokenizer.json"


class TwoSidedTokenizer(Tokenizer):
    """Encodes with one tokenizer and decodes with another; the BOS, EOS and padding ids are those of the second.

    `vocab_size` counts the first one's tokens. Text of the second kind, for training, is encoded by
    `encode_target_batch`.
    """

    def __init__(self, source: Tokenizer, target: Tokenizer):
        super().__init__(target.backend, target.special, target.stop_ids, max_length=target.max_length)
        self.source, self.target, self.vocab_size = source, target, source.vocab_size

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """The ids of each text that the model is to read."""
        return self.source.encode_batch(texts, special, allow_special)

    def encode_target_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each text that the model is to write."""
        return self.target.encode_batch(texts, special)

    def replace(self, **parts: Any) -> "TwoSidedTokenizer":
        """The same tokenizer with some parts of the second one changed."""
        return TwoSidedTokenizer(self.source, self.target.replace(**parts))

    @property
    def sides(self) -> tuple[Tokenizer, Tokenizer]:
        return self.source, self.target

    @property
    def target_vocab_size(self) -> int:
        return self.target.vocab_size

    def save(self, directory: str | Path) -> None:
        """Writes both sides."""
        directory = Path(directory)
        self.source.save(directory)
        write_atomic(directory / TARGET_TOKENIZER, self.target.backend.to_str(pretty=True))
        settings = directory / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) | {"target": self.target.special}
        write_atomic(settings, json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def __reduce__(self) -> tuple[Any, ...]:
        return TwoSidedTokenizer, (self.source, self.target)

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint} {self.target.fingerprint}".encode()).hexdigest()


def read_two_sided(directory: Path) -> TwoSidedTokenizer:
    """The tokenizer of a directory that has a target_tokenizer.json."""
    config = settings_beside(directory)
    sides = (directory / SOURCE_TOKENIZER, config), (directory / TARGET_TOKENIZER, config.get("target", {}))
    source, target = (finish_backend(reader(path)(path, roles), directory, roles) for path, roles in sides)
    return TwoSidedTokenizer(source, target)
