"""Byte-level BPE (GPT-2, 2019), its pre-tokenizers (rules that split text into words), and CLIP's variant of it.

Pre-tokenizers have the names used in GGUF files (`tokenizer.ggml.pre`). Model families with the same rule share an
entry.

CLIP's tokenizer (Radford et al., 2021) lowercases, then merges bytes inside words that end with a mark. This module
reads OpenAI's file of merges, and learns new merges. Files written by transformers are ordinary tokenizer.json files.
The rules are those of transformers. OpenAI's code first repairs text with the package ftfy and decodes HTML entities
(&amp;), which does not change clean captions.
"""

import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from keifu.data.tokenizers.stopping import left_by_a_stop
from keifu.data.tokenizers.streaming import byte_alphabet
from keifu.data.tokenizers.tokenizer import BackendWithRoles, Tokenizer
from keifu.errors import UserError, require_known
from keifu.untrusted import plain_file

Merges = Iterable[tuple[str, str]]  # pairs of tokens, in the order in which they are merged
# GPT-2: English contractions; letters, digits or signs after an optional space; white space (Radford et al., 2019).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4 and later: contractions in upper or lower case, one sign may begin a word, line breaks join preceding signs.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"|\p{N}" + _REST
# o200k and Tekken: a word ends where a capital follows a lower-case letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _SLASHES
GPT4O = f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}" + r"|\p{N}{1,3}" + _SLASHES

# Each pre-tokenizer is a list of patterns; each splits the results of the one before. The first name of a row is
# canonical.
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
# Families that skip the merges if a whole word is a token (`ignore_merges` of their tokenizer.json).
WHOLE_WORDS = (LLAMA3, GPT4O, TEKKEN)


def pre_tokenizer(cut: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of this name. It splits text into words and writes their bytes in the byte alphabet.

    Raises `UserError` for an unknown name.
    """
    require_known("way of cutting text (tokenizer.ggml.pre)", cut, CUTS)
    patterns = CUTS[cut]
    if patterns == [GPT2]:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if patterns == [r"\p{N}", GPT2]:
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([digits, words])
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def cut_of(backend: tokenizers.Tokenizer) -> str | None:
    """Return the name of this tokenizer's pre-tokenizer in GGUF files; None if it is unknown."""
    if backend.pre_tokenizer is None:
        return None
    mine = _shape(backend.pre_tokenizer)
    return next((names.split()[0] for names, _ in _ROWS if _shape(pre_tokenizer(names.split()[0])) == mine), None)


def _shape(cutter: pre_tokenizers.PreTokenizer) -> str:
    """Describe a pre-tokenizer without properties that do not affect tokens: offsets, and a sequence of a single
    step."""
    described = json.loads(cutter.__getstate__())
    steps = described.get("pretokenizers", [described])
    return json.dumps([{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps], sort_keys=True)


def byte_level_backend(vocabulary: Mapping[str, int], merges: Merges, cut: str = "gpt-2") -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer from its vocabulary (spelled in the byte alphabet) and its merges, in order."""
    whole_words = CUTS.get(cut, [""])[0] in WHOLE_WORDS
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), list(merges), ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer(cut)
    backend.decoder = decoders.ByteLevel()
    return backend


def first_merges(tokenizer: Tokenizer, count: int, uses: Mapping[int, int] | None = None) -> set[str]:
    """Return the tokens of a smaller byte-level BPE: bytes, results of the first `count` merges, all added tokens, and
    those of the chat template, each with the tokens it is merged from.

    uses: frequency of each token id in a text; if given, merges for the most frequent tokens come first.
    """
    model, vocabulary, uses = _byte_level(tokenizer), tokenizer.backend.get_vocab(), uses or {}
    if count > len(model["merges"]):
        raise UserError(f"This tokenizer has {len(model['merges']):,} merges, not {count:,}: choose a smaller number.")
    parts = {"".join(pair): pair for pair in reversed(model["merges"])}
    ids = [*tokenizer.backend.get_added_tokens_decoder(), *tokenizer.stop_ids]
    if tokenizer.chat_template is not None:
        ids += tokenizer.render_chat([{"role": role, "content": ""} for role in ("user", "assistant")])
    results = sorted(map("".join, model["merges"]), key=lambda token: -uses.get(vocabulary[token], 0))
    kept_tokens, n_merges = set[str](), 0
    for token in results:
        if n_merges >= count:
            break
        n_merges += _add(token, parts, kept_tokens)
    for token in (*(model["vocab"].keys() - parts.keys()), *filter(None, map(tokenizer.backend.id_to_token, ids))):
        _add(token, parts, kept_tokens)
    return kept_tokens


def _add(token: str, parts: Mapping[str, Sequence[str]], kept_tokens: set[str]) -> int:
    """Add a token to `kept_tokens`, with the tokens it is merged from. Return the number of merges that were added."""
    pending, n_merges = [token], 0
    while pending:
        if (token := pending.pop()) not in kept_tokens:
            kept_tokens.add(token)
            n_merges += token in parts
            pending += parts.get(token, [])
    return n_merges


def keep_tokens(tokenizer: Tokenizer, kept_tokens: Collection[str]) -> tuple[Tokenizer, list[int]]:
    """Return a byte-level BPE with only these tokens, and their former ids. The order of tokens is kept. The result
    encodes every text that the tokenizer can encode; merges into missing tokens are dropped."""
    _byte_level(tokenizer)
    description, kept_tokens = tokenizer.description(), {*kept_tokens}
    vocabulary = tokenizer.backend.get_vocab()
    ids = sorted(vocabulary[token] for token in kept_tokens)
    number = {before: new for new, before in enumerate(ids)}
    needed_tokens = map(
        tokenizer.backend.id_to_token, (*tokenizer.backend.get_added_tokens_decoder(), *tokenizer.stop_ids)
    )
    if lacking := {*filter(None, needed_tokens)} - kept_tokens:
        raise UserError(f"A tokenizer cannot be cut to tokens without its {min(lacking)!r}: keep it.")
    model, around = description["model"], description["post_processor"] or {}
    model["vocab"] = {token: number[before] for token, before in model["vocab"].items() if token in kept_tokens}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept_tokens]
    for step in (around, *around.get("processors", [])):
        if {"sep", "cls"} & step.keys():
            raise UserError(f"A tokenizer that adds {step['type']} around a text cannot be cut: choose another model.")
        for token in step.get("special_tokens", {}).values():
            token["ids"] = [number[before] for before in token["ids"]]
    for token in description["added_tokens"]:
        token["id"] = number[token["id"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    ends = [number[before] for before in tokenizer.stop_ids]
    how = {key: value for key, value in tokenizer.generation_config.items() if not key.endswith(("_id", "_ids"))}
    return tokenizer.replace(backend=backend, stop_ids=ends, generation_config=how), ids


def ids_of_cut(tokenizer: Tokenizer, cut: Tokenizer) -> list[int] | None:
    """Return the ids in `tokenizer` of the tokens of `cut`, in order. None if `cut` is not a result of `keep_tokens` on
    it."""
    kept_vocabulary = cut.backend.get_vocab()
    if (
        not isinstance(tokenizer.backend.model, models.BPE)
        or not kept_vocabulary.keys() < tokenizer.backend.get_vocab().keys()
    ):
        return None
    try:
        again, ids = keep_tokens(tokenizer, kept_vocabulary)
    except UserError:  # the tokenizer cannot be reduced to these tokens
        return None
    same = again.backend.get_vocab() == kept_vocabulary and again.description()["model"] == cut.description()["model"]
    return ids if same else None


def _byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the description of a tokenizer's merges. Raises `UserError` if it is not a byte-level BPE."""
    model, decoder = tokenizer.backend.model, tokenizer.backend.decoder
    if not isinstance(model, models.BPE) or not isinstance(decoder, decoders.ByteLevel) or model.end_of_word_suffix:
        raise UserError("Only a byte-level BPE can be cut to its first merges, and this tokenizer is none.")
    return tokenizer.description()["model"]


START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
MERGES = 48_894  # number of lines to read after the first; the released code ignores the others
LARGEST = 2**24  # maximal bytes of that file, unpacked; it has 3.2 million
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CHARACTERS = r"[\p{Han}\p{Hiragana}\p{Katakana}ー]"  # Chinese and Japanese, written without spaces


def clip_backend(vocabulary: Mapping[str, int], merges: Merges) -> BackendWithRoles:
    """Build a tokenizer with CLIP's rules from a vocabulary, spelled in the byte alphabet, and its merges, in order."""
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


def clip_merges(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    """Read OpenAI's bpe_simple_vocab_16e6.txt.gz: the first line is a comment, each further line is a merge."""
    try:
        with gzip.open(plain_file(path)) as file:
            lines = file.read(LARGEST).decode().split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} is not a gzip file of merges: {error}.") from error
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
    if len(merges) < len(lines) or not merges:
        raise UserError(f"{path} is not OpenAI's file of merges: each line after the first must be two pieces.")
    return clip_backend(vocabulary_of(merges), merges)


def vocabulary_of(merges: Merges) -> dict[str, int]:
    """Return the token ids that follow from the merges, in this order: bytes, bytes that end a word, merged tokens, two
    end tokens."""
    letters = list(byte_alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer with CLIP's rules and at most `vocab_size` tokens on these texts.

    It always has 514 tokens: 256 bytes, 256 bytes that end a word, and the two end tokens. Chinese and Japanese
    characters are split one by one, as in BERT's multilingual vocabulary, so that no token has two of them. So names
    share tokens, which a few thousand examples suffice to learn.
    """
    fixed = len(vocabulary_of([]))
    if vocab_size < fixed:
        raise UserError(f"vocab_size={vocab_size} is too small: CLIP's rules need at least {fixed} tokens.")
    backend, _ = clip_backend(vocabulary_of([]), [])
    single = pre_tokenizers.Split(Regex(CHARACTERS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([single, backend.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + fixed, min_frequency=2, show_progress=False, end_of_word_suffix=WORD_END,
        initial_alphabet=list(byte_alphabet()),
        special_tokens=[letter + WORD_END for letter in byte_alphabet()],  # otherwise their order would be random
    )  # fmt: skip
    left_by_a_stop(lambda: backend.train_from_iterator(texts, trainer))
    merges = json.loads(backend.to_str())["model"]["merges"]
    merged = dict.fromkeys(
        (left, end)
        for left, right in merges
        for end in ([right, right.removesuffix(WORD_END)] if (left + right)[0] > "\x7f" else [right])
    )  # a character may end a word or not
    pairs = list(merged)[: vocab_size - fixed]
    return Tokenizer(*clip_backend(vocabulary_of(pairs), pairs))
