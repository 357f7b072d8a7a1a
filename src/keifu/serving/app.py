"""The application: routes, middleware and the state of the whole service."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from keifu import __version__
from keifu.serving import access, classification, errors, inspection, middleware, page, translations
from keifu.serving.models import ServedModels
from keifu.serving.openai import chat, completions, embeddings, images, responses
from keifu.serving.streaming import json_response

RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": errors.ERROR, "5XX": errors.ERROR}


@dataclass(frozen=True)
class Access:
    """Limits on who may ask, and what.

    keys: any of them opens /v1; none: everyone may ask. origins: pages of other servers that may ask. hosts: names that
    this server answers to; "*" is any. body: the most bytes of a request. strict: whether fields of OpenAI's that
    nothing heeds are refused.
    """

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ("*",)
    body: int = 2**24
    strict: bool = False


def application(models: ServedModels, limits: Access = Access()) -> FastAPI:  # noqa: B008 (it is frozen)
    """Return the service over these models."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(
        title="keifu", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=RESPONSES
    )
    errors.install(app)
    for part in (chat, completions, responses, embeddings, translations, classification, images, inspection):
        part.routes(app, models)
    app.include_router(page.routes())
    _state_routes(app, models)
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


def _state_routes(app: FastAPI, models: ServedModels) -> None:
    """Add the paths that say which models are served, and how the service is."""

    def entry(name: str) -> dict[str, Any]:
        each = models.descriptions[name]
        loaded = name in models.workers and models.workers[name].model is not None
        about = {"uses": each.uses, "context_length": each.context_length, "loaded": loaded}
        about |= {"reads_text": each.tokenizer is not None, "labels": vars(each.config).get("classes") or None}
        return {"id": name, "object": "model", "created": models.began, "owned_by": "keifu", **about}

    @app.get("/v1/models", summary="The models of this server", tags=["state"])
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [entry(name) for name in models.descriptions]})

    @app.get("/v1/models/{name:path}", summary="One model", tags=["state"])
    async def one_model(name: str) -> Response:
        return json_response(entry(models.named(name).name))

    @app.get("/health", summary="Whether the server runs", tags=["state"])
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready", summary="Whether the server takes requests", tags=["state"])
    async def ready() -> Response:
        waiting = {name: worker.pending for name, worker in models.workers.items()}
        return json_response({"status": "ready", "pending": waiting})

    @app.get("/metrics", summary="Figures for Prometheus", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
