"""POST /v1/embeddings and /v1/rerank: embeddings of length 1, and documents sorted by similarity to a query."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.evaluation.classification.embeddings import embed_rows, encode_texts
from keifu.evaluation.images import retrieval
from keifu.generation.text.model import TwoTowers
from keifu.serving.facts import current
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.schemas import Body, Neutral
from keifu.serving.streaming import whole
from keifu.serving.worker import GoOn

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingRequest(Body):
    """POST /v1/embeddings.

    input: one text or several, or ids of the model's tokens; a CLIP accepts texts too. cut: whether to keep the
    beginning of a text that is longer than the context.
    """

    model: str = ""
    input: str | Annotated[list[str] | Ids | list[Ids], Field(min_length=1, max_length=2048)]

    encoding_format: Literal["float", "base64"] | None = None
    cut: bool = False
    user: str | None = None
    ignored: ClassVar[Neutral] = {"dimensions": ()}

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """Texts or ids, as a list."""
        given: Any = [self.input] if isinstance(self.input, str) else self.input
        return [given] if isinstance(given[0], int) else given


class RerankRequest(Body):
    """POST /v1/rerank. top_n: number of documents in the answer, the nearest first."""

    model: str = ""
    query: str
    documents: Annotated[list[str], Field(min_length=1, max_length=2048)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    cut: bool = False


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    async def compute(about: Description, inputs: Sequence[str] | Sequence[list[int]], cut: bool) -> tuple[Tensor, int]:
        rows, tokens = await models.worker(about.name).call(partial(embed_inputs, about=about, inputs=inputs, cut=cut))
        current().prompt_tokens = tokens
        return rows, tokens

    async def embed(body: EmbeddingRequest) -> dict[str, Any]:
        about = models.find(body.model, "embedding")
        embeddings, tokens = await compute(about, body.inputs, body.cut)
        encoded = _base64(embeddings) if body.encoding_format == "base64" else embeddings.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": about.name, "usage": usage}

    async def rank(body: RerankRequest) -> dict[str, Any]:
        about = models.find(body.model, "embedding")
        embeddings, tokens = await compute(about, [body.query, *body.documents], body.cut)
        scores = embeddings[1:] @ embeddings[0]
        best = scores.topk(min(body.top_n or len(scores), len(scores)))
        results = [
            {"index": index, "relevance_score": score}
            | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return {"object": "list", "model": about.name, "results": results, "usage": {"total_tokens": tokens}}

    @app.post("/v1/embeddings", summary="Texts as vectors", tags=["vectors"])
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await whole(request, embed(body))

    @app.post("/v1/rerank", summary="Documents by their nearness to a query", tags=["vectors"])
    async def rerank(body: RerankRequest, request: Request) -> Response:
        return await whole(request, rank(body))


def embed_inputs(
    model: nn.Module, tokenizer: Any, go_on: GoOn, about: Description, inputs: Sequence[Any], cut: bool
) -> tuple[Tensor, int]:
    """Return the embeddings on the CPU, and the number of tokens read. go_on: see `Worker.call`."""
    limit = about.config.context_length
    if isinstance(inputs[0], str):
        rows = encode_texts(tokenizer, inputs, limit, cut).rows
    else:
        rows = _checked_ids(inputs, about.config.vocab_size, limit, cut)
    padding = retrieval.padding(tokenizer) if isinstance(model, TwoTowers) else tokenizer.pad_id or 0
    return embed_rows(model, rows, padding, advance=go_on).cpu(), sum(map(len, rows))


def _checked_ids(inputs: Sequence[list[int]], vocab_size: int, limit: int, cut: bool) -> list[list[int]]:
    """Return the ids, truncated to `limit` if `cut`. Raises `UserError` for ids that the model does not have."""
    for number, ids in enumerate(inputs, 1):
        if max(ids) >= vocab_size:
            raise UserError(
                f"input {number} has the token {max(ids)}, and this model has tokens from 0 to {vocab_size - 1}: send "
                "text, or ids of the model's own tokenizer (in LangChain, check_embedding_ctx_length=False)."
            )
        if len(ids) > limit and not cut:
            raise UserError(f"input {number} has {len(ids)} tokens; this model takes {limit}: shorten it, or set cut.")
    return [ids[:limit] for ids in inputs]


def _base64(embeddings: Tensor) -> list[str]:
    """Return each embedding as little-endian float32 in base64, as OpenAI's client expects."""
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in embeddings.numpy().astype("<f4")]
