"""From a text to pictures by a model that removes noise from latents; knows no sampler and no kind of network.

Axes: batch, channels, height, width of latents; length = tokens of a text, as many for every text.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.denoiser import Network, with_guidance
from keifu.generation.picture_record import fingerprint
from keifu.generation.pictures import Drawing, finished
from keifu.generation.samplers import Drawn
from keifu.generation.seeds import Seeds
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
        """Whether it reads a mask and what the mask leaves too, and so draws nothing from a text alone."""
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

    def encode_text(self, tokens: Tokens) -> Float[Tensor, "batch length dim"]:
        """What the network looks at."""
        ...

    def project(self, context: Float[Tensor, "batch length dim"]) -> Any:
        """What every step needs of the texts."""
        ...

    def to_pictures(self, latents: Latents) -> Float[Tensor, "batch colours rows columns"]:
        """The pictures of latents, from -1 to 1."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Refuses pictures, by their pixels, that do not fit the network, in a `UserError`."""
        ...


def of_text(
    model: Reading, given: Tokens, without: Tokens | None = None, guidance: float = 1.0, rescale: float = 0.0
) -> Network:
    """The network of a model for a text of each row, which is encoded and projected here, once.

    Guided, `without` is what each row is led away from, and both predictions are made in one batch.
    """
    if guidance == 1 or without is None:
        alone = _projected(model, given)
        return lambda x, timestep: model(x, timestep, alone)
    both = _projected(model, torch.cat([given, without]))

    def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        towards, away = model(torch.cat([x, x]), torch.cat([timestep, timestep]), both).chunk(2)
        return towards, away

    return with_guidance(conditional, model.noise, guidance, rescale)


def _projected(model: Reading, tokens: Tokens) -> Any:
    """Every text is encoded once, however many rows have it."""
    texts, places = tokens.unique(dim=0, return_inverse=True)
    return model.project(model.encode_text(texts)[places])


def text_tokens(tokenizer: Tokenizer, texts: Sequence[str], length: int, truncate: bool = False) -> Tokens:
    """The ids of texts with the tokens around them, filled up to this length with the padding's.

    A longer text is a `UserError` with both lengths, or loses its end with `truncate`.
    """
    rows = tokenizer.encode_batch(texts, special=True)
    for place, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if len(row) > length and not truncate:
            raise UserError(
                f"{text[:40]!r}… has {len(row)} tokens with those around it, and the model reads {length}: "
                "shorten it, or leave out its end (--truncate)."
            )
        rows[place] = row if len(row) <= length else [*row[: length - 1], row[-1]]
    padding = next((each for each in (tokenizer.pad_id, tokenizer.eos_id) if each is not None), 0)
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows])


class Painter:
    """A model that draws from text, with the tokenizer of its texts: a `Drawer`."""

    usual_guidance = 7.5  # the released Stable Diffusion's
    pixels = False

    def __init__(self, model: Reading, tokenizer: Tokenizer):
        if model.config.masked:
            raise UserError("This model fills in what a mask hides of a picture, and draws nothing from a text alone.")
        self.model, self.tokenizer, self.colours = model, tokenizer, model.config.colours

    @property
    def noise(self) -> Noise:
        """What its latents are freed of."""
        return self.model.noise

    def fingerprint(self) -> str:
        """Of the weights, the config and the tokenizer."""
        return fingerprint(cast(Any, self.model), self.tokenizer.fingerprint)

    def label(self, name: str) -> int:
        """There is none: a `UserError`."""
        raise UserError(f"This model draws from a text and knows no classes: say {name!r} in the text.")

    def resolved(self, wanted: Drawing) -> Drawing:
        """The same with everything said that was left open, and checked against the model."""
        if wanted.text is None:
            raise UserError("This model draws from a text, and there is none: say what to draw.")
        if wanted.label is not None:
            self.label(str(wanted.label))
        if wanted.negative and wanted.guidance == 1:
            raise UserError(
                f"Guidance is what leads away from {wanted.negative!r}, and with a guidance of 1 there is none: "
                f"{self.usual_guidance:g} is usual."
            )
        self.tokens([wanted.text, wanted.negative], wanted.truncate)
        size = wanted.size or self.model.config.size
        if size is None:
            raise UserError("The model does not say how large its pictures are: give their size.")
        self.model.check_size(*size)
        return wanted.completed(self.noise, size)

    def tokens(self, texts: Sequence[str], truncate: bool = False) -> Tokens:
        """The ids of texts, filled up to the model's length: see `text_tokens`."""
        return text_tokens(self.tokenizer, texts, self.model.config.context_length, truncate)

    @torch.inference_mode()
    def drawing(self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str] | None = None) -> Iterator[Drawn]:
        """x and the predicted latents after each step, for a picture of each seed, on the model's device.

        wanted: as `resolved` gives it. texts: one for each seed; the one of `wanted` where None.
        """
        chosen, config = wanted.route(self.noise), self.model.config
        device = next(cast(Any, self.model).parameters()).device
        assert wanted.size is not None
        shape = len(seeds), config.channels, *(side // config.factor for side in wanted.size)
        given = self.tokens(texts or [wanted.text or ""] * len(seeds), wanted.truncate).to(device)
        without = self.tokens([wanted.negative] * len(seeds), wanted.truncate).to(device)
        network = of_text(self.model, given, without, wanted.guidance, wanted.guidance_rescale)
        random = Seeds(seeds)
        x = random(torch.empty(shape, device=device)) * chosen.path.start
        yield from chosen.walk(chosen.denoiser(network), x, chosen.path, random)

    @torch.inference_mode()
    def decoded(self, latents: Latents) -> Float[Tensor, "batch colours rows columns"]:
        """The pictures of latents, about from -1 to 1; one after the other, since a large one takes much memory."""
        return torch.cat([self.model.to_pictures(each) for each in latents.split(1)])

    def draw(
        self, wanted: Drawing, seeds: Sequence[int], watch: Callable[[Drawn], object] = lambda state: None
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """A finished picture of each seed, as `pictures.draw` gives it."""
        x = torch.empty(0)
        for state in self.drawing(wanted, seeds):
            watch(state)
            x = state.x
        return finished(self.decoded(x))

    def draw_texts(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str]
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """A finished picture of each seed and text."""
        *_, last = self.drawing(wanted, seeds, texts)
        return finished(self.decoded(last.x))
