"""Picture files that a drawing begins with or is guided by: known by a digest, read in the drawing's size; knows no
network.

Axes: channels, height, width.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from keifu.data.images import signed
from keifu.data.picture_files import fitted, read_picture
from keifu.errors import UserError

WHITE_FROM = 128  # of 255


@dataclass(frozen=True)
class Original:
    """A picture file: where it is, and the SHA-256 of its bytes, so that another in its place is not taken for it."""

    place: str
    digest: str

    def image(self) -> Image.Image:
        """The picture, upright and without transparency; one that changed since is a `UserError`."""
        if original(self.place).digest != self.digest:
            raise UserError(f"{self.place} is not the file that it was: its digest was {self.digest[:12]}.")
        return read_picture(Path(self.place)).image

    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        width, height = self.image().size
        return height, width

    def pixels(self, size: tuple[int, int], channels: int) -> Float[Tensor, "channels height width"]:
        """Numbers from -1 to 1, the middle of it scaled to this size where it has another."""
        held = fitted(self.image(), size, channels)
        return signed(torch.from_numpy(held.copy()).permute(2, 0, 1))

    def white(self, size: tuple[int, int]) -> Bool[Tensor, "1 height width"]:
        """Where it is rather white than black, scaled in the same way."""
        held = fitted(self.image(), size, 1)
        return torch.from_numpy(held.copy()).permute(2, 0, 1) >= WHITE_FROM


def original(path: str | Path) -> Original:
    """The picture at this place as it is now; where there is none, a `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no picture {path}.")
    return Original(str(path.resolve()), digest_of(path))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
