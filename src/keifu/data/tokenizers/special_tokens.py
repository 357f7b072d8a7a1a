"""Prompt-injection guard: text is encoded so that it cannot spell a control token.

A control token such as `<|im_end|>` ends a turn; text that merely contains those characters must not. So text is
encoded by a copy of the tokenizer that has the same ids and rules, but whose special tokens have names that nobody can
guess. Only a caller that may write control tokens (a chat template) gets those names.
"""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

OPENING, CLOSING = "\U000f0000", "\U000f0001"  # around a secret name: private-use characters, which no rule rewrites


class ControlTokenGuard:
    """The twin `backend`, and the secret name in it of each special token of `original`."""

    def __init__(self, original: tokenizers.Tokenizer):
        added = original.get_added_tokens_decoder().values()
        nonce = secrets.token_hex(8)
        special = [token.content for token in added if token.special]
        self.names = {token: f"{OPENING}{nonce}.{n}{CLOSING}" for n, token in enumerate(special)}
        self._every = sorted((token.content for token in added), key=len, reverse=True)
        self.backend = _renamed(original, self.names) if self.names else original

    def mark(self, value: Any, marks: str) -> Any:
        """Puts `marks` (two characters) around every special token's text in the strings of messages or variables."""
        if isinstance(value, str):
            return self._special.sub(lambda found: marks[0] + found[0] + marks[1], value)
        if isinstance(value, dict):
            return {key: self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def name(self, rendered: str, marks: str) -> str:
        """Gives the special tokens of a rendered text their secret names, and takes the marks away.

        Text between marks came from a message and stays plain text. A mark that a template has separated from its token
        still keeps the text on its two sides from joining into a special token.
        """
        every = "|".join(map(re.escape, self._every)) or "(?!)"
        start, end = map(re.escape, marks)
        pattern = re.compile(f"{start}({every}){end}|({every})|[{start}{end}]")

        def replacement(found: re.Match[str]) -> str:
            token = found[2] or ""
            return found[1] or self.names.get(token, token)

        return pattern.sub(replacement, rendered)

    @property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)")


def names_in_text(original: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Finds the special tokens that a text spells; None where only the twin can tell.

    If the tokenizer does not normalise text and the names are plain ASCII (the same in every byte alphabet), text in
    which nothing is found cannot contain a special token. Searching is much faster than building the twin.
    """
    special = [token for token in original.get_added_tokens_decoder().values() if token.special]
    plain = all(re.fullmatch(r"[!-~]+", token.content) and not token.normalized for token in special)
    if original.normalizer is not None or not plain:
        return None
    return re.compile("|".join(re.escape(token.content) for token in special) or "(?!)")


def put_around_text(backend: tokenizers.Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Makes the tokenizer add its BOS before a text or its EOS after it, if it has such tokens."""
    tokens = [special[role] if role in special and on else "" for role, on in (("bos_token", bos), ("eos_token", eos))]
    single = " ".join(f"{token}:0" if token else "" for token in (tokens[0], "$A", tokens[1])).strip()
    given = [(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=given)


def nothing_around_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that adds no token around a text; the ids of the text itself are the same."""
    description = json.loads(backend.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(description | {"post_processor": None}))


def unused_characters(value: Any, count: int = 2) -> str:
    """Private-use characters that no string of `value` contains."""
    seen = set(json.dumps(value, ensure_ascii=False, default=str))
    free = (chr(code) for code in range(0x100000, 0x10FFFD))
    return "".join(character for character, _ in zip((c for c in free if c not in seen), range(count), strict=False))


def _renamed(original: tokenizers.Tokenizer, names: dict[str, str]) -> tokenizers.Tokenizer:
    """A copy of the tokenizer with the same ids, in which these tokens have other names, in the model's vocabulary too.

    The vocabulary must lose the old names as well: a Unigram model would find `<s>` in any text, and BPE merges may
    produce it.
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
