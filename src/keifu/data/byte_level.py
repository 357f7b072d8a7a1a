"""Byte-level BPE (GPT-2, 2019) and the ways of cutting text into words before it; knows no file format.

Cuts have the names that GGUF files give them (`tokenizer.ggml.pre`); families that cut alike share an entry.
"""

import json
from collections.abc import Iterable, Mapping

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from keifu.errors import unknown

# GPT-2: English contractions, letters, digits or signs with a space before them, white space (Radford et al., 2019).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4 and after: contractions in either case, a sign may join a word, line ends join the signs before them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"|\p{N}" + _REST
# o200k and Tekken: words part where a capital follows a small letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _SLASHES
GPT4O = f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}" + r"|\p{N}{1,3}" + _SLASHES

# Each cut is a list of patterns, each cutting the pieces of the one before; the first name of a row is canonical.
_ROWS: list[tuple[str, list[str]]] = [
    ("gpt-2 mpt olmo jais trillion granite-docling phi-2 roberta-bpe", [GPT2]),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", [r"\p{N}", GPT2]),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe", [LLAMA3]),
    ("qwen2 stablelm2 hunyuan deepseek-r1-qwen megrez", [QWEN2]),
    ("gpt-4o llama4", [GPT4O]),
    ("tekken", [TEKKEN]),
    ("falcon", [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"]),
    ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
]
CUTS = {name: patterns for names, patterns in _ROWS for name in names.split()}
# Families whose words that are tokens as they stand skip the merges (`ignore_merges` of their tokenizer.json).
WHOLE_WORDS = (LLAMA3, GPT4O, TEKKEN)


def pre_tokenizer(cut: str) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words and spells them in the byte alphabet. An unknown cut is a `UserError`."""
    if cut not in CUTS:
        raise unknown("way of cutting text (tokenizer.ggml.pre)", cut, CUTS)
    patterns = CUTS[cut]
    if patterns == [GPT2]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if patterns == [r"\p{N}", GPT2]:
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([digits, words])
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def cut_of(backend: tokenizers.Tokenizer) -> str | None:
    """The canonical name of the way this tokenizer cuts text; None if it has none of the known ways."""
    if backend.pre_tokenizer is None:
        return None
    mine = _shape(backend.pre_tokenizer)
    return next((names.split()[0] for names, _ in _ROWS if _shape(pre_tokenizer(names.split()[0])) == mine), None)


def _shape(cutter: pre_tokenizers.PreTokenizer) -> str:
    """Its description without what changes no token: offsets, and a sequence of one."""
    described = json.loads(cutter.__getstate__())
    steps = described.get("pretokenizers", [described])
    return json.dumps([{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps], sort_keys=True)


def byte_level_backend(
    vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], cut: str = "gpt-2"
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer from its vocabulary (spelled in the byte alphabet) and its merges, in order."""
    whole_words = CUTS.get(cut, [""])[0] in WHOLE_WORDS
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), list(merges), ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer(cut)
    backend.decoder = decoders.ByteLevel()
    return backend
