"""POST /v1/images/generations and /v1/images/edits: pictures from a text, a label or a picture.

Each is a PNG file that contains its settings. A stream shows intermediate states of sampling.
"""

import asyncio
import base64
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field, field_validator
from torch import Tensor, nn

from keifu.data.images.grid import png
from keifu.data.images.io import open_image, read_image, to_bytes, to_image
from keifu.errors import UserError, unknown
from keifu.files import sha256
from keifu.inference.images.image_to_image import InputImage
from keifu.inference.images.latent_diffusion import TextPipeline
from keifu.inference.images.pipeline import ImagePipeline, image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.png_metadata import ImageRecord
from keifu.inference.images.samplers import SAMPLERS, SamplerStep
from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.body import Body, Neutral, form_schema, read_form
from keifu.serving.streaming import STREAM, EventStream, json_response
from keifu.serving.worker import GoOn

PICTURE_BYTES = 2**26  # maximum of a decoded picture: 22 megapixels in colour
ROLES = {"image": "init", "mask": "mask"}  # files of a form, by their names in the library
Files = Mapping[str, tuple[str, bytes]]  # name and bytes of "image" and "mask"
Show = Callable[[int, int, Tensor], None]  # index of a picture, number of earlier states, its state


class ImageGenerationRequest(Body):
    """POST /v1/images/generations.

    prompt: for models that read text; for others the name of a class, or empty. size: WIDTHxHEIGHT, or auto for the
    model's default. response_format: url gives a data URL, which contains the picture. partial_images: number of states
    that a stream shows before the picture. The other fields are those of `keifu draw`.
    """

    model: str = ""
    prompt: str | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=100)] | None = None
    seed: int | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: str | None = None
    guidance: float | None = None
    negative: str = ""
    label: str | int | None = None
    user: str | None = None
    refused: ClassVar[Neutral] = {"background": ("auto", "opaque"), "output_format": ("png",)}
    ignored: ClassVar[Neutral] = {
        "input_fidelity": (), "moderation": ("auto",), "output_compression": (), "quality": ("auto", "standard"),
        "style": (),
    }  # fmt: skip

    @field_validator("size")
    @classmethod
    def _sides(cls, size: str | None) -> str | None:
        if size not in (None, "auto") and not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", size):
            raise ValueError("it must be WIDTHxHEIGHT, such as 64x64, or auto")
        return size


class ImageEditRequest(ImageGenerationRequest):
    """POST /v1/images/edits, without its files. strength: share of the steps that are run on the picture."""

    strength: float | None = None


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""
    fingerprints: dict[str, str] = {}

    async def draw_pictures(body: ImageGenerationRequest, files: Files, show: Show = lambda *_: None) -> dict[str, Any]:
        work = partial(_draw_all, body=body, files=files, fingerprints=fingerprints, show=show)
        data = await models.worker(body.model).call(work)
        if body.response_format == "url":
            data = [{"url": f"data:image/png;base64,{entry['b64_json']}", "seed": entry["seed"]} for entry in data]
        return {"created": int(time.time()), "data": data}

    async def answer(body: ImageGenerationRequest, files: Files, event_name: str) -> Response:
        body.model = models.find(body.model, "image").name
        if body.sampler is not None and body.sampler not in SAMPLERS:
            raise ApiError(400, str(unknown("sampler", body.sampler, SAMPLERS)), "sampler")
        if body.stream:
            return EventStream(
                _events(partial(draw_pictures, body, files), event_name), models.limits.timeout, names_events=True
            )
        return json_response(await draw_pictures(body, files))

    @app.post("/v1/images/generations", summary="Draw pictures", tags=["pictures"], responses=STREAM)
    async def generations(body: ImageGenerationRequest) -> Response:
        return await answer(body, {}, "image_generation")

    form_options: Any = {"responses": STREAM, "openapi_extra": form_schema(ImageEditRequest, "image", "mask")}

    @app.post("/v1/images/edits", summary="Draw on a picture", tags=["pictures"], **form_options)
    async def edits(request: Request) -> Response:
        fields, sent = await read_form(request, max_files=2)
        body = ImageEditRequest.model_validate_strings(fields, strict=False)
        if (names := sorted(name for name, *_ in sent)) not in (["image"], ["image", "mask"]):
            raise ApiError(400, f"The files are {names}: send one as image, and one as mask if any.", "image")
        return await answer(body, {name: (file_name, data) for name, file_name, data in sent}, "image_edit")


async def _events(work: Callable[[Show], Any], event_name: str) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the intermediate states of a picture, then the pictures."""
    loop, out = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def show(number: int, index: int, picture: Tensor) -> None:
        event = {"index": number, "partial_image_index": index, "b64_json": _encoded(picture, {})}
        loop.call_soon_threadsafe(out.put_nowait, {"type": f"{event_name}.partial_image", **event})

    task = asyncio.ensure_future(work(show))
    task.add_done_callback(lambda _: out.put_nowait(None))
    try:
        while (event := await out.get()) is not None:
            yield event
        result = await task
        for number, entry in enumerate(result["data"]):
            yield {"type": f"{event_name}.completed", "index": number, "created_at": result["created"], **entry}
    finally:
        task.cancel()


def _draw_all(
    model: nn.Module, tokenizer: Any, go_on: GoOn, body: ImageGenerationRequest, files: Files,
    fingerprints: dict[str, str], show: Show,
) -> list[dict[str, Any]]:  # fmt: skip
    """Draw all pictures of a request.

    fingerprints: hashes of the models that have drawn; missing ones are computed. go_on: see `Worker.call`.
    """
    pipeline = image_pipeline(model, lambda: tokenizer)
    with TemporaryDirectory() as folder:
        input_files = {name: _write_input(Path(folder) / name, *file) for name, file in files.items()}
        try:
            request_given = _request(pipeline, body, input_files)
            _check_sides(model.config.size, request_given.sides())
            request = pipeline.resolved(request_given)
        except UserError as error:  # report files by the field names that the client used
            text = str(error).replace(f"{folder}/", "").replace("(see --label)", "and give a class as label")
            raise UserError(text) from error
        if body.model not in fingerprints:
            fingerprints[body.model] = pipeline.fingerprint()
        count, device = body.n or 1, next(model.parameters()).device.type
        record = ImageRecord(body.model, fingerprints[body.model], request, count, 1, 0, device=device)
        names = {ROLES[name]: file[0] for name, file in files.items()}
        n_partial = body.partial_images or 0 if body.stream else 0
        return [_draw(pipeline, replace(record, number=n), names, n_partial, go_on, show) for n in range(count)]


def _check_sides(trained: Any, sides: tuple[int, int] | None) -> None:
    """Raise an error for a picture of more than 16 times the pixels that the model was trained with.

    Memory grows with the pixels, and time with their square. trained: a side, or height and width; None, if unknown,
    means 256.
    """
    height, width = trained if isinstance(trained, tuple) else (trained or 256,) * 2
    if sides is not None and math.prod(sides) > 16 * height * width:
        size_text, most = f"{sides[1]}x{sides[0]}", f"{4 * width}x{4 * height}"
        raise ApiError(
            400, f"size is {size_text}, and this model draws no more than {most} here: ask for less.", "size"
        )


def _write_input(path: Path, name: str, data: bytes) -> InputImage:
    """Check a file of the request and write it to disk. The transparent part of a mask is generated, as in OpenAI's
    API."""
    read_image(data, name, PICTURE_BYTES)
    path.write_bytes(data)
    if path.name == "mask":
        with open_image(path) as image:
            if "A" in image.getbands() and any(image.getchannel("A").histogram()[:-1]):
                image.getchannel("A").point(lambda alpha: 255 - alpha).save(path, "PNG")
    return InputImage(str(path), sha256(path))


def _request(pipeline: ImagePipeline, body: ImageGenerationRequest, files: Mapping[str, InputImage]) -> ImageRequest:
    """Return the request for the library, without defaults. The prompt of a model without text may name a class."""
    label, text = body.label, body.prompt
    if not isinstance(pipeline, TextPipeline):
        text = text or None  # OpenAI's client always sends a prompt
        label, text = (text, None) if label is None else (label, text)
    width, _, height = (body.size or "auto").partition("x")
    return ImageRequest(
        sampler=body.sampler or pipeline.usual_sampler,
        steps=body.steps,
        seed=body.seed,
        label=None if label is None else pipeline.label(str(label)),
        guidance=pipeline.usual_guidance if body.guidance is None else float(body.guidance),
        size=(int(height), int(width)) if height else None,
        text=text,
        negative=body.negative,
        init=files.get("image"),
        mask=files.get("mask"),
        strength=body.strength if isinstance(body, ImageEditRequest) else None,
    )


def _draw(
    pipeline: ImagePipeline, record: ImageRecord, names: Mapping[str, str], count: int, go_on: GoOn, show: Show
) -> dict[str, Any]:
    """Draw one picture alone, so that `keifu draw --again` reproduces its file bit for bit. go_on: see `Worker.call`.

    names: input files by role. count: number of states that are shown.
    """
    number, steps, done, n_shown = record.number or 0, max(1, record.drawing.n_steps), 0, 0
    count = min(count, steps)

    def watch(state: SamplerStep) -> None:
        nonlocal done, n_shown
        go_on()
        done += 1
        if done * count // steps > n_shown:
            x = state.x if pipeline.pixels else state.x[:, :3] / state.x[:, :3].abs().amax()
            show(number, n_shown, to_bytes(x)[0].cpu())
            n_shown = done * count // steps

    seed = (record.drawing.seed or 0) + number
    picture: Tensor = pipeline.draw(record.drawing, [seed], watch)[0]
    named_files = {role: replace(vars(record.drawing)[role], place=name) for role, name in names.items()}
    described = replace(record, drawing=replace(record.drawing, **named_files))
    return {"b64_json": _encoded(picture, described.texts()), "seed": seed}


def _encoded(picture: Tensor, texts: Mapping[str, str]) -> str:
    """Return a PNG file with these text fields, in base64."""
    return base64.b64encode(png(to_image(picture), texts)).decode("ascii")
