"""Messages in channels, as gpt-oss writes them (the harmony format): thoughts, calls and text of one answer.

    <|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>TEXT<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>

A recipient may also come before the channel. A message in the channel commentary without a recipient is text for the
user.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

from keifu.data.tokenizers.tokenizer import Tokenizer

START, CHANNEL, CONSTRAIN, MESSAGE, END = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END)
ENDS = ("<|call|>", "<|return|>")  # tokens that end an answer
ANY = re.compile("|".join(map(re.escape, MARKS + ENDS)))
CHANNEL_NAME = re.compile(r"<\|channel\|>\s*([^\s<]*)")
RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")
MOST_HEADER = 200  # characters; longer text without a mark is no header
NAMESPACE = "functions."


class ChannelPart(NamedTuple):
    """Next text of an answer. name: of the function; "" unless a call begins here."""

    kind: Literal["thoughts", "text", "call"]
    text: str = ""
    name: str = ""


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Return whether the chat template writes messages in channels."""
    if f"{CHANNEL}analysis" not in (tokenizer.chat_template or ""):
        return False  # at once, because every chat asks
    return {*MARKS} <= {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}


def begun_message(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Return the message that the prompt begins and the answer continues, after the role."""
    prompt_text = tokenizer.decode(prompt, skip_special=False)
    return prompt_text.rpartition(START)[2].removeprefix("assistant")


def marked_final(text: str) -> str:
    """Return the text as the beginning of a message for the user."""
    return f"{CHANNEL}final{MESSAGE}{text}"


class HarmonySplitter:
    """Splitter of an answer that arrives in pieces. An incomplete mark is withheld until the next piece.

    functions: names that may be called; a message to any other recipient is text, or thoughts in the channel analysis.
    """

    def __init__(self, functions: Collection[str] = ()):
        self.functions = functions
        self.kind: Literal["header", "thoughts", "text", "call"] = "header"
        self._waiting, self._header = "", ""
        self._follows, self._begun = False, set[str]()  # _follows: whether a message has come before

    def __call__(self, piece: str, last: bool = False) -> Iterator[ChannelPart]:
        """Yield the parts in the next piece. last: whether the answer ends with it."""
        self._waiting += piece
        while mark := ANY.search(self._waiting):
            text, self._waiting = self._waiting[: mark.start()], self._waiting[mark.end() :]
            yield from self._text(text)
            yield from self._mark(mark[0])
        held_length = 0 if last else _beginning_of_a_mark(self._waiting)
        text, self._waiting = (
            self._waiting[: len(self._waiting) - held_length],
            self._waiting[len(self._waiting) - held_length :],
        )
        yield from self._text(text)
        if self._without_channels and (last or len(self._header) > MOST_HEADER):
            header, self.kind, self._header = self._header, "text", ""
            yield from self._text(header)

    @property
    def _without_channels(self) -> bool:
        """Whether the answer has begun with text that is no header."""
        return self.kind == "header" and not self._follows and bool(self._header) and not ANY.search(self._header)

    def _text(self, text: str) -> Iterator[ChannelPart]:
        if not text:
            return
        if self.kind == "header":
            self._header += text
        else:
            yield ChannelPart(self.kind, text)

    def _mark(self, mark: str) -> Iterator[ChannelPart]:
        """Change the state at a mark. A message ends at any mark, also at one that is out of place."""
        if mark == MESSAGE and self.kind == "header":
            yield from self._begin()
        elif mark in (CHANNEL, CONSTRAIN) and self.kind == "header":
            self._header += mark
        else:
            if self._without_channels:
                yield ChannelPart("text", self._header)
            self._follows, self.kind = True, "header"
            self._header = CHANNEL if mark == CHANNEL else ""

    def _begin(self) -> Iterator[ChannelPart]:
        """Begin the message of the header that has come."""
        header, self._header, self._follows = self._header, "", True
        channel, recipient = CHANNEL_NAME.search(header), RECIPIENT.search(header)
        name = recipient[1].removeprefix(NAMESPACE) if recipient else ""
        if name in self.functions:
            self.kind = "call"
            yield ChannelPart("call", name=name)
            return
        self.kind = "thoughts" if channel and channel[1] == "analysis" else "text"
        if self.kind in self._begun:
            yield ChannelPart(self.kind, "\n")  # between two messages
        self._begun.add(self.kind)


def _beginning_of_a_mark(text: str) -> int:
    """Return the number of characters at the end that may become a mark."""
    start = text.rfind("<")
    return len(text) - start if start >= 0 and any(m.startswith(text[start:]) for m in MARKS + ENDS) else 0
