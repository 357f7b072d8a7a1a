"""Reading of image files: each becomes RGB or grey, 8 bits, upright, on a white background.

ICC colour profiles are not applied.

Axes: picture, row, column; for colour images: picture, channels, height, width.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from keifu.errors import UserError
from keifu.untrusted import plain_file

Fit = Literal["crop", "pad", "stretch"]
WHITE = (255, 255, 255)
FIRST = "animated or of several pages: the first one counts"
DEEP = "of 16 bits or more a channel: scaled to 8"
PRINT = "in CMYK: turned into RGB"
# Pillow's names of the formats that are read. It would hand others to programs: PostScript to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF and PPM"
LARGEST = 300_000_000  # maximal bytes of a decoded picture: 75 million pixels in colour


class DecodedImage(NamedTuple):
    """Picture of mode L (grey) or RGB, with remarks about its conversion."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Open a picture of one of `FORMATS` with Pillow; its pixels are read later.

    Raises `UnidentifiedImageError` for any other content, whatever the file's name is.
    """
    return Image.open(file, formats=FORMATS)  # noqa: TID251


def read_image(file: Path | bytes, where: str = "", largest: int = LARGEST) -> DecodedImage:
    """Read a picture from a file or from a file's bytes.

    Transparent parts become white. Of an animation the first frame is used. Photographs are rotated upright by their
    EXIF data. CMYK becomes RGB. 16 bits per channel are scaled to 8: 65,535 becomes 255.

    where: name of the picture in errors; by default its path. largest: maximal bytes of the decoded picture, checked by
    the header. Raises `UserError` for a picture that is larger, damaged, truncated, or has values that cannot be
    converted to colours.
    """
    where = where or str(file)
    try:
        content = plain_file(file, "picture") if isinstance(file, Path) else io.BytesIO(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(content) as image:
                check_size(image, where, largest)
                is_animated = _is_animated(image)
                image.load()
                decoded, remarks = _plain(ImageOps.exif_transpose(image), where)
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is not a picture of a format that keifu reads, which are {READABLE}.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} has too many pixels to be read safely: make it smaller.") from error
    except Exception as error:  # Pillow raises many types of error for a truncated file
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{where} is damaged or cut off: {reason}.") from error
    return DecodedImage(decoded, (FIRST, *remarks) if is_animated else remarks)


def check_size(image: Image.Image, where: str, largest: int = LARGEST) -> None:
    """Raise `UserError` if a picture's header says that it would take more than `largest` bytes when decoded."""
    per_pixel = 8 if image.mode.startswith(("I", "F")) else 1 if image.mode in ("1", "L") else 4
    width, height = image.size
    if (size := width * height * per_pixel) > largest:
        size_text = f"{where} has {width:,} x {height:,} pixels and would take {size / 1e6:,.0f} MB of memory"
        raise UserError(f"{size_text}; at most {largest / 1e6:,.0f} MB are allowed: make it smaller.")


def fit_image(
    image: Image.Image, size: int | tuple[int, int] | None, channels: int | None, fit: Fit = "crop"
) -> np.ndarray:
    """Convert a picture to a uint8 array [height, width, channels].

    size: the side of a square, or (height, width); None: unchanged. channels: 1 or 3; None: unchanged. fit: crop keeps
    the middle, pad adds white, stretch changes the proportions. Resampling is bicubic.
    """
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    sides = (size, size) if isinstance(size, int) else size and (size[1], size[0])
    if sides and image.size != sides:
        how = Image.Resampling.BICUBIC
        white = 255 if image.mode == "L" else WHITE
        image = {
            "crop": lambda: ImageOps.fit(image, sides, how),
            "pad": lambda: ImageOps.pad(image, sides, how, color=white),
            "stretch": lambda: image.resize(sides, how),
        }[fit]()
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def composite_on_white(image: Image.Image) -> Image.Image:
    """Draw a picture with transparency on white. Return it as RGB, or as grey if it is grey."""
    covered = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(paper, covered).convert("L" if image.mode in ("L", "LA", "La", "1") else "RGB")


def to_image(picture: UInt8[Tensor, "channels row column"]) -> Image.Image:
    """Convert a picture of 1 to 4 channels to a Pillow image. Raises `UserError` for more channels."""
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if len(picture) not in modes:
        raise UserError(f"A picture of {len(picture)} channels cannot be written as PNG; the model draws no pictures.")
    return Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).contiguous().cpu().numpy(), modes[len(picture)])


def _is_animated(image: Image.Image) -> bool:
    """Return whether there is a second frame, and seek back to the first."""
    try:
        image.seek(1)
    except EOFError:
        return False
    finally:
        image.seek(0)
    return True


def _plain(image: Image.Image, where: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert a picture to mode L or RGB. Return it with remarks about the conversion."""
    if image.mode.startswith("I") or image.mode == "F":
        return _shallow(image, where), (DEEP,)
    if image.has_transparency_data:
        return composite_on_white(image), ()
    if image.mode in ("1", "L"):
        return image.convert("L"), ()
    return image.convert("RGB"), (PRINT,) if image.mode == "CMYK" else ()


def _shallow(image: Image.Image, where: str) -> Image.Image:
    """Convert a grey picture of 16 bits, or of floats from 0 to 1, to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65_535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # refuses NaN too
        numbers = f"numbers from {low:g} to {high:g}"
        raise UserError(f"{where} holds {numbers}, which are not colours: scale them to 0 to {top:g}.")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def to_signed(pictures: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Convert bytes to float32 numbers from -1 to 1, the input range of generative models."""
    return pictures.float() / 127.5 - 1


def to_bytes(values: Float[Tensor, "*axes"]) -> UInt8[Tensor, "*axes"]:
    """Convert numbers from -1 to 1 to the nearest bytes. Others are clipped. The inverse of `to_signed`."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


UNSTATED = "und"  # code of an unknown language (BCP 47)


@dataclass(frozen=True)
class ImageItem:
    """Picture of a source that is not read yet.

    name: unique in its set. where: its name in errors. read: function that returns the picture; its argument is the
    wanted side in pixels, which only vector drawings use. captions: by language code, `UNSTATED` if unknown. alike:
    keys; pictures with a common key have nearly the same content. part: "validation" or "test" if the source holds the
    picture out, else "". relatives: keys of weaker similarity, such as other genders of an emoji.
    """

    name: str
    where: str
    read: Callable[[int | None], DecodedImage]
    captions: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    alike: tuple[str, ...] = ()
    part: str = ""
    relatives: tuple[str, ...] = ()
