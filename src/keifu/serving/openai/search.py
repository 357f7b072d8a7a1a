"""POST /v1/search: the passages of a folder's documents that are nearest to a question, by the index of `keifu search`.

Clients only see paths relative to the folder. Links that lead out of the folder are not followed.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from keifu.checkpoints.hub import weights_identity
from keifu.data.text.passages import Passage, document_files, read_documents
from keifu.errors import UserError
from keifu.evaluation.classification.embeddings import BATCH
from keifu.evaluation.classification.search import SearchIndex, build_index, index_path
from keifu.serving.errors import LOG, ApiError
from keifu.serving.facts import current
from keifu.serving.models import ServedModels
from keifu.serving.openai.embeddings import embed_inputs
from keifu.serving.openai.schemas import Body
from keifu.serving.streaming import whole
from keifu.serving.worker import GoOn, Loaded


class SearchRequest(Body):
    """POST /v1/search. limit: number of passages in the answer, the nearest first. cut: whether to keep the beginning
    of a query that is longer than the context."""

    model: str = ""
    query: str
    limit: Annotated[int, Field(ge=1, le=50)] = 5
    cut: bool = False


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


def routes(app: FastAPI, models: ServedModels, folder: Path | None) -> None:
    """Add the route for these models and the documents in this folder."""
    documents = None if folder is None else Documents(folder)

    async def answer(body: SearchRequest) -> dict[str, Any]:
        if documents is None:
            raise ApiError(404, "This server has no documents: start it with --search FOLDER.", code="no_documents")
        about, index = models.find(body.model, "embedding"), documents.index

        def nearest(model: Any, tokenizer: Any, go_on: GoOn) -> tuple[list[tuple[float, Passage]], int]:
            query, tokens = embed_inputs(model, tokenizer, go_on, about, [body.query], body.cut)
            return index(about.source, (model, tokenizer)).nearest(query, body.limit), tokens

        hits, tokens = await models.worker(about.name).call(nearest)
        data = [{**asdict(passage), "score": score} for score, passage in hits]
        current().prompt_tokens = tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": about.name, "usage": usage}

    @app.post("/v1/search", summary="Passages of documents by their nearness to a query", tags=["vectors"])
    async def search(body: SearchRequest, request: Request) -> Response:
        return await whole(request, answer(body))
