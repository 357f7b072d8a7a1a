"""Tokenizers read from and written to the metadata of GGUF files (`tokenizer.ggml.*`), compatible with llama.cpp.

Two of GGUF's kinds are supported: "gpt2", byte-level BPE by merges, and "llama", SentencePiece's BPE by scores.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from keifu.data.tokenizers import sentencepiece as sp
from keifu.data.tokenizers.bpe import CUTS, WHOLE_WORDS, byte_level_backend, cut_of
from keifu.data.tokenizers.streaming import byte_value
from keifu.data.tokenizers.tokenizer import Tokenizer, put_around_text
from keifu.errors import UserError

READ_FIELDS = ("tokenizer.", "general.sampling.")
SAMPLING_KEYS = {  # for each GGUF key our name and type
    "temperature": ("temp", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}
ROLE_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
Made = tuple[tokenizers.Tokenizer, bool]  # backend, and whether texts begin with a BOS by default
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")  # for files that state none


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """Read the tokenizer's fields from a GGUF file."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a GGUF file, or it is torn: {error}.") from error
    return {name: field.contents() for name, field in fields.items() if name.startswith(READ_FIELDS)}


def gguf_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer from the fields of a GGUF file.

    fields: at least "tokenizer.ggml.model" and "tokenizer.ggml.tokens"; arrays are sequences of plain values. Raises
    `UserError`, with the known names, for an unknown kind of vocabulary or pre-tokenizer.
    """
    vocabulary = _field(fields, "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary not in builders:
        known_kinds = " and ".join(map(repr, builders))
        raise UserError(f"The GGUF's tokenizer.ggml.model is {vocabulary!r}; keifu reads {known_kinds}.")
    tokens = [str(token) for token in _field(fields, "tokens")]
    kinds = list(fields.get("tokenizer.ggml.token_type") or [sp.NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"The GGUF has {len(tokens)} tokens but {len(kinds)} entries in tokenizer.ggml.token_type.")
    backend, adds_bos = builders[vocabulary](fields, tokens, kinds)
    special = _roles(fields, tokens)
    begins, ends = (fields.get(f"tokenizer.ggml.add_{role}_token") for role in ("bos", "eos"))
    adds_bos = bool(adds_bos if begins is None else begins)
    put_around_text(backend, special, adds_bos, bool(ends))
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"The GGUF's tokenizer.chat_template is {template!r:.40}, and it must be a text.")
    ends = _ends_of_turn(fields, tokens, template)
    tokenizer = Tokenizer(backend, special, ends, template, generation_config=_generation_config(fields))
    if template is not None and tokenizer.bos_id is not None and adds_bos and not _writes_bos(tokenizer):
        return tokenizer.with_chat_template("{{ bos_token }}" + template)  # as llama.cpp begins a chat
    return tokenizer


def _writes_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the chat template begins a conversation with the BOS. True if it cannot be rendered here."""
    with suppress(UserError):
        return tokenizer.chat_text([{"role": "user", "content": "x"}]).startswith(tokenizer.special["bos_token"])
    return True


def _generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert GGUF's general.sampling.* to entries of generation_config.json. Temperature 0 becomes greedy decoding."""
    there = {ours: fields.get(f"general.sampling.{theirs}") for ours, (theirs, _) in SAMPLING_KEYS.items()}
    settings: dict[str, Any] = {ours: round(value, 6) for ours, value in there.items() if value is not None}
    if settings.get("temperature") == 0:
        return {"do_sample": False, **{key: value for key, value in settings.items() if key != "temperature"}}
    return {"do_sample": True, **settings} if settings else {}


def _sampling_fields(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Convert generation_config.json to GGUF's general.sampling.*, the inverse of `_generation_config`."""
    settings = {key: generation[key] for key in SAMPLING_KEYS if generation.get(key) is not None}
    settings |= {"temperature": 0.0} if generation.get("do_sample") is False else {}
    return {
        f"general.sampling.{SAMPLING_KEYS[key][0]}": SAMPLING_KEYS[key][1](value) for key, value in settings.items()
    }


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if f"tokenizer.ggml.{name}" not in fields:
        raise UserError(f"The GGUF holds no tokenizer.ggml.{name}, so no tokenizer can be built from it.")
    return fields[f"tokenizer.ggml.{name}"]


def _byte_level(fields: Mapping[str, Any], tokens: list[str], kinds: Sequence[int]) -> Made:
    vocabulary = sp.numbered(tokens, "The GGUF")
    cut = fields.get("tokenizer.ggml.pre", "default")
    merges = [(left, right) for left, _, right in (str(m).partition(" ") for m in _field(fields, "merges"))]
    try:
        backend = byte_level_backend(vocabulary, merges, cut)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        unknown = next((pair for pair in merges if not {*pair, "".join(pair)} <= vocabulary.keys()), None)
        if unknown is None:
            raise
        what = " and ".join(map(repr, unknown))
        raise UserError(f"The GGUF merges {what}, which its vocabulary does not have.") from error
    added = (pair for pair in zip(tokens, kinds, strict=True) if pair[1] in (sp.CONTROL, sp.USER_DEFINED))
    backend.add_tokens([AddedToken(token, normalized=False, special=role == sp.CONTROL) for token, role in added])
    return backend, CUTS[cut][0] in WHOLE_WORDS


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], kinds: Sequence[int]) -> Made:
    scores = _field(fields, "scores")
    pieces = [sp.SentencePiece(*entry) for entry in zip(tokens, map(float, scores), map(int, kinds), strict=True)]
    settings = sp.SentencePieceSettings(
        unknown_id=int(fields.get("tokenizer.ggml.unknown_token_id", 0)),
        byte_fallback=sp.BYTE in kinds,
        dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        single_spaces=bool(fields.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    return sp.backend_from_pieces(pieces, settings), True


def _roles(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    roles = {}
    for role, key in ROLE_KEYS.items():
        if (number := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if int(number) >= len(tokens):
                raise UserError(f"The GGUF's {key} token has the id {number}, but there are only {len(tokens)} tokens.")
            roles[role] = tokens[int(number)]
    return roles


def _ends_of_turn(fields: Mapping[str, Any], tokens: list[str], template: str | None) -> set[int]:
    """Return the ids that end an answer: those that the file states, else the usual names that occur in its chat
    template."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom")]
    named_ids = {int(fields[key]) for key in keys if fields.get(key) is not None}
    return named_ids or {tokens.index(end) for end in ENDS_OF_TURN if end in (template or "") and end in tokens}


def to_gguf_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the GGUF fields of this tokenizer: strings, integers, booleans and lists. Scores are a list of floats.

    Write `token_type` as int32, ids as uint32, scores as float32. Raises `UserError`, with the reason, unless it is
    byte-level BPE or SentencePiece's BPE with rules that have a name in GGUF.
    """
    described = tokenizer.description()
    model, decoder = described["model"], described["decoder"] or {}
    if model["type"] != "BPE":
        what = "made of single characters" if model["type"] == "WordLevel" else model["type"]
        raise UserError(f"A GGUF holds byte-level or SentencePiece BPE vocabularies; this one is {what}: use kind bpe.")
    by_id = {number: token for token, number in tokenizer.backend.get_vocab().items()}
    tokens = [by_id[number] for number in range(tokenizer.vocab_size)]
    if decoder.get("type") == "ByteLevel":
        special = _byte_level_fields(tokenizer, described)
    else:
        special = _sentencepiece_fields(described, tokens)
    kinds = special.pop("token_type", [sp.NORMAL] * len(tokens))
    for number, added in tokenizer.backend.get_added_tokens_decoder().items():
        if kinds[number] == sp.NORMAL:
            kinds[number] = sp.CONTROL if added.special else sp.USER_DEFINED
    around = tokenizer.encode("", special=True)  # tokens that the tokenizer adds around a text
    begins = bool(around) and around[0] == tokenizer.bos_id
    fields = special | {"tokens": tokens, "token_type": kinds, "add_bos_token": begins}
    fields["add_eos_token"] = bool(around[begins:]) and around[-1] == tokenizer.eos_id
    ids = {key: tokenizer.special.get(role) for role, key in ROLE_KEYS.items()}
    fields |= {f"{key}_token_id": tokenizer.token_id(token) for key, token in ids.items() if token is not None}
    turns = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    fields |= {"eot_token_id": turns[0]} if turns else {}
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    named_fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named_fields | template | _sampling_fields(tokenizer.generation_config)


def _byte_level_fields(tokenizer: Tokenizer, described: dict[str, Any]) -> dict[str, Any]:
    cut = cut_of(tokenizer.backend)
    normalizer = described["normalizer"]
    if cut is None or (normalizer is not None and not (cut == "qwen2" and normalizer == {"type": "NFC"})):
        rules = ", ".join(_kinds(normalizer) + _kinds(described["pre_tokenizer"])) or "none"
        raise UserError(f"GGUF has no name for this tokenizer's way of preparing text ({rules}).")
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    return {"model": "gpt2", "pre": cut, "merges": merges, "add_space_prefix": False}


def _sentencepiece_fields(described: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the fields of SentencePiece's BPE. The earlier a merge, the higher the score of its token. Raises
    `UserError` if scores cannot express the merges."""
    merges = [(left, right) for left, right in described["model"]["merges"]]
    rank_scores = {token: -float(rank) for rank, token in reversed(list(enumerate("".join(pair) for pair in merges)))}
    cutter = described["pre_tokenizer"] or {}
    pattern = re.compile(cutter["pattern"]["Regex"]) if cutter.get("type") == "Split" else None
    unsplit_tokens = {token for token in tokens if pattern and pattern.fullmatch(token)}  # user-defined, never split
    kinds = [
        sp.UNKNOWN if token == described["model"]["unk_token"] else sp.BYTE if byte_value(token) is not None
        else sp.USER_DEFINED if token in unsplit_tokens else sp.NORMAL
        for token in tokens
    ]  # fmt: skip
    added = {entry["content"] for entry in described["added_tokens"]}
    scores = [
        rank_scores.get(token, 0.0 if token in added else -float(len(merges) + n)) for n, token in enumerate(tokens)
    ]
    mergeable = [sp.SentencePiece(*entry) for entry in zip(tokens, scores, kinds, strict=True) if entry[0] not in added]
    prefix = _space_prefix(described)
    if prefix is None:
        rules = ", ".join(_kinds(described["normalizer"]) + _kinds(described["pre_tokenizer"]))
        raise UserError(f"A GGUF can only say that spaces become U+2581; this tokenizer prepares text with {rules}.")
    if set(sp.merges_by_score(mergeable)) != set(merges):
        raise UserError("This BPE's merges do not follow from one score for each token, so a GGUF cannot hold it.")
    return {"model": "llama", "pre": "default", "scores": scores, "token_type": kinds, "add_space_prefix": prefix}


def _kinds(steps: Mapping[str, Any] | None) -> list[str]:
    """Return the types of a normalizer's or pre-tokenizer's steps."""
    parts = [] if steps is None else steps.get("normalizers", steps.get("pretokenizers", [steps]))
    return [step["type"] for step in parts]


def _space_prefix(described: Mapping[str, Any]) -> bool | None:
    """Return whether a space is added before each text; None if the normalisation differs from SentencePiece's BPE."""
    normalizer, cutter = described["normalizer"], described["pre_tokenizer"]
    if normalizer is None and cutter is not None and cutter["type"] == "Metaspace" and not cutter.get("split", True):
        return cutter.get("prepend_scheme", "always") != "never"
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": sp.SPACE}
    prepend = {"type": "Prepend", "prepend": sp.SPACE}
    if cutter is not None and cutter["type"] != "Split":
        return None
    return True if steps == [prepend, escape] else False if steps == [escape] else None
