"""Separation of a reasoning model's thoughts, the text between `<think>` and `</think>` at the beginning, from its
answer. Gemma 4 writes its thoughts between `<|channel>thought` and `<channel|>`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from keifu.data.tokenizers.tokenizer import ROLES, Tokenizer
from keifu.errors import UserError

OPEN, CLOSE = "<think>", "</think>"
MARKS = {OPEN: CLOSE, "<|channel>thought": "<channel|>"}
SPECIAL = "<|channel>", "<channel|>"  # tokens of these marks that a decoder leaves out of other texts
TAIL = 8  # tokens at the end of a prompt that are searched for `<think>`
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *ROLES)


class ThoughtSplit(NamedTuple):
    """Thoughts and answer, without the marks and the blanks around the thoughts."""

    thoughts: str
    answer: str


class ThoughtSplitter:
    """Splitter of a text that arrives in pieces.

    thinking: whether the text begins inside the thoughts, because the chat template wrote `<think>`. An incomplete mark
    at the end of a piece is withheld until the next piece. A later `<think>` is part of the answer.
    """

    def __init__(self, thinking: bool = False):
        self.part: Literal["start", "thoughts", "gap", "answer"] = "thoughts" if thinking else "start"
        self.empty, self.waiting = True, ""  # empty: whether the thoughts have no text yet
        self.closings = tuple(MARKS.values())  # marks that end the thoughts; one if they have been opened here

    def __call__(self, piece: str) -> ThoughtSplit:
        """Return the thoughts and the answer in the next piece."""
        text, self.waiting, thoughts = self.waiting + piece, "", ""
        if self.part == "start":
            begun = text.lstrip()
            opening = next((mark for mark in MARKS if begun.startswith(mark)), None)
            if opening is None and any(mark.startswith(begun) for mark in MARKS):
                self.waiting = text
                return ThoughtSplit("", "")
            self.part = "answer"
            if opening is not None:
                self.part, text, self.closings = "thoughts", begun[len(opening) :], (MARKS[opening],)
        if self.part == "thoughts":
            closing = re.search("|".join(map(re.escape, self.closings)), text)
            thoughts, text = (text, "") if closing is None else (text[: closing.start()], text[closing.end() :])
            thoughts = thoughts.lstrip() if self.empty else thoughts
            if closing:
                self.part, thoughts = "gap", thoughts.rstrip()
            else:
                complete = thoughts[: len(thoughts) - self._begun_closing(thoughts)].rstrip()
                thoughts, self.waiting = complete, thoughts[len(complete) :]
            self.empty = self.empty and not thoughts
        if self.part == "gap":
            text = text.lstrip()
            self.part = "answer" if text else "gap"
        return ThoughtSplit(thoughts, text)

    def _begun_closing(self, text: str) -> int:
        """Return the number of characters at the end of a text that may become the mark of the end."""
        lengths = [n for mark in self.closings for n in range(1, len(mark)) if text.endswith(mark[:n])]
        return max(lengths, default=0)

    def end(self) -> ThoughtSplit:
        """Return the withheld text, which was not a mark."""
        remaining_text, self.waiting = self.waiting, ""
        return (
            ThoughtSplit(remaining_text.rstrip(), "") if self.part == "thoughts" else ThoughtSplit("", remaining_text)
        )


def split_thoughts(text: str, thinking: bool = False) -> ThoughtSplit:
    """Split a whole text. Thoughts without an end have no answer."""
    splitter = ThoughtSplitter(thinking)
    return ThoughtSplit(*map("".join, zip(splitter(text), splitter.end(), strict=True)))


def answer_of(completion: str) -> str:
    """Return the answer in a whole completion. A `</think>` without `<think>` ends thoughts that the prompt opened."""
    begun, closed, _ = completion.partition(CLOSE)
    return split_thoughts(completion, bool(closed) and OPEN not in begun).answer


def opens_thoughts(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends with `<think>`, which some chat templates write, or another such mark."""
    return tokenizer.decode(prompt[-TAIL:], skip_special=False).rstrip().endswith(tuple(MARKS))


def thought_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the special tokens that mark thoughts, with their ids; none if the chat template does not know them. They
    must stay in the text of a chat's answer."""
    if any(word not in (tokenizer.chat_template or "") for word in SPECIAL):
        return {}
    words = {tokenizer.backend.id_to_token(token): token for token in tokenizer.special_ids}
    return {word: words[word] for word in SPECIAL} if {*SPECIAL} <= {*words} else {}


def with_opening(tokenizer: Tokenizer, prompt: Sequence[int], completion: str) -> str:
    """Put `<think>` before the completion if the prompt ends with it, so that unfinished thoughts are recognised."""
    return f"{OPEN}\n{completion}" if opens_thoughts(tokenizer, prompt) else completion


def template_options(tokenizer: Tokenizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check variables for the chat template, such as `enable_thinking`, and return them.

    Raises `UserError` for a name that the template does not read, a special token, or a name that keifu or Jinja
    defines.
    """
    from keifu.data.tokenizers.chat_template import template_variables

    for name in options:
        if name in RESERVED or name not in template_variables(tokenizer.chat_template or ""):
            raise UserError(f"The chat template of this model has no option {name}: leave it out.")
    return dict(options)
