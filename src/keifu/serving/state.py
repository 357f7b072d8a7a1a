"""State of the service: its models, loading, health and metrics; and runs in training."""

import time
from contextlib import suppress
from os import SEEK_END
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse

from keifu.errors import UserError, unknown
from keifu.inference.chat.prompts import sees
from keifu.inference.text.sampling_params import ANSWER_TOKENS, sampling_for
from keifu.locks import LOCK
from keifu.native.library import instructions_in_use
from keifu.serving.errors import ApiError
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.schemas import NUMBERS, Body
from keifu.serving.streaming import json_response

SHOWN = [name for name in NUMBERS if name != "seed"]  # settings that clients see
METRICS = "metrics.jsonl"  # metrics file of a run
MOST_BYTES = 2**20  # maximal bytes of metrics in one answer


class ModelRequest(Body):
    """POST /v1/models/load and /v1/models/unload."""

    model: str = ""


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    def entry(name: str) -> dict[str, Any]:
        model = models.descriptions[name]
        loaded = name in models.workers and models.workers[name].model is not None
        about = {"uses": model.uses, "context_length": model.context_length, "loaded": loaded}
        about |= {"reads_text": model.tokenizer is not None, "labels": vars(model.config).get("classes") or None}
        about |= {"fills_masks": bool(vars(model.config).get("words")), "defaults": _defaults(model)}
        about |= {"sees": sees(model.config)}
        return {"id": name, "object": "model", "created": models.began, "owned_by": "keifu", **about}

    @app.get("/v1/models", summary="The models of this server", tags=["state"])
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [entry(name) for name in models.descriptions]})

    @app.get("/v1/models/{name:path}", summary="One model", tags=["state"])
    async def one_model(name: str) -> Response:
        return json_response(entry(models.description_of(name).name))

    @app.post("/v1/models/load", summary="Load a model now", tags=["state"])
    async def load_model(body: ModelRequest) -> Response:
        await run_in_threadpool(models.add_from_folder, body.model)
        name = models.description_of(body.model).name
        await models.worker(name).call(lambda *_: None)
        return json_response(entry(name))

    @app.post("/v1/models/unload", summary="Free the memory of a model", tags=["state"])
    async def unload_model(body: ModelRequest) -> Response:
        name = models.description_of(body.model).name
        if name in models.workers and not models.unload(name):
            raise ApiError(409, f"The model {name!r} is at work: try again later.", "model", "model_busy", 5)
        return json_response(entry(name))


def _defaults(about: Description) -> dict[str, Any] | None:
    """Return the default settings of a model that generates text, restricted to fields of `Sampling`."""
    if "completion" not in about.uses:
        return None
    with suppress(UserError):  # generation_config.json is damaged; an answer will report it
        settings = vars(sampling_for(about.tokenizer, {}, ANSWER_TOKENS if "chat" in about.uses else 256))
        return {name: settings[name] for name in SHOWN}
    return None


def run_routes(app: FastAPI, folder: Path) -> None:
    """Add the routes by which the page follows the runs in this folder. Only their metrics are read."""

    def runs() -> dict[str, Path]:
        """Return the metrics file of each run in the folder, the latest first. Links out of the folder are skipped."""
        files = (path.resolve() for path in folder.glob(f"*/{METRICS}"))
        inside = [path for path in files if path.is_file() and path == folder.resolve() / path.parent.name / METRICS]
        return {path.parent.name: path for path in sorted(inside, key=lambda path: -path.stat().st_mtime)}

    @app.get("/v1/runs", summary="The training runs that can be followed", tags=["state"])
    def list_runs() -> Response:
        data = [{"id": name, "object": "run", "modified": path.stat().st_mtime} for name, path in runs().items()]
        return json_response({"object": "list", "data": data})

    @app.get("/v1/runs/{name}", summary="Figures of a run, from a byte of its metrics.jsonl on", tags=["state"])
    def one_run(name: str, start: Annotated[int, Query(ge=0)] = 0) -> Response:
        if name not in (folders := runs()):
            raise ApiError(404, str(unknown("run", name, folders)), "name", "run_not_found")
        with folders[name].open("rb") as file:
            size = file.seek(0, SEEK_END)
            start = file.seek(start if start <= size else 0)  # a shorter file means that the run began again
            text = file.read(MOST_BYTES)
        lines, end, _ = text.rpartition(b"\n")
        seconds = max(0.0, time.time() - folders[name].stat().st_mtime)
        about: dict[str, Any] = {"next": start + len(lines) + len(end), "seconds": round(seconds, 1)}
        about |= {"running": (folders[name].parent / LOCK).exists()}  # a killed process leaves it
        about |= {"lines": lines.decode(errors="replace").splitlines()}
        return json_response({"object": "run", "id": name, **about})


def health_routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for monitoring."""

    @app.get("/health", summary="Whether the server runs", tags=["state"])
    async def health() -> Response:
        return json_response({"status": "ok", "instructions": instructions_in_use()})

    @app.get("/ready", summary="Whether the server takes requests", tags=["state"])
    async def ready() -> Response:
        waiting = {name: worker.pending for name, worker in models.workers.items()}
        return json_response({"status": "ready", "pending": waiting})

    @app.get("/metrics", summary="Figures for Prometheus", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
