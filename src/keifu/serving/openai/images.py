"""POST /v1/images/generations: pictures from a text or a label, as PNG that says how it was drawn."""

import base64
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field, field_validator
from starlette.responses import Response
from torch import Tensor, nn

from keifu.data.images.grid import png
from keifu.errors import unknown
from keifu.generation.images.pipeline import ImagePipeline, image_pipeline
from keifu.generation.images.pixel_diffusion import ImageRequest
from keifu.generation.images.png_metadata import ImageRecord
from keifu.generation.images.samplers import SAMPLERS, SamplerStep
from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.schemas import Body, Refused
from keifu.serving.streaming import whole

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Drawn:
    """A PNG file and the seed of its picture."""

    png: bytes
    seed: int


class ImageGenerationRequest(Body):
    """POST /v1/images/generations. prompt: for models that read. size: WIDTHxHEIGHT, or auto for the model's own. The
    other fields are those of `keifu draw`."""

    model: str
    prompt: str | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    seed: int | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: str | None = None
    guidance: float | None = None
    negative: str = ""
    label: str | None = None
    user: str | None = None
    refused: ClassVar[Refused] = {
        "background": ("auto",), "moderation": ("auto",), "output_compression": (), "output_format": ("png",),
        "partial_images": (0,), "quality": ("auto", "standard"), "stream": (False,), "style": (),
    }  # fmt: skip

    @field_validator("size")
    @classmethod
    def _sides(cls, size: str | None) -> str | None:
        if size not in (None, "auto") and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", size):
            raise ValueError("it must be WIDTHxHEIGHT, such as 64x64, or auto")
        return size


def routes(models: ServedModels) -> APIRouter:
    """The route, for these models."""
    router = APIRouter()
    fingerprints: dict[str, str] = {}

    def draw(model: nn.Module, tokenizer: Any, body: ImageGenerationRequest, left: Event) -> list[Drawn]:
        pipeline = image_pipeline(model, lambda: tokenizer)
        wanted = pipeline.resolved(_request(pipeline, body))
        if body.model not in fingerprints:
            fingerprints[body.model] = pipeline.fingerprint()
        place = str(Path(body.model).resolve()) if Path(body.model).exists() else body.model
        count, device = body.n or 1, next(model.parameters()).device.type
        record = ImageRecord(place, fingerprints[body.model], wanted, count, 1, 0, device=device)
        return [_draw(pipeline, record, number, left) for number in range(count)]

    async def drawn(body: ImageGenerationRequest) -> dict[str, Any]:
        models.find(body.model, "image")
        if body.sampler is not None and body.sampler not in SAMPLERS:
            raise ApiError(400, str(unknown("sampler", body.sampler, SAMPLERS)), "sampler")
        left = Event()
        try:
            found = await models.worker(body.model).call(partial(draw, body=body, left=left))
        finally:
            left.set()
        data = [{"b64_json": base64.b64encode(each.png).decode("ascii"), "seed": each.seed} for each in found]
        return {"created": int(time.time()), "data": data}

    @router.post("/v1/images/generations", summary="Draw pictures", tags=["pictures"])
    async def generations(body: ImageGenerationRequest, request: Request) -> Response:
        return await whole(request, drawn(body))

    return router


def _request(pipeline: ImagePipeline, body: ImageGenerationRequest) -> ImageRequest:
    """The settings in the library's terms, not yet resolved."""
    width, _, height = (body.size or "auto").partition("x")
    return ImageRequest(
        sampler=body.sampler or pipeline.usual_sampler,
        steps=body.steps,
        seed=body.seed,
        label=None if body.label is None else pipeline.label(body.label),
        guidance=pipeline.usual_guidance if body.guidance is None else float(body.guidance),
        size=(int(height), int(width)) if height else None,
        text=body.prompt,
        negative=body.negative,
    )


def _draw(pipeline: ImagePipeline, record: ImageRecord, number: int, left: Event) -> Drawn:
    """One picture, alone, so that `keifu draw --again` draws its file bit for bit; given up once the client `left`."""

    def watch(_: SamplerStep) -> None:
        if left.is_set():
            raise ApiError(499, "The client has left.")

    seed = (record.drawing.seed or 0) + number
    own = ImageRecord(**{**vars(record), "number": number})
    picture: Tensor = pipeline.draw(record.drawing, [seed], watch)[0]
    image = Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).contiguous().numpy(), MODES[len(picture)])
    return Drawn(png(image, own.texts()), seed)
