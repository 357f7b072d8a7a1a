"""Application of the service: routes, middleware and state."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from keifu import __version__
from keifu.serving import access, errors, inspection, middleware, page, state, translations
from keifu.serving.models import ServedModels
from keifu.serving.openai import chat, completions, images, responses, transcriptions, vectors
from keifu.serving.protocols import anthropic, ollama, ollama_models

OPENAI = (chat, completions, responses, vectors, images, transcriptions)
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": errors.ERROR, "5XX": errors.ERROR}


@dataclass(frozen=True)
class Access:
    """Limits on requests.

    keys: API keys that open /v1; empty: no key is needed. origins: other web pages that may send requests. hosts: names
    of this server; "*" is any. body: maximal bytes of a request. strict: whether fields of OpenAI's API without effect
    are refused. runs: folder of the runs that the page shows. documents: folder for search.
    """

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ("*",)
    body: int = 2**24
    strict: bool = False
    runs: Path = Path("runs")
    documents: Path | None = None


def application(models: ServedModels, limits: Access = Access()) -> FastAPI:  # noqa: B008 (it is frozen)
    """Return the service for these models."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        unloading = asyncio.create_task(models.unload_idle())
        yield
        unloading.cancel()
        await models.close()

    app = FastAPI(
        title="keifu", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=RESPONSES
    )
    errors.install(app)
    for part in (*OPENAI, translations, inspection, anthropic, ollama, ollama_models, state):
        part.routes(app, models)
    state.health_routes(app, models)
    state.run_routes(app, limits.runs)
    vectors.search_route(app, models, limits.documents)
    app.include_router(page.routes())
    app.add_middleware(middleware.JsonBodies)
    app.add_middleware(middleware.BodyLimit, limit=limits.body)
    app.add_middleware(access.ApiKeys, keys=limits.keys)
    app.add_middleware(access.Origins, origins=limits.origins, hosts=limits.hosts)
    if limits.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=limits.origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    app.add_middleware(access.Hosts, names=limits.hosts)
    app.add_middleware(middleware.Requests, metrics=models.metrics, strict=limits.strict)
    return app
