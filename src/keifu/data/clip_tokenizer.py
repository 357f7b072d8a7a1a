"""CLIP's tokenizer (Radford et al., 2021): lower case, then merges of bytes inside words that end with a mark.

It knows OpenAI's own file of merges, and learns others; what transformers writes is a tokenizer.json like any other.
The rules here are transformers'. OpenAI's code moreover repairs text with the package ftfy and reads HTML entities
(&amp;) before, which changes no clean caption.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from keifu.data.streaming import byte_alphabet
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
MERGES = 48_894  # of the file's lines after the first; the released code leaves the others out
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
Made = tuple[tokenizers.Tokenizer, dict[str, str]]


def clip_backend(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> Made:
    """CLIP's rules around a vocabulary, spelled in the byte alphabet, and its merges, in order."""
    merging = models.BPE(dict(vocabulary), list(merges), unk_token=END, end_of_word_suffix=WORD_END)
    backend = tokenizers.Tokenizer(merging)
    space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    ends = [(token, vocabulary[token]) for token in (END, START)]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return backend, dict(ROLES)


def clip_merges(path: Path, config: Mapping[str, Any]) -> Made:
    """OpenAI's bpe_simple_vocab_16e6.txt.gz: a line about itself, then a merge a line."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a gzip file of merges: {error}.") from error
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    if len(merges) < len(lines) or not merges:
        raise UserError(f"{path} is not OpenAI's file of merges: each line after the first must be two pieces.")
    return clip_backend(vocabulary_of(merges), merges)


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The ids that follow from the merges: bytes, bytes that end a word, what each merge makes, the two ends."""
    letters = list(byte_alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with CLIP's rules and at most `vocab_size` tokens, whose merges are learned from these texts.

    514 tokens are there in any case: 256 bytes, 256 that end a word, and the two ends.
    """
    fixed = len(vocabulary_of([]))
    if vocab_size < fixed:
        raise UserError(f"vocab_size={vocab_size} is too small: CLIP's rules need at least {fixed} tokens.")
    backend, _ = clip_backend(vocabulary_of([]), [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + fixed, min_frequency=2, show_progress=False, end_of_word_suffix=WORD_END,
        initial_alphabet=list(byte_alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    pairs = [(left, right) for left, right in merges[: vocab_size - fixed]]
    return Tokenizer(*clip_backend(vocabulary_of(pairs), pairs))
