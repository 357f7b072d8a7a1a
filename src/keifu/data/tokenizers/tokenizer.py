"""`Tokenizer`, keifu's interface to all tokenizers: text to token ids and back.

It wraps a `tokenizers.Tokenizer` and adds the BOS, EOS and padding ids, the chat template, a stream decoder, and a
guard against control tokens in text.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import processors

from keifu.data.tokenizers.stopping import left_by_a_stop
from keifu.data.tokenizers.streaming import DecodingRule, StreamDecoder, decoding_rule
from keifu.errors import UserError, unknown
from keifu.files import hash_of, write_atomic

BackendWithRoles = tuple[tokenizers.Tokenizer, dict[str, str]]  # roles: the token of each, as far as they are known
Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...} each
LONG = 1 << 16  # characters; fewer are encoded before a user waits for a stop
OPENING, CLOSING = "\U000f0000", "\U000f0001"  # around a secret name: private-use characters, which no rule changes


class ControlTokenGuard:
    """Copy `backend` of the tokenizer `original`, with secret names for special tokens.

    A control token such as `<|im_end|>` ends a turn; text that merely contains those characters must not (prompt
    injection). So text is encoded by a copy with the same ids and rules, in which the special tokens have names that
    nobody can guess. Only callers that may write control tokens (chat templates) get those names.
    """

    def __init__(self, original: tokenizers.Tokenizer):
        added = original.get_added_tokens_decoder().values()
        nonce = secrets.token_hex(8)
        special = [token.content for token in added if token.special]
        self.names = {token: f"{OPENING}{nonce}.{n}{CLOSING}" for n, token in enumerate(special)}
        self._every = _any_of(token.content for token in added)
        self._special = re.compile(_any_of(special))
        self.backend = _renamed(original, self.names) if self.names else original

    def mark(self, value: Any, marks: str) -> Any:
        """Put `marks` (two characters) around the text of every special token in the strings of messages or
        variables."""
        if isinstance(value, str):
            return self._special.sub(lambda match: marks[0] + match[0] + marks[1], value)
        if isinstance(value, dict):
            return {key: self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def name(self, rendered: str, marks: str) -> str:
        """Replace special tokens in a rendered text by their secret names, and remove the marks.

        Text between marks came from a message and stays plain text. If a template has separated a mark from its token,
        the mark still prevents that text on its two sides joins into a special token.
        """
        start, end = map(re.escape, marks)
        pattern = re.compile(f"{start}({self._every}){end}|({self._every})|[{start}{end}]")

        def replacement(match: re.Match[str]) -> str:
            token = match[2] or ""
            return match[1] or self.names.get(token, token)

        return pattern.sub(replacement, rendered)


def _any_of(names: Iterable[str]) -> str:
    """Return a pattern that matches any of these names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


def put_around_text(backend: tokenizers.Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Make the tokenizer add its BOS before a text or its EOS after it, if it has such tokens."""
    tokens = [special[role] if role in special and on else "" for role, on in (("bos_token", bos), ("eos_token", eos))]
    single = " ".join(f"{token}:0" if token else "" for token in (tokens[0], "$A", tokens[1])).strip()
    special_tokens = [(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)


def nothing_around_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Copy the tokenizer without the tokens that it adds around a text. The ids of the text stay the same."""
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"post_processor": None}))


def unused_characters(value: Any, count: int = 2) -> str:
    """Return private-use characters that do not occur in any string of `value`."""
    used_characters = set(json.dumps(value, ensure_ascii=False, default=str))
    free = (character for character in map(chr, range(0x100000, 0x10FFFD)) if character not in used_characters)
    return "".join(islice(free, count))


def _renamed(original: tokenizers.Tokenizer, names: dict[str, str]) -> tokenizers.Tokenizer:
    """Copy the tokenizer with the same ids but other names for these tokens, also in the model's vocabulary.

    The old names must leave the vocabulary: a Unigram model would find `<s>` in any text, and BPE merges may produce
    it.
    """
    description = json.loads(original.to_str())
    model = description["model"]
    for added in description["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys()]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Converter between text and token ids.

    backend: the rules, vocabulary and added tokens. Its truncation and padding are switched off. special: the token of
    each role in `ROLES`: {"bos_token": "<s>", ...}. stop_ids: ids that end an answer in addition to the end-of-text
    token, such as the end of a turn. chat_template: the Jinja template that converts messages to a prompt, or None.
    max_length: the maximum length of a text in tokens, if the model's authors state one. generation_config: the
    recommended sampling settings, named as in generation_config.json.

    Raises `UserError`, with the token or id, if two tokens share an id or an id has no token.
    """

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error with the right method: tokenizers of other libraries can be called, this one cannot."""
        how = "tokenizer.encode(text) returns the ids of a text, and torch.tensor([ids]) makes a batch of them"
        raise UserError(f"A tokenizer of keifu is not called: {how}.")

    PARTS = "backend", "special", "stop_ids", "chat_template", "max_length", "generation_config"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        max_length: int | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.chat_template, self.max_length = backend, chat_template, max_length
        self.special = {role: token for role, token in (special or {}).items() if token is not None}
        self.generation_config = dict(generation_config or {})
        self.vocab_size = _checked_size(backend.get_vocab(with_added_tokens=True))
        tokens = (self.special.get(f"{role}_token") for role in ("bos", "eos", "pad"))
        self.bos_id, self.eos_id, self.pad_id = (None if token is None else self.token_id(token) for token in tokens)
        ends = [] if self.eos_id is None else [self.eos_id]
        self.stop_ids = frozenset([*ends, *stop_ids])

    def encode(self, text: str, special: bool = False, allow_special: bool = False) -> list[int]:
        """Encode a text to token ids.

        special: add the tokens that the tokenizer puts around a text (a BOS, [CLS] and [SEP]). allow_special: encode
        text such as "<|im_end|>" as the special token; otherwise it is plain text. Raises `UserError` for a character
        that is not in the vocabulary if there is no unknown token.
        """
        return self.encode_batch([text], special, allow_special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[list[int]]:
        """Encode each text, in parallel. The arguments are those of `encode`."""
        backend = self.backend if allow_special or not self._spelled(texts) else self._shield.backend
        encode = partial(backend.encode_batch_fast, list(texts), add_special_tokens=special)
        with self._explaining(texts):
            encodings = left_by_a_stop(encode) if sum(map(len, texts)) > LONG else encode()
        return [encoding.ids for encoding in encodings]

    def encodings(self, texts: Sequence[str]) -> tuple[tokenizers.Tokenizer, list[tokenizers.Encoding]]:
        """Encode each text without special tokens, for `encode_pairs`. Return the backend that can join them, too."""
        backend = self._shield.backend if self._spelled(texts) else self.backend
        with self._explaining(texts):
            return backend, backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_target_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encode each target text of a translation model, with the target vocabulary if there are two."""
        return self.encode_batch(texts, special)

    @property
    def sides(self) -> tuple["Tokenizer", "Tokenizer"]:
        """Source and target tokenizer, which may be the same."""
        return self, self

    @property
    def target_vocab_size(self) -> int | None:
        """Size of a separate target vocabulary; None if there is only one vocabulary."""
        return None

    @contextmanager
    def _explaining(self, texts: Sequence[str]) -> Iterator[None]:
        """Convert a failure to encode texts to a `UserError` that names the character."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # bare Exceptions, TypeErrors for surrogates, and Rust panics
            raise self._unencodable(texts, error) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of these ids. Invalid bytes and unknown ids become U+FFFD."""
        return self.stream(skip_special).decode_all(ids)

    def stream(self, skip_special: bool = True, visible_tokens: Iterable[int] = ()) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one. It never returns half a character.

        visible_tokens: special tokens that it does not skip."""
        skipped = self.special_ids.difference(visible_tokens) if skip_special else frozenset()
        return StreamDecoder(self._decoding, self.backend.id_to_token, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token in the middle of a text. They may be incomplete characters."""
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise UserError(f"There is no token with the id {token_id}: the ids go from 0 to {self.vocab_size - 1}.")
        return self._decoding.piece(token, False)

    def token_id(self, token: str) -> int:
        """Return the id of a token. Raises `UserError`, with the nearest token, for an unknown one."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise unknown("token", token, self.backend.get_vocab())
        return number

    def chat_text(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Render the conversation with the chat template. `variables` (`tools`, ...) are passed to the template."""
        from keifu.data.tokenizers.chat_template import render

        return render(self.chat_template, messages, add_generation_prompt, {**self.special, **variables})

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Encode a conversation, a list of {"role": ..., "content": ...}, formatted by the chat template.

        Only the template writes control tokens: the same text inside a message stays text. The template also writes the
        BOS, so none is added. An error in the template raises a `UserError` with its line.
        """
        if not self._spelled([messages, variables]):
            return self.encode(self.chat_text(messages, add_generation_prompt, **variables), allow_special=True)
        marks = unused_characters([self.chat_template, messages, variables])
        marked = self._shield.mark([dict(message) for message in messages], marks)
        text = self.chat_text(marked, add_generation_prompt, **self._shield.mark(variables, marks))
        return self.encode(self._shield.name(text, marks))

    def render_turns(self, messages: Messages, **variables: Any) -> tuple[list[int], list[bool]]:
        """Encode a whole conversation. Return ids, and a loss mask that is True on tokens written by the assistant.

        The token that ends the assistant's turn is included; line breaks of the template after it are not.
        """
        from keifu.data.tokenizers.chat_template import encode_turns, render_marked

        marks = unused_characters([self.chat_template, messages, variables], 4)
        marked = self._shield.mark([dict(message) for message in messages], marks[:2])
        all_variables = {**self.special, **self._shield.mark(variables, marks[:2])}
        text = render_marked(self.chat_template, marked, all_variables, marks[2:], self._shield.names)
        return encode_turns(self._shield.backend, self._shield.name(text, marks[:2]), marks[2:])

    def replace(self, **parts: Any) -> "Tokenizer":
        """Return a copy with some constructor arguments changed."""
        return type(self)(**{**self._parts, **parts})

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """Return a copy with this chat template, or without one."""
        return self.replace(chat_template=template)

    def __repr__(self) -> str:
        model = type(self.backend.model).__name__
        roles = "".join(f", {role.removesuffix('_token')} {token!r}" for role, token in self.special.items())
        return f"Tokenizer({model}, {self.vocab_size:,} tokens{roles}{', chat template' if self.chat_template else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._parts.values())

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, readable by transformers' AutoTokenizer.

        `stop_ids` and `generation_config` belong in generation_config.json, which is written with the model.
        """
        config = self._config("PreTrainedTokenizerFast")
        if {"cls_token", "sep_token"} <= self.special.keys():  # a BERT-like tokenizer, whose pairs have segments
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        directory = Path(directory)
        template = directory / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)  # an older file would have priority
        else:
            config["chat_template"] = self.chat_template
            write_atomic(template, self.chat_template)
        write_atomic(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        write_atomic(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    @property
    def _parts(self) -> dict[str, Any]:
        """Constructor arguments that recreate this tokenizer, in order."""
        return {name: vars(self)[name] for name in self.PARTS}

    def _config(self, tokenizer_class: str) -> dict[str, Any]:
        """Return the entries of tokenizer_config.json that all of transformers' tokenizer classes have."""
        config = {"tokenizer_class": tokenizer_class, **self.special, "clean_up_tokenization_spaces": False}
        return config if self.max_length is None else config | {"model_max_length": self.max_length}

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal hash of everything that affects encoding. Equal fingerprints mean equal ids.

        Scores are rounded, because the `tokenizers` library reads their last digit inexactly.
        """
        rounded = json.loads(self.backend.to_str(), parse_float=lambda digits: round(float(digits), 6))
        return hash_of([json.dumps(rounded)])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens, which `decode` skips."""
        return frozenset(n for n, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def description(self) -> dict[str, Any]:
        """Return the content of tokenizer.json: model, vocabulary, rules and added tokens."""
        return json.loads(self.backend.to_str())

    def _spelled(self, value: Any) -> bool:
        """Return whether a text in `value` may contain a special token, so that the guard is needed."""
        return self._names is None or any(self._names.search(text) for text in _texts(value))

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        """Pattern of special tokens in a text; None if only the guard's copy can recognise them.

        If the tokenizer does not normalise text and the names are ASCII (equal in every byte alphabet), text without a
        match cannot contain a special token. Searching is much faster than building the copy.
        """
        special = [token for token in self.backend.get_added_tokens_decoder().values() if token.special]
        plain = all(re.fullmatch(r"[!-~]+", token.content) and not token.normalized for token in special)
        if self.backend.normalizer is not None or not plain:
            return None
        return re.compile("|".join(re.escape(token.content) for token in special) or "(?!)")

    @cached_property
    def _shield(self) -> ControlTokenGuard:
        return ControlTokenGuard(self.backend)

    @cached_property
    def _decoding(self) -> DecodingRule:
        decoder, merging = self.backend.decoder, self.backend.model
        word_end = merging.end_of_word_suffix if isinstance(merging, tokenizers.models.BPE) else None
        return decoding_rule(None if decoder is None else json.loads(decoder.__getstate__()), word_end or "")

    def _unencodable(self, texts: Sequence[str], error: BaseException) -> UserError:
        vocabulary = self.backend.get_vocab()
        for text in texts:
            for position, character in enumerate(text):
                what = f"The character {character!r} (U+{ord(character):04X}, at place {position})"
                if "\ud800" <= character <= "\udfff":
                    return UserError(f"{what} is half a surrogate pair, not text: read the text as UTF-8.")
                if character not in vocabulary and "UNK" in str(error):
                    ways = "leave it out, or train a tokenizer on text that has it"
                    return UserError(f"{what} is not in this tokenizer's vocabulary of {self.vocab_size}: {ways}.")
        return UserError(f"The text could not be encoded: {error}.")


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in messages or variables, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for item in pair for text in _texts(item))
    elif isinstance(value, Sequence):
        yield from (text for item in value for text in _texts(item))


def _checked_size(vocabulary: Mapping[str, int]) -> int:
    """Return the number of tokens. Raises `UserError` unless the ids are 0, 1, 2, ... with one token each."""
    by_id: dict[int, str] = {}
    for token, number in vocabulary.items():
        if by_id.setdefault(number, token) != token:
            raise UserError(f"The vocabulary gives the id {number} to two tokens, {by_id[number]!r} and {token!r}.")
    if not by_id:
        raise UserError("The tokenizer's vocabulary is empty.")
    hole = next((number for number in range(len(by_id)) if number not in by_id), None)
    if hole is not None:
        raise UserError(f"The vocabulary has {len(by_id)} tokens up to id {max(by_id)}, but none with the id {hole}.")
    return len(by_id)
