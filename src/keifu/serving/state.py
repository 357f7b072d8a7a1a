"""The state of the service: its models, their loading, its health and its figures."""

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.schemas import Body
from keifu.serving.streaming import json_response, whole


class ModelRequest(Body):
    """POST /v1/models/load and /v1/models/unload."""

    model: str = ""


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes, for these models."""

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

    @app.post("/v1/models/load", summary="Load a model now", tags=["state"])
    async def load_model(body: ModelRequest, request: Request) -> Response:
        name = models.named(body.model).name

        async def load() -> dict[str, Any]:
            await models.worker(name).call(lambda *_: None)
            return entry(name)

        return await whole(request, load())

    @app.post("/v1/models/unload", summary="Free the memory of a model", tags=["state"])
    async def unload_model(body: ModelRequest) -> Response:
        name = models.named(body.model).name
        if name in models.workers and not models.unload(name):
            raise ApiError(409, f"The model {name!r} is at work: try again later.", "model", "model_busy", 5)
        return json_response(entry(name))


def health_routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes that programs watch."""

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
