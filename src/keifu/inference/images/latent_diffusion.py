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
    model: Any, prompt_tokens: Tokens, without: Tokens, guidance: float, rescale: float, extra: Latents | None = None
) -> Network:
    """Return the denoising network of a model for these texts. Texts are encoded and projected here, once.

    prompt_tokens: the text of each row. without: the negative prompts for guidance; both predictions are computed in
    one batch. extra: further input channels of each row, after those of x.
    """
    alone = guidance == 1
    texts = _project(model, prompt_tokens if alone else torch.cat([prompt_tokens, without]))
    extra_channels = extra if extra is None or alone else torch.cat([extra, extra])

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        return model(x if extra_channels is None else torch.cat([x, extra_channels], 1), timestep, texts)

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

    def check_conditions(self, request: ImageRequest) -> None:
        """Raise `UserError` for a label, and for a negative prompt without guidance."""
        if request.label is not None:
            self.label(str(request.label))
        if request.negative and request.guidance == 1:
            raise UserError(
                f"Guidance is what leads away from {request.negative!r}, and with a guidance of 1 there is none: "
                f"{self.usual_guidance:g} is usual."
            )


class LatentDiffusionPipeline(TextPipeline):
    """Pipeline of a latent diffusion model."""

    usual_guidance = GUIDANCE

    def __init__(self, model: Any, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self.usual_sampler = "ddim" if self.noise.flows else "dpm++-2m"  # 20 steps of it replace 50 of others

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults, checked against the model."""
        if request.text is None:
            raise UserError("This model draws from a text, and there is none: say what to draw.")
        self.check_conditions(request)
        if self.model.config.masked and request.mask is None:
            raise UserError("This model fills in a masked part of a picture: give both (--init, --mask).")
        self.tokens([request.text, request.negative], request.truncate)
        size = request.sides() or trained_size(self.model)
        self.model.check_size(*size)
        request.check_no_embedding()
        factor = self.model.config.factor
        complete = replace(request.completed(self.noise, size), tile=tile_of(request.tile, size, factor))
        anew = complete.anew()
        if anew is not None and not bool(anew[:, ::factor, ::factor].any()):
            raise UserError(f"The mask's white is smaller than the {factor} x {factor} pixels of a latent: enlarge it.")
        return complete

    @torch.inference_mode()
    def drawing(
        self, request: ImageRequest, seeds: Sequence[int], texts: Sequence[str] | None = None
    ) -> Iterator[SamplerStep]:
        """Yield x and the predicted latents after each step, with a row for each seed, on the model's device.

        request: a result of `resolved`. texts: one for each seed; None: the text of `request`. The convolutions'
        weights are prepacked first, which takes about as long as a step and doubles their memory.
        """
        sampler = request.configure_sampler(self.noise)
        schedule, random = request.schedule(sampler.schedule), SeededNoise(seeds)
        prompt_tokens = self.tokens(texts or [request.text or ""] * len(seeds), request.truncate)
        without = self.tokens([request.negative] * len(seeds), request.truncate)
        x, region, extra = self._initial_latents(request, schedule, len(seeds), random)
        tokens = prompt_tokens.to(x.device), without.to(x.device)
        network = text_denoiser(prepack(self.model), *tokens, request.guidance, request.guidance_rescale, extra)
        yield from run_inpainting(sampler, network, x, schedule, random, region)

    def _initial_latents(
        self, request: ImageRequest, schedule: Schedule, count: int, random: Random
    ) -> tuple[Latents, KeptRegion | None, Tensor | None]:
        """Return the initial latents, the kept region, and the extra input channels of an inpainting network.

        Those channels are the mask, and the latents of the image with grey in the masked region."""
        config, device = self.model.config, self.device
        assert request.size is not None
        sides = (side // config.factor for side in request.size)
        empty = torch.empty((count, config.channels, *sides), dtype=torch.float32, device=device)
        if request.init is None:
            return random(empty) * schedule.initial_sigma, None, None
        picture = request.init.pixels(request.size, config.colours)[None].to(device)
        latents = None
        if not (request.from_noise and config.masked):
            latents = self._coder(request).latents(picture, random(empty))
        noise = random(empty)
        x = noise * schedule.initial_sigma
        if latents is not None and not request.from_noise:
            x = add_initial_noise(latents, noise, schedule)
        if (mask := request.anew()) is None:
            return x, None, None
        mask = mask.to(device)
        anew = mask[:, :: config.factor, :: config.factor]  # a latent's value is that of its upper left pixel
        if not config.masked:
            assert latents is not None
            return x, KeptRegion(latents, noise, anew), None
        masked_latents = self._coder(request).latents(picture.masked_fill(mask, 0.0), random(empty))
        return x, None, torch.cat([anew.to(x.dtype).expand(count, 1, -1, -1), masked_latents], 1)

    def decoded(self, latents: Latents, request: ImageRequest) -> Float[Tensor, "batch colours rows columns"]:
        """Decode latents to images with values of about -1 to 1."""
        return self._coder(request).pictures(latents)

    def _coder(self, request: ImageRequest) -> LatentCodec:
        return LatentCodec(self.model, self.model.config.factor, request.tile or 0)

    def draw(
        self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None,
        texts: Sequence[str] | None = None,
    ) -> Bytes:  # fmt: skip
        """Draw an image for each seed. Return uint8 on the CPU. `watch` is called with the state after each step.

        request: a result of `resolved`. texts: one for each seed; None: the text of `request`.
        """
        x = last_x(self.drawing(request, seeds, texts), watch)
        return request.paste(to_pixels(self.decoded(x, request)))
