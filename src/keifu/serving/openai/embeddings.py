"""POST /v1/embeddings and /v1/rerank: texts as vectors of length 1, and documents by how near they are to a query."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response
from torch import Tensor, nn

from keifu.evaluation.classification.embeddings import embed_rows, encode_texts
from keifu.evaluation.images import retrieval
from keifu.generation.text.model import TwoTowers
from keifu.serving.models import ServedModels
from keifu.serving.openai.schemas import Body, Refused, Texts
from keifu.serving.streaming import whole
from keifu.serving.worker import GoOn


class EmbeddingRequest(Texts):
    """POST /v1/embeddings. input: a text or several; a CLIP takes texts too. cut: keep the beginning of a text that is
    longer than the model takes."""

    encoding_format: Literal["float", "base64"] | None = None
    cut: bool = False
    user: str | None = None
    refused: ClassVar[Refused] = {"dimensions": ()}


class RerankRequest(Body):
    """POST /v1/rerank: documents by how near they are to a query. top_n: only so many, the nearest."""

    model: str
    query: str
    documents: Annotated[list[str], Field(min_length=1, max_length=2048)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    cut: bool = False


def routes(app: FastAPI, models: ServedModels) -> None:
    """The routes, for these models."""

    async def embedded(name: str, texts: list[str], cut: bool) -> tuple[Tensor, int]:
        found = models.find(name, "embedding")
        work = partial(_embed, texts=texts, cut=cut, limit=found.config.context_length)
        return await models.worker(name).call(work)

    async def embed(body: EmbeddingRequest) -> dict[str, Any]:
        vectors, tokens = await embedded(body.model, body.texts, body.cut)
        rows = _base64(vectors) if body.encoding_format == "base64" else vectors.tolist()
        data = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body.model, "usage": usage}

    async def rank(body: RerankRequest) -> dict[str, Any]:
        vectors, tokens = await embedded(body.model, [body.query, *body.documents], body.cut)
        scores = vectors[1:] @ vectors[0]
        best = scores.topk(min(body.top_n or len(scores), len(scores)))
        results = [
            {"index": place, "relevance_score": score}
            | ({"document": {"text": body.documents[place]}} if body.return_documents else {})
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return {"object": "list", "model": body.model, "results": results, "usage": {"total_tokens": tokens}}

    @app.post("/v1/embeddings", summary="Texts as vectors", tags=["vectors"])
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await whole(request, embed(body))

    @app.post("/v1/rerank", summary="Documents by their nearness to a query", tags=["vectors"])
    async def rerank(body: RerankRequest, request: Request) -> Response:
        return await whole(request, rank(body))


def _embed(
    model: nn.Module, tokenizer: Any, go_on: GoOn, texts: Sequence[str], cut: bool, limit: int
) -> tuple[Tensor, int]:
    """The vectors on the CPU, and how many tokens were read. go_on: see `Worker.call`."""
    rows = encode_texts(tokenizer, texts, limit, cut).rows
    padding = retrieval.padding(tokenizer) if isinstance(model, TwoTowers) else tokenizer.pad_id or 0
    return embed_rows(model, rows, padding, advance=go_on).cpu(), sum(map(len, rows))


def _base64(vectors: Tensor) -> list[str]:
    """Each vector as little-endian float32, which OpenAI's client asks for."""
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors.numpy().astype("<f4")]
