"""A conversation: its history, formatted by the chat template, and the model's replies."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.defaults import sampling_for
from keifu.generation.text.engine import batch_capacity, causal, write
from keifu.generation.text.request import Request, check_tokens
from keifu.generation.text.sampling_params import ANSWER_TOKENS, SamplingOptions
from keifu.layers.attention.kv_cache import Cache


class Conversation:
    """A talk with a model. `messages` is the history: {"role": "system" | "user" | "assistant", "content": text}, ...

    system: what the model is told before the talk; None leaves it to the template, which may have a text of its own.
    finish_reason: why the last answer ended, as in `Piece`; None while it goes on or if it was interrupted.

    The keys and values of earlier turns are kept: where the new layout begins with the same tokens, only the rest is
    read again.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, system: str | None = None):
        self.model = causal(model)
        self.config = self.model.config
        self.tokenizer, self.system = tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.finish_reason: str | None = None
        self._caches: list[Cache] | None = None
        self._held: list[int] = []  # the tokens whose keys and values the caches hold

    def instruct(self, system: str | None) -> None:
        """Changes the system prompt, or takes it away; what was said stays."""
        said = [message for message in self.messages if message["role"] != "system"]
        self.system = system
        self.messages = said if system is None else [{"role": "system", "content": system}, *said]

    def restore(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Goes on with a conversation that was had before; one that the template refuses is a `UserError`."""
        self.tokenizer.render_chat(messages)
        self.messages = [dict(message) for message in messages]
        self.system = next((each["content"] for each in self.messages if each["role"] == "system"), None)
        self.finish_reason = None

    def reply(self, text: str, **sampling: Unpack[SamplingOptions]) -> Iterator[str]:
        """Answers a message, in pieces of text; both then belong to the history.

        sampling: as for `generate`, but max_tokens is 1024 where the model names no number. An answer that is
        interrupted stays as far as it came; if nothing came, the message is forgotten too. A conversation that no
        longer fits the context is a `UserError`, raised at once; nothing is dropped from it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.render_chat(messages)
        context = self.config.context_length
        if len(prompt) >= context:
            raise UserError(
                f"The conversation has {len(prompt)} tokens with this message, but this model's context is {context} "
                "and must hold the answer too: write a shorter message, or start afresh with /reset."
            )
        check_tokens([prompt], self.config.vocab_size)
        settings = sampling_for(self.tokenizer, sampling, ANSWER_TOKENS)
        return self._answer(Request(0, prompt, settings, self.tokenizer, context), messages)

    def _answer(self, request: Request, messages: list[dict[str, str]]) -> Iterator[str]:
        """Generates the answer; however it ends, the history and the caches agree afterwards."""
        caches = self._reused(request)
        self._caches, self.finish_reason, answer = None, None, ""
        try:
            for piece in write(self.model, [request], caches):
                answer, self.finish_reason = answer + piece.text, piece.finish_reason
                if piece.text:
                    yield piece.text
        finally:
            if answer or self.finish_reason:
                self.messages = [*messages, {"role": "assistant", "content": answer}]
            lengths = {cache.length for cache in caches}
            if len(lengths) == 1:  # not if the model was interrupted between two layers
                self._caches, self._held = caches, [*request.prompt, *request.tokens][: lengths.pop()]

    def _reused(self, request: Request) -> list[Cache]:
        """Caches with room for the request, which hold as much of its prompt as earlier turns have left."""
        room = batch_capacity([request])
        if self._caches is not None:
            pairs = enumerate(zip(self._held, request.prompt, strict=False))
            same = next((i for i, (old, new) in pairs if old != new), min(len(self._held), len(request.prompt)))
            same = min(same, len(request.prompt) - 1)  # the last token is always read, for its logits
            if same >= max(cache.earliest for cache in self._caches):
                for cache in self._caches:
                    cache.rollback(same)
                    cache.reserve(room)
                return self._caches
        return self.model.new_caches(1, room)
