"""Pictures to latents and back, tile by tile where they are large, and in float32 where half precision fails; knows no
sampler and no kind of network.

Memory: a whole picture takes what its largest layer takes; in tiles, what a tile takes, and the picture itself.
Axes: batch, channels, height, width of latents; colours, rows, columns of pictures.
"""

import sys
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.generation.tiles import tiled

WHOLE = 1024 * 1024  # pixels of the largest picture that is not tiled if nobody asks for it
TILE = 512
NO_TILES = "Tiles are for pictures made of latents, and this model draws pixels: leave --tile out."
Latents = Float[Tensor, "batch channels height width"]
Pictures = Float[Tensor, "batch colours rows columns"]


@runtime_checkable
class Coding(Protocol):
    """A model with an autoencoder, as `text_to_picture.Reading` has it."""

    @property
    def coding(self) -> nn.Module | None:
        """What both methods compute with."""
        ...

    def to_latents(self, pictures: Pictures, noise: Tensor | None = None) -> Tensor:
        """The latents of pictures from -1 to 1."""
        ...

    def to_pictures(self, latents: Latents) -> Tensor:
        """The pictures of latents."""
        ...


class Coder:
    """Codes by a model, `factor` pixels a number of the latents; tile: the side of tiles in pixels, 0 for none."""

    def __init__(self, model: Coding, factor: int, tile: int):
        self.model, self.factor, self.side = model, factor, tile // factor

    @torch.inference_mode()
    def pictures(self, latents: Latents) -> Pictures:
        """The pictures of latents, about from -1 to 1; one after the other, since a large one takes much memory."""
        return torch.cat([self._sure(lambda x=each: self._picture(x)) for each in latents.split(1)])

    @torch.inference_mode()
    def latents(self, picture: Float[Tensor, "1 colours rows columns"], noise: Latents) -> Latents:
        """Latents of one picture that each row of standard normal noise picks."""

        def coded() -> Tensor:
            if not self._tiles(noise):
                return self.model.to_latents(picture, noise)
            return tiled(
                lambda piece, place: self.model.to_latents(piece, noise[(..., *place)]),
                picture, self.side, self.side // 4, cell=self.factor,
            )  # fmt: skip

        return self._sure(coded)

    def _picture(self, latents: Latents) -> Pictures:
        if not self._tiles(latents):
            return self.model.to_pictures(latents)
        return tiled(
            lambda piece, place: self.model.to_pictures(piece), latents, self.side, self.side // 4, made=self.factor
        )

    def _tiles(self, latents: Latents) -> bool:
        return self.model.coding is not None and 0 < self.side < max(latents.shape[2:])

    def _sure(self, work: Callable[[], Tensor]) -> Tensor:
        """The result; where it is not finite in half precision, the one in float32, in which the autoencoder is left:
        the released Stable Diffusion's has numbers beyond float16's."""
        found, inner = work(), self.model.coding
        if inner is None or bool(found.isfinite().all()):
            return found
        dtype = next(inner.parameters()).dtype
        if dtype.itemsize > 2:
            return found
        name = str(dtype).removeprefix("torch.")
        print(f"The autoencoder has numbers that are not finite in {name}: it goes on in float32.", file=sys.stderr)
        inner.float()
        return work()


def tile_of(wanted: int | None, size: tuple[int, int], factor: int) -> int:
    """The side of tiles for pictures of this height and width: the one that is wanted, or, if none is, `TILE` for
    pictures of more than `WHOLE` pixels, and 0 for others; a side that cannot be is a `UserError`."""
    if factor == 1:
        if wanted:
            raise UserError(NO_TILES)
        return 0
    if wanted is None:
        return TILE // factor * factor if size[0] * size[1] > WHOLE else 0
    if wanted and (wanted % factor or wanted < 4 * factor):
        near = max(4, round(wanted / factor)) * factor
        raise UserError(
            f"Tiles have sides of at least {4 * factor} pixels and whole multiples of {factor}, not {wanted}: the "
            f"nearest is {near}; 0 is for no tiles."
        )
    return wanted
