"""What is asked of a model that draws latents from a text, so that it can be drawn with; knows no model.

Axes: batch, channels, height, width of latents; length = tokens of a text, as many for every text.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.noise import Noise

Tokens = Int[Tensor, "batch length"]
Latents = Float[Tensor, "batch channels height width"]


@runtime_checkable
class ReadingConfig(Protocol):
    """What is asked of the config of a model that draws from text."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels that it was trained with; None where nothing says so."""
        ...

    @property
    def channels(self) -> int:
        """Of latents."""
        ...

    @property
    def factor(self) -> int:
        """Pixels of a side for each number of the latents."""
        ...

    @property
    def colours(self) -> int:
        """Channels of its pictures: 1 for grey, 3 for colour."""
        ...

    @property
    def masked(self) -> bool:
        """Whether it reads a mask and what the mask leaves of a picture too."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of every text."""
        ...


@runtime_checkable
class Reading(Protocol):
    """A network that was trained to remove noise from latents, and that looks at a text while it does.

    `model(x, timestep [batch], projected)` gives its target for each row.
    """

    @property
    def noise(self) -> Noise:
        """The noise that it removes."""
        ...

    @property
    def config(self) -> ReadingConfig:
        """Its sizes."""
        ...

    def __call__(self, x: Latents, timestep: Tensor, projected: Any) -> Tensor:
        """Its prediction."""
        ...

    @property
    def coding(self) -> nn.Module | None:
        """The autoencoder, which the two methods below compute with, if there is one."""
        ...

    def encode_text(self, tokens: Tokens) -> Float[Tensor, "batch length dim"]:
        """What the network looks at."""
        ...

    def project(self, context: Float[Tensor, "batch length dim"]) -> Any:
        """What every step needs of the texts."""
        ...

    def to_latents(
        self, pictures: Float[Tensor, "batch colours rows columns"], noise: Tensor | None = None
    ) -> Float[Tensor, "sampled channels height width"]:
        """The latents of pictures from -1 to 1 that each row of standard normal noise picks, or the likeliest."""
        ...

    def to_pictures(self, latents: Latents) -> Float[Tensor, "batch colours rows columns"]:
        """The pictures of latents, from -1 to 1."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Refuses pictures, by their pixels, that do not fit the network, in a `UserError`."""
        ...
