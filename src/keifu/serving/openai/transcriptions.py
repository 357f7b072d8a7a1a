"""POST /v1/audio/transcriptions and /v1/audio/translations: transcripts of a sound file, as text or subtitles."""

from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field
from starlette.responses import PlainTextResponse
from torch import nn

from keifu.data.audio.recordings import read_sound
from keifu.inference.speech.subtitles import FORMATS
from keifu.inference.speech.transcription import Transcript, TranscriptionParams, compression_ratio, transcribe
from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.body import Body, Neutral, form_schema, read_form
from keifu.serving.streaming import json_response
from keifu.serving.worker import GoOn

SECONDS = 3600.0  # maximal length of a sound
Task = Literal["transcribe", "translate"]


class TranscriptionRequest(Body):
    """POST /v1/audio/transcriptions, without its file. beams: as in `keifu transcribe`."""

    model: str = ""
    language: str | None = None
    prompt: str = ""
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    beams: Annotated[int, Field(ge=1, le=16)] = 1
    refused: ClassVar[Neutral] = {
        "temperature": ("0", "0.0"), "stream": ("false",), "timestamp_granularities": ("segment",), "include": (),
        "chunking_strategy": ("auto",),
    }  # fmt: skip


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    async def answer(request: Request, task: Task) -> Response:
        fields, files = await read_form(request, max_files=1)
        if not files:
            raise ApiError(400, "The form has no file: send the sound as file.", "file", "missing_field")
        body = TranscriptionRequest.model_validate_strings(fields, strict=False)
        [(_, name, data)] = files
        settings = TranscriptionParams(body.language or None, task, body.beams, prompt=body.prompt)
        worker = models.worker(models.find(body.model, "transcription").name)

        def work(model: nn.Module, tokenizer: Any, go_on: GoOn) -> Transcript:
            return transcribe(model, tokenizer, read_sound(data, SECONDS, name, go_on), settings, go_on)

        done = await worker.call(work)
        if body.response_format in FORMATS:
            return PlainTextResponse(FORMATS[body.response_format](done))
        return json_response({"text": done.text} | (_verbose(done, task) if body.response_format != "json" else {}))

    form_options: Any = {"tags": ["sound"], "openapi_extra": form_schema(TranscriptionRequest, "file")}

    @app.post("/v1/audio/transcriptions", summary="Transcribe speech", **form_options)
    async def transcriptions(request: Request) -> Response:
        return await answer(request, "transcribe")

    @app.post("/v1/audio/translations", summary="Translate speech into English", **form_options)
    async def translations(request: Request) -> Response:
        return await answer(request, "translate")


def _verbose(done: Transcript, task: Task) -> dict[str, Any]:
    """Return the fields of verbose_json. Segments have OpenAI's field names."""
    segments = [
        {
            "id": n, "seek": 0, "start": part.start, "end": part.end, "text": part.text, "tokens": part.tokens,
            "temperature": part.temperature, "avg_logprob": part.mean_log_probability, "no_speech_prob": part.no_speech,
            "compression_ratio": compression_ratio(part.text),
        }
        for n, part in enumerate(done.segments)
    ]  # fmt: skip
    return {"task": task, "language": done.language or "en", "duration": done.duration, "segments": segments}
