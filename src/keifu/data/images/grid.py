"""Image grids: many images on one sheet, each with a caption below.

Axes: picture, channels (1 or 3), height, width.
"""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.errors import UserError

LETTERS, LINES = 11, 2  # font size of a caption in pixels, and its maximal number of lines
NARROW = 72  # pixels: pictures with captions are enlarged to at least this width
FAR_EAST = range(0x2E80, 0x1F000)
Pictures = UInt8[Tensor, "picture channels height width"]


def sheet(
    pictures: Pictures, captions: Sequence[str] = (), columns: int | None = None, scale: int = 0, margin: int = 4
) -> Image.Image:
    """Arrange pictures in rows on white; by default with as many columns as rows.

    captions: none, or one for each picture, cut to two lines with an ellipsis; "" for a picture without one. scale:
    integer factor of enlargement; 0: 1, or enough for captions. margin: pixels between two pictures.
    """
    count, _, height, width = pictures.shape
    if not count:
        raise UserError("There are no pictures to lay into a sheet.")
    if captions and len(captions) != count:
        raise UserError(f"{count} pictures need as many captions, and {len(captions)} were given.")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = scale or (math.ceil(NARROW / width) if captions else 1)
    below = LINES * (LETTERS + 3) if any(captions) else 0
    rows = math.ceil(count / columns)
    cell = height * scale + below + margin, width * scale + margin
    cells = np.full((rows * columns, *cell, 3), 255, np.uint8)
    pixels = pictures.cpu().numpy().transpose(0, 2, 3, 1)
    cells[:count, : height * scale, : width * scale] = pixels.repeat(scale, 1).repeat(scale, 2)
    canvas = cells.reshape(rows, columns, *cell, 3).swapaxes(1, 2).reshape(rows * cell[0], columns * cell[1], 3)
    image = Image.new("RGB", (canvas.shape[1] + margin, canvas.shape[0] + margin), "white")
    image.paste(Image.fromarray(canvas), (margin, margin))
    pen = ImageDraw.Draw(image)
    for index, caption in enumerate(captions):
        left, top = margin + index % columns * cell[1], margin + index // columns * cell[0] + height * scale + 1
        pen.multiline_text((left, top), wrap(caption, width * scale), "black", _font(caption), spacing=1)
    return image


def grid(
    pictures: Pictures, captions: Sequence[str] = (), columns: int | None = None, about: Mapping[str, str] | None = None
) -> bytes:
    """Return a sheet as the bytes of a PNG file (see `sheet` and `png`)."""
    return png(sheet(pictures, captions, columns), about)


def png(image: Image.Image, about: Mapping[str, str] | None = None) -> bytes:
    """Encode a picture as PNG with text fields; `Image.open(...).text` returns them."""
    facts, file = PngInfo(), io.BytesIO()
    for name, text in (about or {}).items():
        facts.add_itxt(name, text)
    image.save(file, "PNG", pnginfo=facts)
    return file.getvalue()


def wrap(text: str, width: int) -> str:
    """Break a caption into lines of at most `width` pixels, at spaces if possible. Further lines are cut off."""
    font, remaining_text, lines = _font(text), " ".join(text.split()), []
    while remaining_text and len(lines) < LINES:
        size = len(remaining_text)  # number of leading characters that fit, at least one
        while size > 1 and font.getlength(remaining_text[:size]) > width:
            size -= 1
        if size < len(remaining_text) and len(lines) == LINES - 1:
            lines.append(remaining_text[: max(size - 1, 0)].rstrip() + "…")
            break
        end = size if size == len(remaining_text) else remaining_text.rfind(" ", 1, size + 1)
        end = size if end < 1 else end
        lines.append(remaining_text[:end].rstrip())
        remaining_text = remaining_text[end:].lstrip()
    return "\n".join(lines)


def _font(text: str) -> ImageFont.FreeTypeFont:
    return _open_font(any(ord(character) in FAR_EAST for character in text))


@cache
def _open_font(far_east: bool) -> ImageFont.FreeTypeFont:
    """Open IPAex Gothic (downloaded at first use) for Japanese and Chinese characters, else DejaVu Sans."""
    if far_east:
        return ImageFont.truetype(catalogue.fetch("japanese-font"), LETTERS)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", LETTERS)
