"""POST /v1/translations and /v1/tokenize: translations by an encoder-decoder, and texts as tokens."""

from dataclasses import asdict
from typing import Annotated

from fastapi import FastAPI, Response
from pydantic import Field, model_validator

from keifu.inference.chat.prompts import ImagePrompt, InsertedImages, render
from keifu.inference.text.request import prompt_tokens
from keifu.inference.text.translation import TranslationParams, join_sentences, translate_texts
from keifu.serving.facts import current
from keifu.serving.models import ServedModels
from keifu.serving.openai.generation import token_bytes, token_text
from keifu.serving.openai.pictures import open_images
from keifu.serving.openai.schemas import MAX_MESSAGES, Body, Message, Texts
from keifu.serving.streaming import json_response

MOST_CHARACTERS = 2**18  # of a text to be shown as tokens


class TranslationRequest(Texts):
    """POST /v1/translations. beam, alpha, max_tokens: the options of `keifu translate`."""

    beam: Annotated[int, Field(ge=1, le=64)] = 4
    alpha: float = 0.6
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class TokenizeRequest(Body):
    """POST /v1/tokenize: the tokens of a text, or of messages in the model's chat template."""

    model: str = ""
    input: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        if sum(len(str(message.plain()["content"])) for message in self.messages or ()) > MOST_CHARACTERS:
            raise ValueError(f"the messages have more than {MOST_CHARACTERS:,} characters together")
        return self


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    @app.post("/v1/translations", summary="Translate texts, sentence by sentence", tags=["text"])
    async def translations(body: TranslationRequest) -> Response:
        name = models.find(body.model, "translation").name
        settings = TranslationParams(body.beam, body.alpha, body.max_tokens)
        translated = await models.worker(name).call(
            lambda model, tokenizer, go_on: translate_texts(model, tokenizer, body.texts, settings, progress=go_on)
        )
        pairs = enumerate((join_sentences(part.text for part in parts), parts) for parts in translated)
        data = [{"object": "translation", "index": n, "text": t, "sentences": [*map(asdict, e)]} for n, (t, e) in pairs]
        every = [part for parts in translated for part in parts]
        input_tokens, output_tokens = sum(part.source_tokens for part in every), sum(part.tokens for part in every)
        usage = {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
        }
        current().prompt_tokens, current().completion_tokens = input_tokens, output_tokens
        return json_response({"object": "list", "data": data, "model": name, "usage": usage})

    @app.post("/v1/tokenize", summary="A text as tokens", tags=["text"])
    def tokenize(body: TokenizeRequest) -> Response:
        about = models.reader(body.model)
        tokenizer = about.tokenizer
        if body.messages is None:
            ids = prompt_tokens(tokenizer, body.input or "")
        else:
            messages = open_images([message.plain() for message in body.messages], models.limits.pictures)
            rendered = render(tokenizer, messages, about.config)
            ids = InsertedImages(rendered, about.config).tokens if isinstance(rendered, ImagePrompt) else rendered
        entry_of = {n: {"text": token_text(tokenizer, n), "bytes": [*token_bytes(tokenizer, n)]} for n in {*ids}}
        entries = [entry_of[token] for token in ids]
        return json_response({"object": "tokens", "model": about.name, "ids": ids, "tokens": entries})
