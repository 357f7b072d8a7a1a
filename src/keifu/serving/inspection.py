"""POST /v1/inspect and /v1/match: attention and predictions inside a model, and pictures compared with words."""

import base64
from functools import partial
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Response
from pydantic import Field
from torch import Tensor, nn

from keifu.data.images.io import read_image
from keifu.errors import UserError
from keifu.inference.embeddings.attention_maps import inspect_text, inspect_translation
from keifu.inference.embeddings.clip import embed_pictures, embed_texts, label_shares
from keifu.inference.text.fill import fill
from keifu.inference.text.request import prompt_tokens
from keifu.inference.text.translation import source_ids, translator
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.generation import likeliest, token_text
from keifu.serving.openai.images import PICTURE_BYTES
from keifu.serving.openai.schemas import Body
from keifu.serving.streaming import json_response

MOST_TOKENS = 128  # maximum of a text, since attention grows quadratically


class InspectRequest(Body):
    """POST /v1/inspect.

    input: a text; for models that predict masked words it may contain the tokenizer's mask token. top: number of tokens
    for each position of the lens, or for each mask.
    """

    model: str = ""
    input: Annotated[str, Field(min_length=1)]
    top: Annotated[int, Field(ge=1, le=20)] = 5


class MatchRequest(Body):
    """POST /v1/match. images: files in base64. texts: possible descriptions of them."""

    model: str = ""
    images: Annotated[list[str], Field(min_length=1, max_length=64)]
    texts: Annotated[list[str], Field(min_length=1, max_length=256)]


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    @app.post("/v1/inspect", summary="Values inside a model while it reads", tags=["insight"])
    async def inspect(body: InspectRequest) -> Response:
        about = models.find(body.model, "inspection")
        return json_response(await models.inspector(about.name).call(partial(_inspect, body=body, about=about)))

    @app.post("/v1/match", summary="Pictures against words", tags=["vectors"])
    async def match(body: MatchRequest) -> Response:
        body.model = models.find(body.model, "match").name
        return json_response(await models.worker(body.model).call(partial(_match, body=body)))


def _inspect(model: nn.Module, tokenizer: Any, _: Any, body: InspectRequest, about: Description) -> dict[str, Any]:
    masks: list[Any] = []
    source, target = tokenizer.sides
    if "translation" in about.uses:
        ids = source_ids(translator(model), tokenizer, [body.input], ["The text"])[0]
    elif (mask := tokenizer.special.get("mask_token")) and mask in body.input:
        masks = [[[g.word, g.probability] for g in some] for some in fill(model, tokenizer, body.input, body.top)]
        ids = tokenizer.encode(body.input, special=True, allow_special=True)
    elif "rerank" in about.uses:
        ids = tokenizer.encode(body.input, special=True)
    else:
        ids = prompt_tokens(tokenizer, body.input)
    if len(ids) > (room := min(MOST_TOKENS, about.context_length or MOST_TOKENS)):
        raise UserError(f"input has {len(ids)} tokens, and {room} can be looked at: shorten it.")
    inspection = inspect_translation(model, ids) if "translation" in about.uses else inspect_text(model, ids, body.top)
    maps = inspection.attention.items()
    return {
        "object": "inspection",
        "model": about.name,
        "rows": [token_text(target, row) for row in inspection.rows],
        "columns": [token_text(source, column) for column in inspection.columns],
        "attention": [{"layer": name, "heads": len(tensor), "bytes": _bytes(tensor)} for name, tensor in maps],
        "lens": [[list(likeliest(tokenizer, position)) for position in layer] for layer in inspection.lens],
        "masks": masks,
    }


def _bytes(weights: Tensor) -> str:
    """Return weights as bytes (255 for 1) in base64: the rows of each head one after another."""
    return base64.b64encode((255 * weights).round().byte().numpy().tobytes()).decode("ascii")


def _match(model: nn.Module, tokenizer: Any, _: Any, body: MatchRequest) -> dict[str, Any]:
    """Return the cosine of each picture and each text, and the probability of each text for each picture."""
    try:
        files = [base64.b64decode(image, validate=True) for image in body.images]
    except ValueError as error:
        raise UserError(f"images must be files in base64, and one is not: {error}.") from error
    opened = (read_image(file, f"Picture {number}", PICTURE_BYTES).image for number, file in enumerate(files, 1))
    pictures = torch.cat([embed_pictures(model, [picture]) for picture in opened])  # one at a time, to save memory
    with torch.no_grad():
        texts = embed_texts(model, tokenizer, body.texts)
        shares = label_shares(model, pictures, texts)
    cosines = (pictures @ texts.T).cpu()
    return {"object": "match", "model": body.model, "cosines": cosines.tolist(), "shares": shares.cpu().tolist()}
