"""/api/tags, /api/show, /api/ps, /api/version, /api/embed and /api/embeddings: models and embeddings for clients of
ollama."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Response
from pydantic import Field

from keifu import __version__
from keifu.data.chat.thoughts import OPEN
from keifu.data.tokenizers.chat_template import template_variables
from keifu.inference.chat.prompts import sees
from keifu.serving.errors import TEXT_ERRORS
from keifu.serving.facts import current
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.body import Body, Neutral
from keifu.serving.openai.vectors import check_dimensions, embed_inputs
from keifu.serving.streaming import json_response
from keifu.serving.tool_parsers.harmony import speaks_harmony

USES = ("chat", "completion", "embedding")  # of models that a client of ollama can use
CLIENTS: Any = {"tags": ["other clients"], "responses": TEXT_ERRORS}


class OllamaShow(Body):
    """POST /api/show. name: the earlier name of the field model."""

    model: str = ""
    name: str = ""
    ignored: ClassVar[Neutral] = {"verbose": (False,)}


class OllamaEmbed(Body):
    """POST /api/embed. truncate: whether to keep the beginning of a text that is longer than the context."""

    model: str = ""
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    truncate: bool | None = None
    dimensions: int | None = None
    ignored: ClassVar[Neutral] = {"options": ({},), "keep_alive": ()}


class OllamaEmbedding(Body):
    """POST /api/embeddings, the earlier form of /api/embed."""

    model: str = ""
    prompt: str
    ignored: ClassVar[Neutral] = {"options": ({},), "keep_alive": ()}


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    def listed(names: Sequence[str]) -> list[dict[str, Any]]:
        able = [models.descriptions[name] for name in names if {*USES} & {*models.descriptions[name].uses}]
        return [{"name": about.name, "model": about.name, **_facts(about)} for about in able]

    async def embed(model: str, inputs: list[str], cut: bool, dimensions: int | None = None) -> tuple[str, Any, int]:
        about = models.find(model.removesuffix(":latest"), "embedding")
        work = partial(embed_inputs, about=about, inputs=inputs, cut=cut)
        rows, tokens = await models.worker(about.name).call(work)
        check_dimensions(dimensions, rows)
        current().prompt_tokens = tokens
        return about.name, rows.tolist(), tokens

    @app.get("/api/tags", summary="The models for text and embeddings (ollama)", **CLIENTS)
    async def tags() -> Response:
        began = datetime.fromtimestamp(models.began, UTC).isoformat()
        return json_response({"models": [{**entry, "modified_at": began} for entry in listed([*models.descriptions])]})

    @app.get("/api/ps", summary="The models in memory (ollama)", **CLIENTS)
    async def running() -> Response:
        names = [name for name in models.descriptions if name in models.workers and models.workers[name].model]
        seconds = models.limits.keep_alive
        end = datetime.max.replace(tzinfo=UTC) if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        memory = {"expires_at": end.isoformat(), "size_vram": 0}
        lengths = {name: models.descriptions[name].context_length for name in names}
        entries = [{**entry, **memory, "context_length": lengths[entry["name"]]} for entry in listed(names)]
        return json_response({"models": entries})

    @app.get("/api/version", summary="The version of keifu (ollama)", **CLIENTS)
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.post("/api/show", summary="Facts about a model (ollama)", **CLIENTS)
    async def show(body: OllamaShow) -> Response:
        about = models.description_of((body.model or body.name).removesuffix(":latest"))
        family = _family(about)
        info = {"general.architecture": family, f"{family}.context_length": about.context_length}
        template = about.tokenizer.chat_template if about.tokenizer is not None else None
        began = datetime.fromtimestamp(models.began, UTC).isoformat()
        facts = {"template": template or "", "parameters": "", "model_info": info, "capabilities": _capabilities(about)}
        return json_response({"modified_at": began, "details": _facts(about)["details"], **facts})

    @app.post("/api/embed", summary="Texts as vectors (ollama)", **CLIENTS)
    async def embed_texts(body: OllamaEmbed) -> Response:
        begin, inputs = time.monotonic_ns(), [body.input] if isinstance(body.input, str) else body.input
        name, rows, tokens = await embed(body.model, inputs, body.truncate is not False, body.dimensions)
        figures = {"total_duration": time.monotonic_ns() - begin, "load_duration": 0, "prompt_eval_count": tokens}
        return json_response({"model": name, "embeddings": rows, **figures})

    @app.post("/api/embeddings", summary="A text as a vector (ollama)", **CLIENTS)
    async def embed_text(body: OllamaEmbedding) -> Response:
        return json_response({"embedding": (await embed(body.model, [body.prompt], True))[1][0]})


def _family(about: Description) -> str:
    """Return the name of a model's family: that of its file."""
    return type(about.config).__module__.rpartition(".")[2]


def _facts(about: Description) -> dict[str, Any]:
    details = {"family": _family(about), "families": [_family(about)], "format": "safetensors"}
    details |= {"parent_model": "", "parameter_size": "", "quantization_level": ""}
    return {"size": about.size, "digest": "", "details": details}


def _capabilities(about: Description) -> list[str]:
    """Return the abilities of a model by ollama's names."""
    template = (about.tokenizer.chat_template or "") if about.tokenizer is not None else ""
    in_channels = about.tokenizer is not None and speaks_harmony(about.tokenizer)
    thinks = OPEN in template or "enable_thinking" in template_variables(template) or in_channels
    abilities = {
        "completion": "completion" in about.uses, "tools": "chat" in about.uses, "vision": sees(about.config),
        "thinking": thinks, "embedding": "embedding" in about.uses,
    }  # fmt: skip
    return [name for name, able in abilities.items() if able]
