"""Base class of text-to-image pipelines, and the pipeline of latent diffusion (Stable Diffusion).

Axes: batch, channels, height, width of latents; length = tokens of a text, the same for every text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.images.denoiser import Network, guided_denoiser
from keifu.inference.images.image_to_image import KeptRegion, add_initial_noise, run_inpainting
from keifu.inference.images.pixel_diffusion import Bytes, ImageRequest, Pipeline, SeededNoise, to_pixels, trained_size
from keifu.inference.images.samplers import Random, SamplerStep, Watch, last_x
from keifu.inference.images.tiled_vae import LatentCodec, tile_of
from keifu.layers.diffusion.sampling_schedule import Schedule
from keifu.layers.unet.prepacked_conv import prepack

GUIDANCE = 7.5  # as in Stable Diffusion
Tokens = Int[Tensor, "batch length"]
Latents = Float[Tensor, "batch channels height width"]


def text_denoiser(
    model: Any, given: Tokens, without: Tokens, guidance: float, rescale: float, extra: Latents | None = None
) -> Network:
    """Return the denoising network of a model for these texts. Texts are encoded and projected here, once.

    given: the text of each row. without: the negative prompts for guidance; both predictions are computed in one batch.
    extra: further input channels of each row, after those of x.
    """
    alone = guidance == 1
    texts = _project(model, given if alone else torch.cat([given, without]))
    more = extra if extra is None or alone else torch.cat([extra, extra])

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return model(x if more is None else torch.cat([x, more], 1), timestep, texts)

    return network if alone else guided_denoiser(network, model.noise, guidance, rescale)


def _project(model: Any, tokens: Tokens) -> Any:
    """Encode and project the text of each row. Equal texts are encoded once."""
    texts, indices = tokens.unique(dim=0, return_inverse=True)
    return model.project(model.encode_text(texts)[indices])


def text_tokens(tokenizer: Tokenizer, texts: Sequence[str], length: int, truncate: bool = False) -> Tokens:
    """Return the ids of texts with special tokens, padded to `length`.

    Raises `UserError` for a longer text, unless `truncate` cuts it.
    """
    rows = tokenizer.encode_batch(texts, special=True)
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if len(row) > length and not truncate:
            raise UserError(
                f"{text[:40]!r}… has {len(row)} tokens with its special tokens, but the model reads {length}: "
                "shorten it, or leave out its end (--truncate)."
            )
        rows[index] = row if len(row) <= length else [*row[: length - 1], row[-1]]
    padding = next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows], device="cpu")


class TextPipeline(Pipeline):
    """Base class of text-to-image pipelines, with the tokenizer of its texts. colours: 1 for grey, 3 for colour."""

    pixels = False

    def __init__(self, model: Any, tokenizer: Tokenizer):
        super().__init__(model)
        self.tokenizer, self.colours = tokenizer, int(model.config.colours)

    def fingerprint(self, more_text: str = "") -> str:
        """Return the fingerprint of the model and the tokenizer."""
        return super().fingerprint(self.tokenizer.fingerprint + more_text)

    def label(self, name: str) -> int:
        """Raise `UserError`: the model has no labels."""
        raise UserError(f"This model draws from a text and knows no classes: say {name!r} in the text.")

    def tokens(self, texts: Sequence[str], truncate: bool = False) -> Tokens:
        """Return the ids of texts, padded to the model's length (see `text_tokens`)."""
        return text_tokens(self.tokenizer, texts, self.model.config.context_length, truncate)

    def check_conditions(self, wanted: ImageRequest) -> None:
        """Raise `UserError` for a label, and for a negative prompt without guidance."""
        if wanted.label is not None:
            self.label(str(wanted.label))
        if wanted.negative and wanted.guidance == 1:
            raise UserError(
                f"Guidance is what leads away from {wanted.negative!r}, and with a guidance of 1 there is none: "
                f"{self.usual_guidance:g} is usual."
            )


class LatentDiffusionPipeline(TextPipeline):
    """Pipeline of a latent diffusion model."""

    usual_guidance = GUIDANCE

    def __init__(self, model: Any, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self.usual_sampler = "ddim" if self.noise.flows else "dpm++-2m"  # 20 steps of it replace 50 of others

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """Return the request with all defaults, checked against the model."""
        if wanted.text is None:
            raise UserError("This model draws from a text, and there is none: say what to draw.")
        self.check_conditions(wanted)
        if self.model.config.masked and wanted.mask is None:
            raise UserError("This model fills in a masked part of a picture: give both (--init, --mask).")
        self.tokens([wanted.text, wanted.negative], wanted.truncate)
        size = wanted.sides() or trained_size(self.model)
        self.model.check_size(*size)
        wanted.check_no_embedding()
        factor = self.model.config.factor
        whole = replace(wanted.completed(self.noise, size), tile=tile_of(wanted.tile, size, factor))
        anew = whole.anew()
        if anew is not None and not bool(anew[:, ::factor, ::factor].any()):
            raise UserError(f"The mask's white is smaller than the {factor} x {factor} pixels of a latent: enlarge it.")
        return whole

    @torch.inference_mode()
    def drawing(
        self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str] | None = None
    ) -> Iterator[SamplerStep]:
        """Yield x and the predicted latents after each step, with a row for each seed, on the model's device.

        wanted: a result of `resolved`. texts: one for each seed; None: the text of `wanted`. The convolutions' weights
        are prepacked first, which takes about as long as a step and doubles their memory.
        """
        chosen = wanted.configure_sampler(self.noise)
        schedule, random = wanted.schedule(chosen.schedule), SeededNoise(seeds)
        given = self.tokens(texts or [wanted.text or ""] * len(seeds), wanted.truncate)
        without = self.tokens([wanted.negative] * len(seeds), wanted.truncate)
        x, kept, extra = self._initial_latents(wanted, schedule, len(seeds), random)
        tokens = given.to(x.device), without.to(x.device)
        network = text_denoiser(prepack(self.model), *tokens, wanted.guidance, wanted.guidance_rescale, extra)
        yield from run_inpainting(chosen, network, x, schedule, random, kept)

    def _initial_latents(
        self, wanted: ImageRequest, schedule: Schedule, count: int, random: Random
    ) -> tuple[Latents, KeptRegion | None, Tensor | None]:
        """Return the initial latents, the kept region, and the extra input channels of an inpainting network.

        Those channels are the mask, and the latents of the image with grey in the masked region."""
        config, device = self.model.config, self.device
        assert wanted.size is not None
        sides = (side // config.factor for side in wanted.size)
        empty = torch.empty((count, config.channels, *sides), dtype=torch.float32, device=device)
        if wanted.init is None:
            return random(empty) * schedule.initial_sigma, None, None
        picture = wanted.init.pixels(wanted.size, config.colours)[None].to(device)
        latents = None
        if not (wanted.from_noise and config.masked):
            latents = self._coder(wanted).latents(picture, random(empty))
        noise = random(empty)
        x = noise * schedule.initial_sigma
        if latents is not None and not wanted.from_noise:
            x = add_initial_noise(latents, noise, schedule)
        if (mask := wanted.anew()) is None:
            return x, None, None
        mask = mask.to(device)
        anew = mask[:, :: config.factor, :: config.factor]  # a latent's value is that of its upper left pixel
        if not config.masked:
            assert latents is not None
            return x, KeptRegion(latents, noise, anew), None
        left = self._coder(wanted).latents(picture.masked_fill(mask, 0.0), random(empty))
        return x, None, torch.cat([anew.to(x.dtype).expand(count, 1, -1, -1), left], 1)

    def decoded(self, latents: Latents, wanted: ImageRequest) -> Float[Tensor, "batch colours rows columns"]:
        """Decode latents to images with values of about -1 to 1."""
        return self._coder(wanted).pictures(latents)

    def _coder(self, wanted: ImageRequest) -> LatentCodec:
        return LatentCodec(self.model, self.model.config.factor, wanted.tile or 0)

    def draw(
        self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None,
        texts: Sequence[str] | None = None,
    ) -> Bytes:  # fmt: skip
        """Draw an image for each seed. Return uint8 on the CPU. `watch` is called with the state after each step.

        wanted: a result of `resolved`. texts: one for each seed; None: the text of `wanted`.
        """
        x = last_x(self.drawing(wanted, seeds, texts), watch)
        return wanted.paste(to_pixels(self.decoded(x, wanted)))
