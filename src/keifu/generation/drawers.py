"""Models that draw, in pixels or from a text, behind one face for commands; knows no kind of network."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor, nn

from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.by_embedding import EmbeddingPainter
from keifu.generation.denoiser import Denoising
from keifu.generation.imagining import Imagining
from keifu.generation.picture_record import fingerprint
from keifu.generation.pictures import Drawing, denoising, draw, label_number
from keifu.generation.samplers import Drawn
from keifu.generation.text_to_picture import Painter, Reading
from keifu.generation.token_pictures import Saying, TokenPainter
from keifu.layers.noise import Noise


@runtime_checkable
class Drawer(Protocol):
    """A model as a command draws with it.

    usual_guidance, usual_sampler: where none is asked for. pixels: whether its steps are pictures.
    """

    usual_guidance: float
    usual_sampler: str
    pixels: bool

    def fingerprint(self) -> str:
        """Equal for models that draw alike."""
        ...

    def label(self, name: str) -> int:
        """A class by its name, or by its number; an unknown one is a `UserError`."""
        ...

    def resolved(self, wanted: Drawing) -> Drawing:
        """The same with everything said that was left open; what the model cannot draw is a `UserError`."""
        ...

    def draw(
        self, wanted: Drawing, seeds: Sequence[int], watch: Callable[[Drawn], object] = lambda state: None
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """A finished picture of each seed, as bytes on the CPU; `watch` is given what each step leads to."""
        ...


@runtime_checkable
class TextDrawer(Drawer, Protocol):
    """One that draws from text. colours: 1 for grey, 3 for colour."""

    colours: int

    def draw_texts(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str]
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """A finished picture of each seed and text; `wanted` as `resolved` gives it."""
        ...


class PixelDrawer:
    """A model that removes noise from pictures: a `Drawer`."""

    usual_guidance = 1.0
    usual_sampler = "ddim"
    pixels = True

    def __init__(self, model: Denoising):
        self.model = model

    @property
    def noise(self) -> Noise:
        """What it removes."""
        return self.model.noise

    def fingerprint(self) -> str:
        """Of the weights and the config."""
        return fingerprint(cast(Any, self.model))

    def label(self, name: str) -> int:
        """A class by its name, or by its number."""
        return label_number(self.model, name)

    def resolved(self, wanted: Drawing) -> Drawing:
        """See `Drawing.resolved`."""
        return wanted.resolved(self.model)

    def draw(
        self, wanted: Drawing, seeds: Sequence[int], watch: Callable[[Drawn], object] = lambda state: None
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """See `pictures.draw`."""
        return draw(cast(Any, self.model), wanted, seeds, watch)


def draws_texts(model: nn.Module) -> bool:
    """Whether it draws from a text alone."""
    if isinstance(model, Imagining):
        return model.config.imagines
    return isinstance(model, Saying) or (isinstance(model, Reading) and not model.config.masked)


def text_drawer(model: nn.Module, tokenizer: Tokenizer | None) -> TextDrawer:
    """The model as one that draws from text; any other is a `UserError`."""
    found = drawer(model, lambda: tokenizer)
    if not isinstance(found, TextDrawer):
        raise UserError(f"A {type(model).__name__} draws from no text: choose a model that reads.")
    return found


def drawer(model: nn.Module, tokenizer: Callable[[], Tokenizer | None]) -> Drawer:
    """The model as one that draws, with its tokenizer where it reads; any other is a `UserError`."""
    if not isinstance(model, Reading | Saying | Imagining):
        return PixelDrawer(denoising(model))
    found = tokenizer()
    if found is None:
        raise UserError(f"A {type(model).__name__} draws from a text, and there is no tokenizer beside it.")
    if isinstance(model, Imagining):
        return EmbeddingPainter(model, found)
    return TokenPainter(model, found) if isinstance(model, Saying) else Painter(model, found)
