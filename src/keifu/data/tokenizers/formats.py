"""Readers of published tokenizer files: tokenizer.json, vocabulary and merges, WordPiece, SentencePiece.

A reader returns a `tokenizers` object and the roles of its special tokens. The other files of a directory
(tokenizer_config.json, special_tokens_map.json, generation_config.json, chat_template.jinja) are read in the same way
for all.
"""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from keifu.data.tokenizers import bpe
from keifu.data.tokenizers.bpe import byte_level_backend
from keifu.data.tokenizers.sentencepiece import backend_from_pieces, check_character_map, parse
from keifu.data.tokenizers.tokenizer import ROLES, BackendWithRoles, Tokenizer, put_around_text
from keifu.errors import UserError
from keifu.ranges import LARGEST
from keifu.untrusted import check_pattern, plain_file, read_json, read_json_object, read_text

GENERATION_CONFIG = "generation_config.json"
MODEL_TYPES = ("BPE", "WordPiece", "WordLevel", "Unigram")  # models without nested models
WORD_END, UNKNOWN = "</w>", "<unk>"  # as in GPT-1
BERT_ROLES = dict(zip(("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
                      ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))  # fmt: skip


def _tokenizer_json(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    described = read_json(path)
    model = described.get("model") if isinstance(described, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{path} has no model with a vocabulary, so it is not a tokenizer.json.")
    vocabulary = model["vocab"]
    listed = isinstance(vocabulary, list) and all(isinstance(row, list) and row for row in vocabulary)
    if not isinstance(vocabulary, dict) and not listed:
        raise UserError(f"{path} has the vocabulary {vocabulary!r:.60}, which must map tokens to ids.")
    _check_ids(vocabulary if isinstance(vocabulary, dict) else {row[0]: n for n, row in enumerate(vocabulary)}, path)
    if model.get("continuing_subword_prefix"):
        _check_merges(model, path)
    described |= {"truncation": None, "padding": None}  # keifu neither truncates nor pads here
    _check_parts(described, path)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(described)), {}
    except Exception as error:  # `tokenizers` raises bare Exceptions
        _check_merges(model, path)
        library = f"tokenizers {tokenizers.__version__}"
        raise UserError(f"{path} {_damage(described)}: the file is damaged, or newer than {library}.") from error


EMPTY: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {UNKNOWN: 0}, "unk_token": UNKNOWN},
}  # fmt: skip


def _damage(described: Mapping[str, Any]) -> str:
    """Return a phrase with the part of a tokenizer.json that the tokenizers library does not read, and its entry."""
    for name in EMPTY:
        if name not in described or _is_read({**EMPTY, name: described[name]}):
            continue
        part = described[name]
        for entry in part if isinstance(part, dict) else ():
            without = {**part, entry: []} if entry == "merges" else {k: v for k, v in part.items() if k != entry}
            if _is_read({**EMPTY, name: without}):
                return f"has a {name} whose {entry} is {part[entry]!r:.60}"
        if isinstance(part, dict) and "type" in part:
            return f"has a {name} of type {part['type']!r:.60} that cannot be read"
        return f"has the {name} {part!r:.60}"
    return "has parts that do not fit together"


def _is_read(described: Mapping[str, Any]) -> bool:
    try:
        tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception:  # `tokenizers` raises bare Exceptions
        return False
    return True


def _check_merges(model: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` for merges of tokens that do not exist, or that are shorter than the prefix which the
    tokenizers library removes from them."""
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        return
    if not isinstance(model["vocab"], dict) or not isinstance(model.get("continuing_subword_prefix"), str | None):
        return  # the library refuses these
    vocabulary, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        if isinstance(merge, str) and merge.startswith("#version"):
            continue
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise UserError(f"{path} has the merge {merge!r:.60}, which must be two tokens.")
        merged_token = pair[0] + pair[1].removeprefix(prefix)
        if not pair[1].startswith(prefix) or not {*pair, merged_token} <= vocabulary.keys():
            raise UserError(f"{path} merges {' and '.join(map(repr, pair))}, which its vocabulary does not have.")


def _check_parts(described: Any, path: Path) -> None:
    """Raise `UserError` for a replacement table or regular expression that would crash or hang the tokenizers
    library."""
    for part in described.values() if isinstance(described, dict) else described:
        if not isinstance(part, dict | list):
            continue
        if isinstance(part, dict) and isinstance(table := part.get("precompiled_charsmap"), str):
            check_character_map(base64.b64decode(table), str(path))
        if isinstance(part, dict) and isinstance(pattern := part.get("Regex"), str):
            check_pattern(pattern, str(path))
        _check_parts({} if isinstance(part, dict) and part.get("type") in MODEL_TYPES else part, path)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read a JSON object from tokens to ids. Raises `UserError` for anything else."""
    vocabulary = read_json(path)
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise UserError(f"{path} holds no vocabulary: it must be a JSON object from tokens to ids.")
    _check_ids(vocabulary, path)
    return vocabulary


def _check_ids(vocabulary: Mapping[str, Any], path: Path) -> None:
    """Raise `UserError` if two tokens have the same id: one would silently replace the other."""
    owner: dict[int, str] = {}
    for token, number in vocabulary.items():
        valid = type(number) is int and 0 <= number <= LARGEST
        if not valid or owner.setdefault(number, token) != token:
            other = f", as to {owner[number]!r}" if valid else ""
            assignment = f"the id {number!r:.40} to the token {token!r}{other}"
            raise UserError(f"{path} gives {assignment}: ids are whole numbers from 0 on, and unique.")


def _vocabulary_and_merges(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    """Read GPT-1's or GPT-2's two files: vocab.json (or encoder.json) and merges.txt (or vocab.bpe)."""
    vocabulary = read_vocabulary(path)
    beside = [path.with_name(name) for name in ("merges.txt", "vocab.bpe")]
    merges_path = next((other for other in beside if other.exists()), None)
    if merges_path is None:
        raise UserError(f"{path} is a vocabulary without merges: put merges.txt (or vocab.bpe) next to it.")
    lines = read_text(merges_path).split("\n")
    halves = (line.strip("\r").partition(" ") for line in lines[lines[0].startswith("#version") :])
    merges = [(left, right) for left, _, right in halves if right]
    if unspelled := next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None):
        raise UserError(f"{merges_path} merges {' and '.join(map(repr, unspelled))}, which {path.name} does not have.")
    if any(token.endswith(WORD_END) for token in vocabulary):
        return _word_ends(path, vocabulary, merges)
    backend = byte_level_backend(vocabulary, merges)
    if "<|endoftext|>" not in vocabulary:
        return backend, {}
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return backend, {role: "<|endoftext|>" for role in ("bos_token", "eos_token", "unk_token")}


def _word_ends(path: Path, vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> BackendWithRoles:
    """Build a tokenizer from a vocabulary that marks the last piece of a word (Sennrich et al., 2016).

    If it has CLIP's two end tokens, the rules are CLIP's. Otherwise they are GPT-1's (Radford et al., 2018): text is
    split into words as in BERT, in lower case, and merges are inside each word.
    """
    if {bpe.START, bpe.END} <= vocabulary.keys():
        return bpe.clip_backend(vocabulary, merges)
    if UNKNOWN not in vocabulary:
        rules = "so its rules are others, which this file does not tell: use the tokenizer.json of the same model"
        raise UserError(f"{path} marks the ends of words by {WORD_END} as GPT-1 does, but has no {UNKNOWN}, {rules}.")
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), merges, unk_token=UNKNOWN, end_of_word_suffix=WORD_END))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix=WORD_END)
    backend.add_special_tokens([AddedToken(UNKNOWN, special=True)])
    return backend, {"unk_token": UNKNOWN}


def _wordpiece_vocabulary(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    """Read BERT's vocab.txt: one token on each line. Its id is the line number from 0."""
    lines = read_text(path).removesuffix("\n").split("\n")
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.strip("\r")
        if vocabulary.setdefault(token, number) != number:
            lines_seen = f"the lines {vocabulary[token] + 1} and {number + 1}"
            raise UserError(f"{path} has the token {token!r} twice, in {lines_seen}.")
    if BERT_ROLES["unk_token"] not in vocabulary:
        raise UserError(f"{path} has no [UNK], so it is not a WordPiece vocabulary, which has a token on each line.")
    lowercase = bool(config.get("do_lower_case", True))
    accents = config.get("strip_accents")
    return wordpiece_backend(vocabulary, lowercase, accents, bool(config.get("tokenize_chinese_chars", True)))


def wordpiece_backend(
    vocabulary: Mapping[str, int], lowercase: bool, strip_accents: bool | None, split_ideographs: bool = True
) -> BackendWithRoles:
    """Build a tokenizer with BERT's rules: split at spaces and punctuation, then into each word's longest pieces
    (Devlin et al., 2018)."""
    backend = tokenizers.Tokenizer(models.WordPiece(dict(vocabulary), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_ideographs
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    roles = {role: token for role, token in BERT_ROLES.items() if token in vocabulary}
    backend.add_special_tokens([AddedToken(token, special=True) for token in roles.values()])
    if {"cls_token", "sep_token"} <= roles.keys():
        ends = [(roles[role], vocabulary[roles[role]]) for role in ("cls_token", "sep_token")]
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return backend, roles


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    model = parse(plain_file(path).read_bytes(), str(path))
    backend = backend_from_pieces(model.pieces, model.settings)
    put_around_text(backend, model.special, bos=True, eos=False)
    return backend, model.special


def _t5_sentencepiece(path: Path, config: Mapping[str, Any]) -> BackendWithRoles:
    """Read T5's spiece.model. Its sentinels <extra_id_N> follow the pieces, the highest first, and </s> ends a text."""
    model = parse(plain_file(path).read_bytes(), str(path))
    count = config.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 10_000:
        raise UserError(f"tokenizer_config.json gives {count!r} for extra_ids, which must be a number up to 10,000.")
    backend = backend_from_pieces(model.pieces, model.settings)
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in sentinels])
    put_around_text(backend, model.special, bos=False, eos=True)
    return backend, model.special


Reader = Callable[[Path, Mapping[str, Any]], BackendWithRoles]
READERS: dict[str, Reader] = {  # in the order in which a directory is searched
    "tokenizer.json": _tokenizer_json,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _t5_sentencepiece,
    "vocab.json": _vocabulary_and_merges,
    "encoder.json": _vocabulary_and_merges,
    "vocab.txt": _wordpiece_vocabulary,
    "bpe_simple_vocab_16e6.txt.gz": bpe.clip_merges,
}


def reader(path: Path) -> Reader:
    """Return the reader of a single file by its name, or else by its extension."""
    endings = {".model": _sentencepiece, ".txt": _wordpiece_vocabulary, ".json": _tokenizer_json}
    read_file = READERS.get(path.name) or endings.get(path.suffix)
    if read_file is None and ".model" in path.suffixes:  # for example tokenizer.model.v1
        read_file = _sentencepiece
    if read_file is None:
        kinds = ", ".join([*READERS, "a SentencePiece .model", "a .gguf"])
        raise UserError(f"{path} is not a kind of tokenizer file that keifu knows ({kinds}).")
    return read_file


def settings_beside(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; missing roles come from special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).exists():
            content = read_json_object(directory / name)
            settings |= {key: value for key, value in content.items() if value is not None}
    return settings


def finish_backend(backend_with_roles: BackendWithRoles, directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Add data from the other files in the folder: roles, chat template, ids that end an answer, maximum length."""
    backend, roles = backend_with_roles
    named_roles, limit = roles_beside(config)
    special = roles | named_roles
    flagged = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    new = [token for token in dict.fromkeys(special.values()) if token not in flagged]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    if "add_bos_token" in config or "add_eos_token" in config:  # these overrule tokenizer.json
        put_around_text(backend, special, bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
    generation = generation_config(directory)
    return Tokenizer(backend, special, stop_ids(generation), chat_template(directory, config), limit, generation)


def roles_beside(config: Mapping[str, Any]) -> tuple[dict[str, str], int | None]:
    """Return the token of each role in tokenizer_config.json, and the maximum length of a text or None."""
    length = config.get("model_max_length")
    limit = int(length) if isinstance(length, int | float) and length < 1e9 else None  # 1e30 means no limit
    return {role: _content(config[role], role) for role in ROLES if role in config}, limit


def _content(token: Any, role: str) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"tokenizer_config.json gives {token!r} for {role}, which must be a token's text.")
    return text


def generation_config(directory: Path) -> dict[str, Any]:
    """Read generation_config.json. Return {} if there is no such file."""
    path = directory / GENERATION_CONFIG
    settings = read_json_object(path) if path.exists() else {}
    return {key: value for key, value in settings.items() if value is not None and not key.startswith("_")}


def stop_ids(generation: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer, from eos_token_id in generation_config.json; empty if there are none."""
    value = generation.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int and 0 <= number <= LARGEST for number in ids):
        raise UserError(f"{GENERATION_CONFIG} gives {value!r} for eos_token_id, which must be ids of tokens.")
    return set(ids)


def chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: chat_template.jinja, or else the default one in tokenizer_config.json."""
    if (directory / "chat_template.jinja").exists():
        return read_text(directory / "chat_template.jinja")
    processor = directory / "chat_template.json"  # in older vision models
    template = (read_json_object(processor) if processor.exists() else config).get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default", next(iter(by_name.values()), None))
    if not isinstance(template, str | None):
        raise UserError(f"{directory / 'tokenizer_config.json'} has a chat_template that is no text.")
    return template
