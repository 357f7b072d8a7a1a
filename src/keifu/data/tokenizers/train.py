"""Training of tokenizers: byte-level BPE, WordPiece, Unigram, CLIP's BPE and single characters."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from keifu.data.tokenizers import sentencepiece as sp
from keifu.data.tokenizers.bpe import byte_level_backend
from keifu.data.tokenizers.formats import BERT_ROLES, wordpiece_backend
from keifu.data.tokenizers.stopping import left_by_a_stop
from keifu.data.tokenizers.streaming import byte_alphabet
from keifu.data.tokenizers.tokenizer import BackendWithRoles, Tokenizer, put_around_text
from keifu.errors import UserError, require_known

END_OF_TEXT = "<|endoftext|>"
USUAL: Any = {"min_frequency": 2, "show_progress": False}  # options of the trainers of BPE and WordPiece


@dataclass
class _Training:
    """Arguments of `train_tokenizer`. Iterating yields the texts that are not empty, and counts their characters."""

    texts: Iterable[str]
    vocab_size: int
    special_tokens: list[str]
    split_digits: bool
    lowercase: bool
    characters: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if text:
                self.characters.update(text)
                yield text

    def check(self) -> None:
        """Raise `UserError` if all texts were empty. Called after they were read."""
        if not self.characters:
            raise UserError("There is no text to learn a tokenizer from: every text given is empty.")

    def at_least(self, kind: str, least_tokens: int, why: str) -> None:
        """Raise `UserError` if the vocabulary is smaller than this kind of tokenizer needs for any text."""
        if self.vocab_size < least_tokens:
            what = f"vocab_size={self.vocab_size} is too small"
            raise UserError(f"{what}: {kind} needs at least {least_tokens} tokens ({why}).")

    def learn(self, backend: tokenizers.Tokenizer, trainer: trainers.Trainer) -> None:
        """Train the tokenizer on the texts."""
        try:
            left_by_a_stop(lambda: backend.train_from_iterator(self, trainer))
        except (UserError, OSError, UnicodeError):
            raise  # an error of the texts, not of the trainer
        except Exception as error:  # `tokenizers` raises bare Exceptions
            if self.characters:
                raise UserError(f"No tokenizer could be learned from these texts: {error}.") from error
        self.check()


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    lowercase: bool = False,
) -> Tokenizer:
    """Train a tokenizer on texts, which are read once, or for wordpiece twice (an iterator is stored in memory).

    kind: "bpe" (byte-level, GPT-2), "wordpiece" (BERT), "unigram" (SentencePiece's, with bytes for rare characters) or
        "characters" (every character of the texts, as in nanoGPT's example; any other character is an error).
    vocab_size: maximal number of tokens, with special ones and bytes. Little text can give fewer.
    special_tokens: control tokens beyond those of the kind: <|endoftext|> for bpe; <unk>, <s>, </s> for unigram;
        [PAD], [UNK], [CLS], [SEP], [MASK] for wordpiece; none for characters.
    split_digits: bpe only: every digit is a separate word, so that numbers are encoded digit by digit.
    lowercase: wordpiece only: text is converted to lower case without accents, as in "uncased" BERT.

    The same texts give the same tokenizer, except for unigram, which may choose or number tokens with equal counts
    differently (the `tokenizers` library iterates over its counts in random order). Raises `UserError` if all texts are
    empty, or `vocab_size` is too small for the kind and the texts.
    """
    require_known("kind of tokenizer", kind, KINDS)
    for value, owner, what in ((split_digits, "bpe", "split_digits"), (lowercase, "wordpiece", "lowercase")):
        if value and kind != owner:
            raise UserError(f"{what} belongs to the kind {owner}, not to {kind}: leave it out.")
    texts = list(texts) if kind == "wordpiece" and isinstance(texts, Iterator) else texts
    backend, special = KINDS[kind](_Training(texts, vocab_size, list(special_tokens), split_digits, lowercase))
    if (least_tokens := backend.get_vocab_size()) > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {kind} needs at least {least_tokens} tokens for these texts."
        )
    return Tokenizer(backend, special)


def _bpe(training: _Training) -> BackendWithRoles:
    specials = _with_special_tokens([END_OF_TEXT, *training.special_tokens])
    training.at_least("bpe", 256 + len(specials), f"256 bytes and {len(specials)} special")
    backend = byte_level_backend({}, [], "smollm" if training.split_digits else "gpt-2")
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size, special_tokens=specials, initial_alphabet=list(byte_alphabet()), **USUAL
    )
    training.learn(backend, trainer)
    return backend, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def _wordpiece(training: _Training) -> BackendWithRoles:
    specials = sorted(BERT_ROLES.values(), key=lambda token: token != "[PAD]")  # in BERT the id of padding is 0
    backend, _ = wordpiece_backend({}, training.lowercase, strip_accents=None)
    limit = max(1000, training.vocab_size // 3)  # rarer characters become [UNK], as in BERT
    first, later = _alphabet(backend, training, limit)
    numbered = _with_special_tokens([*specials, *training.special_tokens, *later])  # ids are in this order
    alphabet: Any = {"initial_alphabet": first, "limit_alphabet": len(first)}
    trainer = trainers.WordPieceTrainer(vocab_size=training.vocab_size, special_tokens=numbered, **alphabet, **USUAL)
    training.learn(backend, trainer)
    learned, roles = wordpiece_backend(backend.get_vocab(), training.lowercase, strip_accents=None)
    learned.add_special_tokens(_with_special_tokens(training.special_tokens))
    return learned, roles


def _alphabet(backend: tokenizers.Tokenizer, training: _Training, limit: int) -> tuple[list[str], list[str]]:
    """Return the most frequent characters, and those that continue words as tokens (`##a`), each in a fixed order.

    The library would number the latter in random order, and it merges pairs of equal counts by number.
    """
    training.learn(backend, trainers.WordPieceTrainer(vocab_size=1, show_progress=False, special_tokens=[]))
    vocabulary = backend.get_vocab()
    first = sorted((one for one in vocabulary if len(one) == 1), key=lambda one: (-training.characters[one], one))
    return first[:limit], [f"##{one}" for one in sorted(first[:limit]) if f"##{one}" in vocabulary]


def _unigram(training: _Training) -> BackendWithRoles:
    specials = ["<unk>", "<s>", "</s>", *training.special_tokens]
    reserved = len(specials) + 256
    training.at_least("unigram", reserved + 1, f"{len(specials)} special, 256 bytes and the characters")
    backend = tokenizers.Tokenizer(models.Unigram())
    _prepare_unigram(backend)
    size = training.vocab_size - 256
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, special_tokens=specials, unk_token="<unk>")
    try:
        training.learn(backend, trainer)
    except UserError as error:
        if "not large enough" in str(error):  # the trainer keeps every character
            training.at_least("unigram", reserved + len(training.characters), "special, bytes and all the characters")
        raise
    learned = json.loads(backend.to_str())["model"]["vocab"][len(specials) :]
    pieces = [sp.SentencePiece(token, 0.0, sp.UNKNOWN if token == "<unk>" else sp.CONTROL) for token in specials]
    pieces += [sp.SentencePiece(f"<0x{byte:02X}>", 0.0, sp.BYTE) for byte in range(256)]
    pieces += [sp.SentencePiece(token, score) for token, score in learned]
    full_backend = sp.backend_from_pieces(pieces, sp.SentencePieceSettings(model=sp.UNIGRAM))
    _prepare_unigram(full_backend)
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    put_around_text(full_backend, roles, bos=True, eos=False)
    return full_backend, roles


def _prepare_unigram(backend: tokenizers.Tokenizer) -> None:
    """Set NFKC, a space before each text, and pieces that do not extend over the start of a word. Words are not
    segmented further."""
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend(sp.SPACE)])
    words = pre_tokenizers.Metaspace(sp.SPACE, prepend_scheme="never", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, sp.no_byte_names()])


def _characters(training: _Training) -> BackendWithRoles:
    for _ in training:
        continue
    training.check()
    vocabulary = {
        token: number for number, token in enumerate([*training.special_tokens, *sorted(training.characters)])
    }
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.FixedLength(1)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(_with_special_tokens(training.special_tokens))
    return backend, {}


def _with_special_tokens(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


KINDS: dict[str, Callable[[_Training], BackendWithRoles]] = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "characters": _characters,
}
