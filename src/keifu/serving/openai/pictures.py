"""Pictures in messages: data URLs, and files of a permitted folder."""

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from keifu.data.images.io import read_image
from keifu.errors import UserError
from keifu.inference.chat.prompts import MOST_IMAGES
from keifu.serving.openai.images import PICTURE_BYTES

SHOWN = 40  # characters of a URL in an error


def open_images(messages: Sequence[Mapping[str, Any]], folder: Path | None) -> list[dict[str, Any]]:
    """Replace the URLs of pictures in messages by the pictures.

    All together may need at most the memory of one large picture. folder: folder of permitted files, if any. Nothing is
    downloaded. Raises `UserError` for anything that is not a picture or not permitted.
    """
    if (count := sum(len(message.get("images", ())) for message in messages)) > MOST_IMAGES:
        raise UserError(f"The messages have {count} pictures, and at most {MOST_IMAGES} are read: send fewer.")
    remaining_bytes, number, opened = PICTURE_BYTES, 0, []
    for message in messages:
        images: list[Image.Image] = []
        for url in message.get("images", ()):
            number += 1
            images.append(read_image(_file(url, folder), f"Picture {number}", remaining_bytes).image)
            remaining_bytes -= 4 * images[-1].width * images[-1].height
        opened.append({**message, "images": images} if images else dict(message))
    return opened


def _file(url: str, folder: Path | None) -> Path | bytes:
    """Return the bytes of a data URL, or the path of a permitted file."""
    if url.startswith("data:"):
        head, _, content = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it has no ;base64")
            return base64.b64decode(content, validate=True)
        except ValueError as error:
            raise UserError(f"image_url is a data URL that cannot be read: {error}.") from error
    if url.startswith("file://") and folder is not None:
        with suppress(ValueError, OSError):  # an impossible path
            path = Path(unquote(urlsplit(url).path)).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return path
        raise UserError(f"image_url is {url[:SHOWN]!r}, which is not a file in the folder that this server permits.")
    accepted = "this server reads data URLs (data:image/png;base64,...) alone"
    restriction = "it fetches nothing from the network, and reads files only from the folder of --pictures"
    raise UserError(f"image_url is {url[:SHOWN]!r}, and {accepted}: {restriction}.")
