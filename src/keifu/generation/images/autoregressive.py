"""Autoregressive image generation (DALL-E): predicts the image tokens of a text one after another, then decodes them.

Axes: batch, text = tokens of every text, rows and columns of the grid of image tokens, codebook.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.images.latent_diffusion import text_tokens
from keifu.generation.images.pixel_diffusion import BY_TOKEN, Bytes, ImageRequest, Watch, to_pixels
from keifu.generation.images.png_metadata import fingerprint
from keifu.generation.images.samplers import SamplerStep
from keifu.generation.text.sampler import sample
from keifu.layers.counter_rng import uniform

Codes = Int[Tensor, "batch rows columns"]
HEEDED = (
    "seed",
    "count",
    "text",
    "truncate",
    "size",
    "steps",
    "guidance",
    "spacing",
)  # of a `ImageRequest`, see `resolved`


@runtime_checkable
class ImageTokenModel(Protocol):
    """A model of texts and pictures as one row of tokens. `config` has `context_length`, `grid`, `size`, `colours`."""

    config: Any

    def begin(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Any]:
        """Logits of a picture's first entry, and what the model remembers of the text."""
        ...

    def go_on(self, codes: Tensor, place: int, state: Any) -> Tensor:
        """Logits of the entry behind those at this place."""
        ...

    def to_pictures(self, codes: Codes) -> Float[Tensor, "batch colours rows columns"]:
        """The pictures of entries, from -1 to 1."""
        ...


def real_tokens(tokens: Int[Tensor, "batch text"], end: int | None) -> Bool[Tensor, "batch text"]:
    """Where a text is, up to its end and with it; the padding behind is none. Without an end all is text."""
    if end is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    ended = (tokens == end).cumsum(1)
    return ended - (tokens == end).long() == 0


@torch.inference_mode()
def sample_image_tokens(
    model: ImageTokenModel, tokens: Int[Tensor, "batch text"], real: Bool[Tensor, "batch text"], seeds: Sequence[int],
    watch: Callable[[Codes], object] = lambda codes: None,
) -> Codes:  # fmt: skip
    """A grid of entries for each text, each drawn from what the model says of it; a picture's seed decides its draws.

    `watch` is given the grid after each entry, the missing ones 0.
    """
    height, width = model.config.grid.height, model.config.grid.width
    codes = torch.zeros(len(tokens), height * width, dtype=torch.long, device=tokens.device)
    own = torch.tensor(list(seeds), device=tokens.device)
    logits, state = model.begin(tokens, real)
    for place in range(height * width):
        codes[:, place] = sample(logits.float(), uniform(own, torch.full_like(own, place)))
        watch(codes.unflatten(1, (height, width)))
        if place + 1 < height * width:
            logits = model.go_on(codes[:, place], place, state)
    return codes.unflatten(1, (height, width))


class AutoregressivePipeline:
    """The `TextToImagePipeline` of a model of image tokens and its tokenizer."""

    usual_guidance = 1.0
    usual_sampler = ImageRequest.sampler  # it has none
    pixels = False

    def __init__(self, model: ImageTokenModel, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.colours = model, tokenizer, int(model.config.colours)

    def fingerprint(self) -> str:
        """Of the weights, the config and the tokenizer."""
        return fingerprint(cast(Any, self.model), self.tokenizer.fingerprint)

    def label(self, name: str) -> int:
        """There is none: a `UserError`."""
        raise UserError(f"This model draws from a text and knows no classes: say {name!r} in the text.")

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """The same with everything said that was left open; what belongs to the removal of noise is a `UserError`."""
        if wanted.text is None:
            raise UserError("This model draws from a text, and there is none: say what to draw.")
        usual = ImageRequest()
        foreign = [each.name for each in fields(ImageRequest) if each.name not in HEEDED]
        changed = [name for name in foreign if vars(wanted)[name] != vars(usual)[name]]
        if wanted.guidance != 1:
            changed.append("guidance")
        if changed:
            raise UserError(
                f"This model says a picture entry by entry and removes no noise, so {' and '.join(changed)} mean "
                "nothing to it: leave them out."
            )
        grid, size = self.model.config.grid, self.model.config.size
        for name, own in (("steps", grid.places), ("size", size)):
            if vars(wanted)[name] not in (None, own):
                raise UserError(f"{name} is {vars(wanted)[name]}, and this model's is always {own}: leave it out.")
        self.tokens([wanted.text], wanted.truncate)
        seed = secrets.randbits(32) if wanted.seed is None else wanted.seed
        return replace(wanted, sampler=BY_TOKEN, steps=grid.places, size=size, seed=seed)

    def tokens(self, texts: Sequence[str], truncate: bool = False) -> Int[Tensor, "batch text"]:
        """The ids of texts, filled up to the model's length: see `text_tokens`."""
        return text_tokens(self.tokenizer, texts, self.model.config.context_length, truncate)

    def draw(self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """A finished picture of each seed; `watch` is given the grid after each entry."""
        return self._drawn(
            [wanted.text or ""] * len(seeds), wanted, seeds, lambda codes: watch(SamplerStep(codes, codes))
        )

    def draw_texts(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str]) -> Bytes:
        """A finished picture of each seed and text."""
        return self._drawn(texts, wanted, seeds, lambda codes: None)

    @torch.inference_mode()
    def _drawn(
        self, texts: Sequence[str], wanted: ImageRequest, seeds: Sequence[int], watch: Callable[[Tensor], object]
    ) -> Bytes:
        device = next(cast(Any, self.model).parameters()).device
        tokens = self.tokens(texts, wanted.truncate)
        real = real_tokens(tokens, self.tokenizer.eos_id)
        codes = sample_image_tokens(self.model, tokens.to(device), real.to(device), seeds, watch)
        return to_pixels(self.model.to_pictures(codes))
