"""PNG metadata: model, settings and seed of a generated image, so that it can be generated again bit for bit."""

import json
import math
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from keifu import __version__
from keifu.data.images.io import check_size, open_image
from keifu.errors import UserError
from keifu.inference.images.image_to_image import InputImage
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.untrusted import parse_json, plain_file

CHUNK = "keifu"
MOST_PICTURES, MOST_THREADS = 10_000, 1024  # maxima for a record that is drawn again


def versions() -> dict[str, str]:
    """Return the versions of the software on which a picture's bits depend."""
    return {"keifu": __version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class LoraRecord:
    """Record of a LoRA: its file, the SHA-256 of its bytes, and its scale (1 as trained)."""

    place: str
    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class ImageRecord:
    """Everything that determines a picture.

    model: path or name of the model. weights: their `fingerprint`, with LoRAs merged. drawing: the settings, with the
    first picture's seed. count, batch_size: number of requested pictures, and of those drawn at once; each picture's
    seed is one higher than the previous one's. number: index of this picture from 0; None for a sheet. kept: indices of
    the pictures on the sheet; () for all. threads: number of threads, over which matrix multiplications were split.
    loras: those merged into the weights.
    """

    model: str
    weights: str
    drawing: ImageRequest
    count: int = 1
    batch_size: int = 1
    number: int | None = 0
    dtype: str | None = None
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=versions)
    kept: tuple[int, ...] = ()
    loras: tuple[LoraRecord, ...] = ()

    def seeds(self) -> list[list[int]]:
        """Return the seeds of each batch that contains this picture, or pictures of this sheet."""
        if self.batch_size < 1 or not 0 <= (self.number or 0) < self.count:
            raise UserError(f"The record is wrong: picture {self.number} of {self.count}, {self.batch_size} at a time.")
        first = self.drawing.seed or 0
        numbers = [first + number for number in range(self.count)]
        batches = [numbers[start : start + self.batch_size] for start in range(0, self.count, self.batch_size)]
        return batches if self.number is None else [batches[self.number // self.batch_size]]

    def texts(self) -> dict[str, str]:
        """Return the text fields of the PNG file: the record as JSON, and a sentence for people."""
        request = self.drawing
        seed = (request.seed or 0) + (self.number or 0)
        text = "" if request.text is None else f" from {request.text!r}"
        text += "" if request.init is None else f" on {request.init.place}"
        sentence = f"Drawn by {self.model}{text}, {request.sampler}, {request.steps} steps, seed {seed}"
        record = json.dumps(asdict(self), ensure_ascii=False)
        return {CHUNK: record, "Software": f"keifu {__version__}", "Description": sentence}


def read_record(path: Path) -> ImageRecord:
    """Return the record in a PNG file. Raises `UserError` if there is none or it is damaged."""
    plain_file(path, "picture")
    try:
        with open_image(path) as image:
            check_size(image, str(path))
            image.load()
            chunk = image.info.get(CHUNK)
    except UnidentifiedImageError:
        raise UserError(f"{path} is no picture.") from None
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    if chunk is None:
        raise UserError(f"{path} does not say how it was drawn: it was not drawn by keifu, or was saved anew since.")
    try:
        return _record(parse_json(chunk, path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"The record of {path} cannot be read ({error}): another keifu wrote it.") from error


def check_limits(record: ImageRecord, path: Path) -> None:
    """Raise `UserError` for a record with more pictures or pixels than the file has, or than a computer can draw."""
    with open_image(path) as image:
        pixels = math.prod(image.size)
    n_pictures = 1 if record.number is not None else len(record.kept) or record.count
    for name, value, most in (
        ("count", record.count, MOST_PICTURES),
        ("highest number", max(record.kept, default=0) + 1, record.count),
        ("candidates", record.drawing.candidates, MOST_PICTURES),
        ("threads", record.threads, MOST_THREADS),
        ("number of pixels", n_pictures * math.prod(record.drawing.size or ()), pixels),
    ):
        if not 1 <= value <= most:
            raise UserError(f"The record of {path} gives the {name} as {value:,}, which must be from 1 to {most:,}.")


def _record(json: dict[str, Any]) -> ImageRecord:
    settings = dict(json["drawing"])
    settings["size"] = tuple(settings["size"])
    for name in ("init", "mask", "towards"):
        facts = settings.get(name)
        settings[name] = InputImage(**facts) if isinstance(facts, dict) else facts
    json = {"kept": (), "loras": (), **json}  # missing in older pictures
    missing_fields = {field.name for field in fields(ImageRecord)} - json.keys()
    if missing_fields:
        raise KeyError(", ".join(sorted(missing_fields)))
    facts = {"drawing": ImageRequest(**settings), "kept": tuple(json["kept"])}
    return ImageRecord(**{**json, **facts, "loras": tuple(LoraRecord(**lora) for lora in json["loras"])})
