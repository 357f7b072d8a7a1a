"""Conversation with a model: its history, formatted by the chat template, and the model's replies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from PIL import Image
from torch import nn

from keifu.data.chat.thoughts import opens_thoughts, split_thoughts, template_options, thought_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt, Messages, render
from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.generate import Completion, completion
from keifu.inference.text.model import text_model
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.request import Piece, Request
from keifu.inference.text.sampling_params import ANSWER_TOKENS, SamplingOptions, SamplingParams, sampling_for

History = list[dict[str, Any]]  # messages


class Conversation:
    """Conversation with a model. messages: the history, [{"role": "system" | "user" | "assistant", "content": text},
    ...]. For a vision-language model a message may have pictures in `images`.

    system: system prompt; None: the template's default. guesses: as in `Engine`. options: variables of the chat
    template, such as enable_thinking. thinking: whether the last prompt opened thoughts for the model. Thoughts are
    stored as "reasoning_content"; the template decides which of them a later prompt contains. finish_reason: why the
    last answer ended, as in `Piece`; None while it continues or if it was interrupted.

    Keys and values of earlier turns are reused: only the tokens after the common beginning of the two prompts are
    computed. folder: keeps them for later runs of the program.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, system: str | None = None,
        guesses: int | Draft | None = None,
        options: Mapping[str, Any] | None = None, folder: CacheFolder | None = None,
    ):  # fmt: skip
        self.model, self.thinking = model, False
        self.options = template_options(tokenizer, options or {})
        self.config = text_model(model).config
        self.tokenizer, self.system, self.guesses, self.folder = tokenizer, system, guesses, folder
        self.reset()

    def reset(self) -> None:
        """Delete all messages except the system prompt."""
        self.messages: History = []
        self.instruct(self.system)
        self.finish_reason: str | None = None
        self.engine = Engine(self.model, self.tokenizer, guesses=self.guesses, folder=self.folder)

    def instruct(self, system: str | None) -> None:
        """Change or remove the system prompt. The other messages stay."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.system = system
        self.messages = said if system is None else [{"role": "system", "content": system}, *said]

    def restore(self, messages: Messages) -> None:
        """Continue an earlier conversation. Raises `UserError` if the template refuses it."""
        for images in (message["images"] for message in messages if "images" in message):
            if not isinstance(images, (list, tuple)) or not all(isinstance(image, Image.Image) for image in images):
                raise UserError(f"The images of a message are {str(images)[:40]!r}, no pictures: remove that field.")
        render(self.tokenizer, messages, self.config, **self.options)
        self.messages = [dict(message) for message in messages]
        self.system = next((message["content"] for message in self.messages if message["role"] == "system"), None)
        self.finish_reason = None

    def reply(
        self, text: str, images: Sequence[Image.Image] = (), **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """Yield the answer to a message in pieces. Both are added to the history.

        sampling: as in `generate`, but the default of max_tokens is 1024 unless the model has one. The text of an
        interrupted answer is kept; if it is empty, the message is removed. Raises `UserError` at once if the
        conversation exceeds the context; no message is dropped.
        """
        return self.answer(text, sampling_for(self.tokenizer, sampling, ANSWER_TOKENS), images)

    def answer(
        self, text: str, settings: SamplingParams, images: Sequence[Image.Image] = (), prompt: str | None = None
    ) -> Iterator[str]:
        """Answer a message like `reply`, with complete settings. prompt: the text that the model reads instead of the
        message, for example with passages of documents; the history keeps the message."""
        request, messages = self._request(text, settings, images, prompt)
        pieces = self._pieces(self.engine.add(request), messages)
        return (piece.text for piece in pieces if piece.text)

    def complete(
        self, text: str, settings: SamplingParams, images: Sequence[Image.Image] = (), prompt: str | None = None
    ) -> Completion:
        """Return the whole answer to a message with its tokens, log-probabilities and seed. prompt: as in `answer`."""
        request, messages = self._request(text, replace(settings, log_probabilities=True), images, prompt)
        return completion(request, [*self._pieces(self.engine.add(request), messages)])

    def record(self, text: str, answer: str) -> None:
        """Add a message and its answer, which the model did not write, to the history."""
        self.messages = [*self.messages, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self.finish_reason = "stop"

    def take_back(self) -> dict[str, Any]:
        """Remove the last message and its answer from the history. Return the message."""
        indices = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not indices:
            raise UserError("There is no message to answer again: ask something first.")
        message = self.messages[indices[-1]]
        self.messages = self.messages[: indices[-1]]
        return message

    def _request(
        self, text: str, settings: SamplingParams, images: Sequence[Image.Image], prompt_text: str | None
    ) -> tuple[Request, History]:
        """Return the engine's request for the answer, and the history with the new message."""
        pictures = {"images": list(images)} if images else {}
        message = {"role": "user", "content": text, **pictures}
        messages = [*self.messages, message]
        last = message if prompt_text is None else message | {"content": prompt_text}
        prompt = render(self.tokenizer, [*self.messages, last], self.config, **self.options)
        tokens = prompt.tokens if isinstance(prompt, ImagePrompt) else prompt
        self.thinking = opens_thoughts(self.tokenizer, tokens)
        context = self.config.context_length
        if not isinstance(prompt, ImagePrompt) and len(prompt) >= context:
            said = any(message["role"] == "assistant" for message in self.messages)
            raise UserError(
                f"The conversation has {len(prompt)} tokens with this message, but this model's context is {context} "
                f"and must hold the answer too: write a shorter message{', or start afresh with /reset' * said}."
            )
        return self.engine.request(prompt, settings, thought_tokens(self.tokenizer).values()), messages

    def _pieces(self, number: int, messages: History) -> Iterator[Piece]:
        """Generate the answer. History and engine are consistent afterwards, also after an error."""
        self.finish_reason, answer = None, ""
        try:
            for piece in self.engine.pieces():
                answer, self.finish_reason = answer + piece.text, piece.finish_reason
                yield piece
        finally:
            self.engine.abort(number)
            if answer or self.finish_reason:
                thoughts, text = split_thoughts(answer, self.thinking)
                reasoning = {"reasoning_content": thoughts} if thoughts else {}
                self.messages = [*messages, {"role": "assistant", "content": text, **reasoning}]
