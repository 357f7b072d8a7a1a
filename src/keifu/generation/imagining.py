"""What is asked of a model that draws by way of an embedding, so that it can be drawn with; knows no model.

Axes: batch, channels, height, width of pictures; length = tokens of a text, embedding = numbers of an embedding.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.layers.noise import Noise

Tokens = Int[Tensor, "batch length"]
Embedding = Float[Tensor, "batch embedding"]
Pixels = Float[Tensor, "batch channels height width"]


@runtime_checkable
class ImaginingConfig(Protocol):
    """What is asked of its config."""

    @property
    def pixels(self) -> Any:
        """What a picture becomes before it is seen; None where none is."""
        ...

    @property
    def prior_noise(self) -> Noise:
        """What is removed from embeddings."""
        ...

    @property
    def decoder_noise(self) -> Noise:
        """What is removed from pictures."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of finished pictures; None where nothing says so."""
        ...

    @property
    def small_size(self) -> tuple[int, int] | None:
        """The same before they are enlarged."""
        ...

    @property
    def upsampling_noise(self) -> Noise | None:
        """What is removed while they are enlarged; None where they are not."""
        ...

    @property
    def channels(self) -> int:
        """Of a picture."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Numbers of an embedding."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of every text."""
        ...

    @property
    def imagines(self) -> bool:
        """Whether it draws what a text says, and not only what a picture shows."""
        ...


@runtime_checkable
class Imagining(Protocol):
    """A model that guesses the embedding of a picture from a text, and draws the picture from that.

    `model(x, timestep [batch], told)` gives the target of the noise of pictures.
    """

    @property
    def config(self) -> ImaginingConfig:
        """Its sizes and noises."""
        ...

    def __call__(self, x: Pixels, timestep: Tensor, told: Any) -> Tensor:
        """Its prediction."""
        ...

    def encode_text(self, tokens: Tokens, real: Bool[Tensor, "batch length"]) -> Any:
        """What is told of texts; its `embedding` is theirs in the space of the pictures'."""
        ...

    def encode_image(self, pixels: Pixels) -> Embedding:
        """Embeddings of pictures that `config.pixels` has made ready."""
        ...

    def imagine(self, x: Embedding, timestep: Tensor, caption: Any) -> Embedding:
        """The prediction for noisy embeddings, normalised ones."""
        ...

    def restored(self, x: Embedding) -> Embedding:
        """Embeddings of normalised ones."""
        ...

    def nothing(self, batch: int) -> Embedding:
        """What stands for an embedding that is not told."""
        ...

    def tell(self, image: Embedding, caption: Any) -> Any:
        """What every step of the drawing is told."""
        ...

    def enlarge(self, x: Pixels, timestep: Tensor, small: Pixels, last: bool) -> Tensor:
        """The prediction for large noisy pictures beside the small ones, brought to their size."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Refuses pictures, by their pixels before they are enlarged, that do not fit, in a `UserError`."""
        ...
