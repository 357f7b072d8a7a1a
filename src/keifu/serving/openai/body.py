"""Base class of all request bodies, forms, and the parts of messages.

Every field has an effect, is ignored, or is refused by name (see `schemas`).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile

from keifu.errors import unknown
from keifu.serving.facts import current
from keifu.serving.openai.constraints import SURROGATE

OF_STREAMS = ("stream_options", "partial_images")  # they have an effect only in streams
INSTEAD = {"lora": "choose an adapter by its name as model (keifu serve --lora NAME=PATH)"}  # advice for refused fields
Neutral = dict[str, tuple[Any, ...]]  # by field, values without effect


def about(error_type: Literal["unknown_field", "refused_field"], name: str, sentence: str) -> PydanticCustomError:
    return PydanticCustomError(error_type, "{sentence}", {"name": name, "sentence": sentence})


class Body(BaseModel):
    """JSON object of known fields.

    refused: fields of OpenAI's API that this server does not support. ignored: fields that are only hints. Both are by
    field the values, in addition to null, that have no effect. allows_null: whether an unknown field may be null, as in
    messages that a client sends back.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    refused: ClassVar[Neutral] = {}
    ignored: ClassVar[Neutral] = {}
    allows_null: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        facts = current()
        absent = cls.refused | cls.ignored
        for name, value in data.items():
            if SURROGATE.search(name):
                raise about("unknown_field", "?", "A field's name has half a surrogate pair: send whole characters.")
            changes = name in absent and value is not None and value not in absent[name]
            if changes and (name in cls.refused or facts.strict):
                advice = INSTEAD.get(name, "leave it out")
                raise about("refused_field", name, f"{name} is not supported by this server: {advice}.")
            facts.ignored += [name] * changes
            if name in OF_STREAMS and value not in (None, 0, "0") and data.get("stream") in (None, False, "false"):
                raise about("refused_field", name, f"{name} is for streams: give stream as true too, or leave it out.")
            field_names = [field.alias or name for name, field in cls.model_fields.items()]
            if name not in absent and name not in field_names and not (cls.allows_null and value is None):
                raise about("unknown_field", name, str(unknown("field", name, field_names)))
        dropped = {name for name, value in data.items() if cls.allows_null and value is None}
        return {name: value for name, value in data.items() if name not in absent.keys() | dropped}


async def read_form(request: Request, max_files: int) -> tuple[dict[str, str], list[tuple[str, str, bytes]]]:
    """Return the fields of a form, and its files. A file has its field's name, its own name and its bytes."""
    async with request.form(max_files=max_files) as form:
        fields = [(name.removesuffix("[]"), value) for name, value in form.multi_items()]
        files = [(n, v.filename or n, await v.read()) for n, v in fields if isinstance(v, UploadFile)]
    return {name: value for name, value in fields if isinstance(value, str)}, files


def form_schema(body_class: type[BaseModel], *files: str) -> dict[str, Any]:
    """Return the description of a form for OpenAPI. The first of its files is required."""
    schema = body_class.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [files[0]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class ImageUrl(Body):
    """Picture in a message: a data URL, or a file:// URL if the server permits its folder."""

    url: str
    ignored: ClassVar[Neutral] = {"detail": ("auto",)}


class Part(Body):
    """Part of a message: a text or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None
    refused: ClassVar[Neutral] = {"input_audio": (), "file": ()}
    ignored: ClassVar[Neutral] = {"cache_control": ()}
    allows_null: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_one(self) -> "Part":
        return _one_of(self, self.type == "image_url", self.image_url)

    @property
    def url(self) -> str | None:
        """URL of the picture; None for a text."""
        return self.image_url and self.image_url.url


def _one_of(part: Any, pictured: bool, url: Any) -> Any:
    """Return a part of a message after checking that it has either text or a picture, as its type says."""
    if pictured == (url is None) or pictured == (part.text is not None):
        raise ValueError(f"a part of the type {part.type!r} needs {'image_url' if pictured else 'text'} alone")
    return part


def content_of(content: str | Sequence[Any] | None) -> dict[str, Any]:
    """Return the text of a message (parts joined by line breaks) and the URLs of its pictures."""
    parts = () if isinstance(content, str) else content or ()
    images = [part.url for part in parts if part.url]
    text = content if isinstance(content, str) else "\n".join(part.text for part in parts if part.text is not None)
    return {"content": text, **({"images": images} if images else {})}


class ItemPart(Body):
    """Part of an item: the user's text or picture, or the model's text in an earlier answer."""

    type: Literal["input_text", "output_text", "input_image"]
    text: str | None = None
    image_url: str | None = None
    refused: ClassVar[Neutral] = {"annotations": ([],), "logprobs": ([],), "file_id": ()}
    ignored: ClassVar[Neutral] = {"detail": ("auto",), "parsed": ()}
    allows_null: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_one(self) -> "ItemPart":
        return _one_of(self, self.type == "input_image", self.image_url)

    @property
    def url(self) -> str | None:
        """URL of the picture; None for a text."""
        return self.image_url
