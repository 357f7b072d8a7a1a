"""From a text to pictures by a model that removes noise from latents; knows no sampler and no kind of network.

Axes: batch, channels, height, width of latents; length = tokens of a text, as many for every text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from keifu.data.images import to_bytes
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.beginnings import Kept, noisy, walked
from keifu.generation.denoiser import Network, with_guidance
from keifu.generation.latent_coder import Coder, tile_of
from keifu.generation.picture_record import fingerprint
from keifu.generation.pictures import Drawing, finished
from keifu.generation.reading import Latents, Reading, Tokens
from keifu.generation.samplers import Drawn, Random
from keifu.generation.seeds import Seeds
from keifu.layers.noise import Noise
from keifu.layers.noise_levels import Path
from keifu.layers.packing import packed

Bytes = UInt8[Tensor, "batch colours rows columns"]


def of_text(
    model: Reading,
    given: Tokens,
    without: Tokens | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    beside: Float[Tensor, "batch more height width"] | None = None,
) -> Network:
    """The network of a model for a text of each row, which is encoded and projected here, once.

    Guided, `without` is what each row is led away from, and both predictions are made in one batch. `beside`: what the
    network reads of each row besides x, in channels after it.
    """

    def seen(x: Tensor) -> Tensor:
        return x if beside is None else torch.cat([x, beside], 1)

    if guidance == 1 or without is None:
        alone = _projected(model, given)
        return lambda x, timestep: model(seen(x), timestep, alone)
    both = _projected(model, torch.cat([given, without]))

    def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        towards, away = model(seen(x).repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
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
    usual_sampler = "dpm++-2m"  # 20 steps of it for the 50 of others
    pixels = False

    def __init__(self, model: Reading, tokenizer: Tokenizer):
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
        if self.model.config.masked and wanted.mask is None:
            raise UserError(
                "This model fills in what a mask hides of a picture, and draws nothing from a text alone: give both "
                "(--init, --mask)."
            )
        if wanted.negative and wanted.guidance == 1:
            raise UserError(
                f"Guidance is what leads away from {wanted.negative!r}, and with a guidance of 1 there is none: "
                f"{self.usual_guidance:g} is usual."
            )
        self.tokens([wanted.text, wanted.negative], wanted.truncate)
        size = wanted.sides() or self.model.config.size
        if size is None:
            raise UserError("The model does not say how large its pictures are: give their size.")
        self.model.check_size(*size)
        factor = self.model.config.factor
        whole = replace(wanted.completed(self.noise, size), tile=tile_of(wanted.tile, size, factor))
        anew = whole.anew()
        if anew is not None and not bool(coarse(anew, factor).any()):
            raise UserError(
                f"The mask's white parts are smaller than the {factor} x {factor} pixels that one number of the "
                "latents stands for: make them larger."
            )
        return whole

    def tokens(self, texts: Sequence[str], truncate: bool = False) -> Tokens:
        """The ids of texts, filled up to the model's length: see `text_tokens`."""
        return text_tokens(self.tokenizer, texts, self.model.config.context_length, truncate)

    @torch.inference_mode()
    def drawing(self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str] | None = None) -> Iterator[Drawn]:
        """x and the predicted latents after each step, for a picture of each seed, on the model's device.

        wanted: as `resolved` gives it. texts: one for each seed; the one of `wanted` where None. Convolutions are
        packed for it once, which takes about as long as a step and their memory a second time.
        """
        chosen = wanted.route(self.noise)
        path, random = wanted.path(chosen.path), Seeds(seeds)
        given = self.tokens(texts or [wanted.text or ""] * len(seeds), wanted.truncate)
        without = self.tokens([wanted.negative] * len(seeds), wanted.truncate)
        x, kept, beside = self._begun(wanted, path, len(seeds), random)
        tokens = given.to(x.device), without.to(x.device)
        quick = cast(Reading, packed(cast(Any, self.model)))
        network = of_text(quick, *tokens, wanted.guidance, wanted.guidance_rescale, beside)
        yield from walked(chosen, network, x, path, random, kept)

    def _begun(
        self, wanted: Drawing, path: Path, count: int, random: Random
    ) -> tuple[Latents, Kept | None, Tensor | None]:
        """The latents that so many drawings begin with, what is kept of them, and what a network that fills in masks
        reads beside them: the mask, and the latents of the picture with grey in the mask's place."""
        config, device = self.model.config, next(cast(Any, self.model).parameters()).device
        assert wanted.size is not None
        empty = torch.empty((count, config.channels, *(side // config.factor for side in wanted.size)), device=device)
        if wanted.init is None:
            return random(empty) * path.start, None, None
        picture = wanted.init.pixels(wanted.size, config.colours)[None].to(device)
        whole = wanted.anew()
        anew = None if whole is None else coarse(whole.to(device), config.factor)
        latents = None
        if not (wanted.from_noise and config.masked):
            latents = self._coder(wanted).latents(picture, random(empty))
        noise = random(empty)
        x = noise * path.start if wanted.from_noise or latents is None else noisy(latents, noise, path)
        if whole is None or anew is None:
            return x, None, None
        if not config.masked:
            assert latents is not None
            return x, Kept(latents, noise, anew), None
        left = self._coder(wanted).latents(picture.masked_fill(whole.to(device), 0.0), random(empty))
        return x, None, torch.cat([anew.to(x.dtype).expand(count, 1, -1, -1), left], 1)

    def decoded(self, latents: Latents, wanted: Drawing) -> Float[Tensor, "batch colours rows columns"]:
        """The pictures of latents, about from -1 to 1."""
        return self._coder(wanted).pictures(latents)

    def _coder(self, wanted: Drawing) -> Coder:
        return Coder(self.model, self.model.config.factor, wanted.tile or 0)

    def draw(
        self, wanted: Drawing, seeds: Sequence[int], watch: Callable[[Drawn], object] = lambda state: None
    ) -> Bytes:
        """A finished picture of each seed, as `pictures.draw` gives it."""
        x = torch.empty(0)
        for state in self.drawing(wanted, seeds):
            watch(state)
            x = state.x
        return self._whole(finished(self.decoded(x, wanted)), wanted)

    def draw_texts(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str]
    ) -> UInt8[Tensor, "batch colours rows columns"]:
        """A finished picture of each seed and text."""
        *_, last = self.drawing(wanted, seeds, texts)
        return self._whole(finished(self.decoded(last.x, wanted)), wanted)

    def _whole(self, drawn: Bytes, wanted: Drawing) -> Bytes:
        """What was drawn, and where a mask keeps a picture its own pixels, which latents do not hold exactly."""
        anew = wanted.anew()
        if wanted.init is None or wanted.size is None or anew is None:
            return drawn
        return torch.where(anew, drawn, to_bytes(wanted.init.pixels(wanted.size, drawn.shape[1])))


def coarse(mask: Bool[Tensor, "1 height width"], factor: int) -> Bool[Tensor, "1 rows columns"]:
    """A mask of pixels for latents: each takes its upper left pixel's, as diffusers does."""
    return mask[:, ::factor, ::factor]
