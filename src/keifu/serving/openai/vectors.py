"""POST /v1/embeddings, /v1/rerank, /v1/search and /v1/classify: embeddings of length 1, texts sorted by similarity to a
query, and the label of each text by a trained classifier.

/v1/search finds passages of a folder's documents, by the index of `keifu search`. Clients only see paths relative to
the folder. Links that lead out of the folder are not followed. Path and fields of /v1/classify are those of vLLM.
"""

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from pydantic import Field
from torch import Tensor, nn

from keifu.checkpoints.hub import weights_identity
from keifu.data.classification.input_formats import examples_of
from keifu.data.text.passages import Passage, document_files, read_documents
from keifu.errors import UserError
from keifu.inference.embeddings import clip
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.inference.embeddings.encoders import BATCH, embed_rows, encode_texts
from keifu.inference.embeddings.reranker import is_reranker, rank
from keifu.inference.embeddings.search import SearchIndex, build_index, index_path, language_warning
from keifu.inference.text.model import TwoTowers
from keifu.serving.errors import LOG, ApiError
from keifu.serving.facts import current
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.schemas import Body, Neutral, Texts
from keifu.serving.streaming import json_response
from keifu.serving.worker import GoOn, Loaded

Found = tuple[list[tuple[str, ...]], Tensor, int]  # labels of each text, their probabilities, number of tokens
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingRequest(Body):
    """POST /v1/embeddings.

    input: one text or several, or ids of the model's tokens; a CLIP accepts texts too. dimensions: size of the
    embeddings, which must be the model's. cut: whether to keep the beginning of a text that is longer than the context.
    """

    model: str = ""
    input: str | Annotated[list[str] | Ids | list[Ids], Field(min_length=1, max_length=2048)]
    dimensions: int | None = None

    encoding_format: Literal["float", "base64"] | None = None
    cut: bool = False
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """Texts or ids, as a list."""
        inputs: Any = [self.input] if isinstance(self.input, str) else self.input
        return [inputs] if isinstance(inputs[0], int) else inputs


class RerankRequest(Body):
    """POST /v1/rerank. top_n: number of documents in the answer, the nearest first."""

    model: str = ""
    query: str
    documents: Annotated[list[str], Field(min_length=1, max_length=2048)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    cut: bool = False


class SearchRequest(Body):
    """POST /v1/search. limit: number of passages in the answer, the nearest first. cut: whether to keep the beginning
    of a query that is longer than the context."""

    model: str = ""
    query: str
    limit: Annotated[int, Field(ge=1, le=50)] = 5
    cut: bool = False


class ClassifyRequest(Texts):
    """POST /v1/classify.

    input: one text or several. If the model reads several texts together, separate them by a tab. cut: whether to keep
    the beginning of a text that is longer than the context.
    """

    cut: bool = False
    user: Annotated[str | None, Field(description="Ignored.")] = None
    ignored: ClassVar[Neutral] = {"priority": (0,)}


class Documents:
    """Documents of a folder, and for each model an index of their passages, which is updated when files change."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._indexes: dict[str, tuple[list[Any], SearchIndex]] = {}

    def index(self, source: str, encoder: Loaded) -> SearchIndex:
        """Return the index for the model with that path or name. Only new passages are embedded.

        Building continues if the client leaves, because the next query needs the index. Raises `ApiError` if there is
        no index; only the log has the reason, because it may contain a path.
        """
        try:
            inside = [path for path in document_files(self.folder) if path.resolve().is_relative_to(self.folder)]
            state = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in inside]
            if source not in self._indexes or self._indexes[source][0] != state:
                names = {path: path.relative_to(self.folder).as_posix() for path in inside}
                passages = read_documents(names, partial(LOG.warning, "Left out: %s"))
                path = index_path(self.folder, weights_identity(source), encoder[0])
                self._indexes[source] = state, build_index(passages, encoder, path, BATCH)
        except (UserError, OSError) as error:
            LOG.warning("The documents cannot be searched: %s", error)
            raise ApiError(503, "The documents cannot be searched; see the server's log.", code="no_index") from error
        return self._indexes[source][1]


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    async def compute(about: Description, inputs: Sequence[str] | Sequence[list[int]], cut: bool) -> tuple[Tensor, int]:
        rows, tokens = await models.worker(about.name).call(partial(embed_inputs, about=about, inputs=inputs, cut=cut))
        current().prompt_tokens = tokens
        return rows, tokens

    @app.post("/v1/embeddings", summary="Texts as vectors", tags=["vectors"])
    async def create_embeddings(body: EmbeddingRequest) -> Response:
        about = models.find(body.model, "embedding")
        embeddings, tokens = await compute(about, body.inputs, body.cut)
        check_dimensions(body.dimensions, embeddings)
        encoded = _base64(embeddings) if body.encoding_format == "base64" else embeddings.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": about.name, "usage": usage})

    @app.post("/rerank", include_in_schema=False)  # where clients of vLLM also ask
    @app.post("/v1/rerank", summary="Documents by their nearness to a query", tags=["vectors"])
    async def rerank(body: RerankRequest) -> Response:
        about = models.find(body.model, "rerank")
        scores, tokens = await models.worker(about.name).call(partial(_scores, about=about, body=body))
        current().prompt_tokens = tokens
        best = scores.topk(min(body.top_n or len(scores), len(scores)))
        results = [
            {"index": index, "relevance_score": score}
            | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "model": about.name, "results": results, "usage": usage})

    @app.post("/v1/classify", summary="The label of each text", tags=["vectors"])
    async def classify(body: ClassifyRequest) -> Response:
        name = models.find(body.model, "classification").name
        labels, shares, tokens = await models.worker(name).call(partial(_classify, body=body))
        current().prompt_tokens = tokens
        data = [_label(index, *row) for index, row in enumerate(zip(labels, shares.tolist(), strict=True))]
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": name}
        return json_response({**head, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def _scores(
    model: nn.Module, tokenizer: Any, go_on: GoOn, about: Description, body: RerankRequest
) -> tuple[Tensor, int]:
    """Return the score of each document by a cross-encoder, or its cosine to the query; and the number of tokens."""
    if is_reranker(model):
        ranking = rank(model, tokenizer, body.query, body.documents, body.cut, go_on)
        return ranking.scores, ranking.tokens
    embeddings, tokens = embed_inputs(model, tokenizer, go_on, about, [body.query, *body.documents], body.cut)
    return embeddings[1:] @ embeddings[0], tokens


def search_route(app: FastAPI, models: ServedModels, folder: Path | None) -> None:
    """Add the route for these models and the documents in this folder."""
    documents = None if folder is None else Documents(folder)

    @app.post("/v1/search", summary="Passages of documents by their nearness to a query", tags=["vectors"])
    async def search(body: SearchRequest) -> Response:
        if documents is None:
            raise ApiError(404, "This server has no documents: start it with --search FOLDER.", code="no_documents")
        about, index = models.find(body.model, "embedding"), documents.index

        def nearest(model: Any, tokenizer: Any, go_on: GoOn) -> tuple[list[tuple[float, Passage]], int]:
            query, tokens = embed_inputs(model, tokenizer, go_on, about, [body.query], body.cut)
            return index(about.source, (model, tokenizer)).nearest(query, body.limit), tokens

        hits, tokens = await models.worker(about.name).call(nearest)
        current().prompt_tokens = tokens
        data = [{**asdict(passage), "score": score} for score, passage in hits]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        warning = language_warning(Path(about.source).name, [body.query], [passage.text for _, passage in hits])
        warned = {"warning": warning} if warning else {}
        return json_response({"object": "list", "data": data, "model": about.name, "usage": usage, **warned})


def check_dimensions(dimensions: int | None, embeddings: Tensor) -> None:
    """Raise an error if a client asks for embeddings of another size than the model's."""
    if dimensions not in (None, size := embeddings.shape[1]):
        text = f"dimensions is {dimensions}, and the embeddings of this model have {size} numbers: leave it out."
        raise ApiError(400, text, "dimensions")


def embed_inputs(
    model: nn.Module, tokenizer: Any, go_on: GoOn, about: Description, inputs: Sequence[Any], cut: bool
) -> tuple[Tensor, int]:
    """Return the embeddings on the CPU, and the number of tokens read. go_on: see `Worker.call`."""
    limit = about.config.context_length
    if isinstance(inputs[0], str):
        rows = encode_texts(tokenizer, inputs, limit, cut).rows
    else:
        rows = _checked_ids(inputs, about.config.vocab_size, limit, cut)
    padding = clip.padding(tokenizer) if isinstance(model, TwoTowers) else tokenizer.pad_id or 0
    return embed_rows(model, rows, padding, advance=go_on).cpu(), sum(map(len, rows))


def _checked_ids(inputs: Sequence[list[int]], vocab_size: int, limit: int, cut: bool) -> list[list[int]]:
    """Return the ids, truncated to `limit` if `cut`. Raises `UserError` for ids that the model does not have."""
    for number, ids in enumerate(inputs, 1):
        if max(ids) >= vocab_size:
            wrong = f"input {number} has the token {max(ids)}, and this model has tokens from 0 to {vocab_size - 1}"
            ways = "send text, or ids of the model's own tokenizer (in LangChain, check_embedding_ctx_length=False)"
            raise UserError(f"{wrong}: {ways}.")
        if len(ids) > limit and not cut:
            raise UserError(f"input {number} has {len(ids)} tokens; this model takes {limit}: shorten it, or set cut.")
    return [ids[:limit] for ids in inputs]


def _base64(embeddings: Tensor) -> list[str]:
    """Return each embedding as little-endian float32 in base64, as OpenAI's client expects."""
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in embeddings.numpy().astype("<f4")]


def _classify(model: nn.Module, tokenizer: Any, go_on: GoOn, body: ClassifyRequest) -> Found:
    """Return the labels, their probabilities, and the number of tokens read."""
    go_on()
    classifier = text_classifier(model, tokenizer)
    examples = examples_of(body.texts, classifier.form)
    encoded = classifier.read(examples, classifier.limit, body.cut)
    shares = classifier.predict_proba(encoded.rows).cpu()
    return [classifier.choices(row) for row in examples.rows], shares, _tokens(encoded.rows)


def _label(index: int, labels: Sequence[str], shares: list[float]) -> dict[str, Any]:
    """Return the likeliest label of a text with the probabilities of all. `shares` may be padded."""
    label = labels[max(range(len(labels)), key=shares.__getitem__)]
    counts = {"probs": shares[: len(labels)], "num_classes": len(labels), "labels": labels}
    return {"index": index, "label": label, **counts}


def _tokens(part: Any) -> int:
    """Return the number of ids in rows of ids, or in examples of several rows."""
    return sum(map(_tokens, part)) if isinstance(part, list | tuple) else 1
