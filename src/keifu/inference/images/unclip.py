"""unCLIP pipeline (DALL-E 2, Karlo): prior from text to image embedding, decoder, super-resolution.

The prior samples the embedding from a text, or the embedding is computed from an image. Axes: batch, channels, height,
width of images; length = tokens of a text; embedding = dimensions of an embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.data.images.preprocessing import Preprocessing
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.images.denoiser import Network, guided_denoiser
from keifu.inference.images.image_to_image import InputImage
from keifu.inference.images.latent_diffusion import TextPipeline
from keifu.inference.images.pixel_diffusion import Bytes, ImageRequest, SeededNoise, to_pixels, trained_size
from keifu.inference.images.samplers import ConfiguredSampler, Random, SamplerStep, Watch, configure_sampler, last_x
from keifu.layers.diffusion.noise_schedule import Noise

Embedding = Float[Tensor, "batch embedding"]


PRIOR_GUIDANCE, PRIOR_STEPS, UPSAMPLING_STEPS = 4.0, 25, 7  # as in Karlo, the published unCLIP
OF_PIXELS = ("strength", "mask", "tile")  # not supported when an image is generated from an embedding


def slerp(a: Embedding, b: Embedding, share: Float[Tensor, " batch"]) -> Embedding:
    """Interpolate on a sphere from a to b. Lengths are interpolated linearly (Ramesh et al., 2022, section 3.2)."""
    share = share[:, None].to(a.dtype)
    one, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (one * other).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin().clamp(min=1e-6)
    bent = ((1 - share) * angle).sin() / sine * one + (share * angle).sin() / sine * other
    way = torch.where(angle > 1e-3, bent, (1 - share) * one + share * other)
    return way * ((1 - share) * a.norm(dim=-1, keepdim=True) + share * b.norm(dim=-1, keepdim=True))


class UnclipPipeline(TextPipeline):
    """Pipeline of an unCLIP model."""

    usual_guidance = 8.0  # as in Karlo

    def __init__(self, model: Any, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self.pixels = model.config.upsampling_noise is None

    @property
    def noise(self) -> Noise:
        """Noise schedule of the decoder."""
        return self.model.config.decoder_noise

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults, checked against the model."""
        self._check(request)
        size = request.size or trained_size(self.model)
        self.model.check_size(*self._small(size))
        prior = PRIOR_GUIDANCE if request.prior_guidance is None else request.prior_guidance
        done = replace(request, init=None, prior_guidance=prior).completed(self.noise, size)
        steps = {"prior_steps": len(self._prior_sampler(done).schedule.steps)}
        if not self.pixels:
            steps["upsampling_steps"] = len(self._upsampling_sampler(done).schedule.steps)
        return replace(done, init=request.init, **steps)

    def _check(self, request: ImageRequest) -> None:
        """Raise `UserError` for settings that this model does not support."""
        self.check_conditions(request)
        if request.text is None and request.init is None:
            raise UserError("There is neither a text nor a picture: say what to draw, or give a picture (--init).")
        if request.init is None and self.model.config.prior is None:
            raise UserError("This model has no prior, so it varies pictures and draws no text: give one (--init).")
        if request.init is not None and self.model.config.pixels is None:
            raise UserError("This model has no image_encoder, so it cannot see a picture: give a text alone.")
        if pixel_options := [name for name in OF_PIXELS if vars(request)[name] is not None]:
            raise UserError(
                f"This model draws a picture from its embedding, not from pixels: leave --{pixel_options[0]} out."
            )
        if request.towards is not None and isinstance(request.towards, str) != (request.init is None):
            raise UserError("The way goes from a text to a text, or from a picture to a picture: give two of a kind.")
        if request.towards is not None and request.count < 2:
            raise UserError("A way towards something has two pictures at least, its ends: give a --count.")
        if request.upsampling_steps is not None and self.pixels:
            raise UserError("This model enlarges no pictures: leave --upsampling-steps out.")
        said = [text for text in (request.text, request.towards, request.negative) if isinstance(text, str)]
        self._caption(said, request.truncate)

    def _small(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width before super-resolution to `size`."""
        full_size, small = self.model.config.size, self.model.config.small_size
        if self.pixels or full_size is None or small is None:
            return size
        height, width = (max(1, round(side * of / to)) for side, of, to in zip(size, small, full_size, strict=True))
        return height, width

    def _prior_sampler(self, request: ImageRequest) -> ConfiguredSampler:
        return self._configure_sampler(self.model.config.prior_noise, request, request.prior_steps or PRIOR_STEPS)

    def _upsampling_sampler(self, request: ImageRequest) -> ConfiguredSampler:
        steps = request.upsampling_steps or UPSAMPLING_STEPS
        return self._configure_sampler(self.model.config.upsampling_noise, request, steps)

    def _configure_sampler(self, noise: Noise, request: ImageRequest, steps: int) -> ConfiguredSampler:
        """Return the request's sampler for the prior or for super-resolution."""
        steps = min(steps, noise.steps)
        return configure_sampler(noise, request.sampler, steps, request.spacing, request.karras, request.eta)

    def _caption(self, texts: Sequence[str], truncate: bool) -> Any:
        """Encode the texts."""
        length = self.model.config.context_length
        tokens = self.tokens(texts, truncate)
        lengths = torch.tensor([len(row) for row in self.tokenizer.encode_batch(texts, special=True)], device="cpu")
        real = torch.arange(length, device="cpu") < lengths[:, None]
        with torch.no_grad():
            return self.model.encode_text(tokens.to(self.device), real.to(self.device))

    def _both(self, texts: Sequence[str], request: ImageRequest) -> Any:
        """Encode the texts, followed by as many negative prompts."""
        return self._caption([*texts, *[request.negative] * len(texts)], request.truncate)

    @torch.no_grad()
    def sample_embeddings(self, texts: Sequence[str], request: ImageRequest, random: Random) -> Embedding:
        """Sample `wanted.candidates` image embeddings for each text by the prior. Return the one nearest to the text's
        embedding (Ramesh et al., 2022, section 2.2)."""
        guided, count = request.prior_guidance != 1, len(texts)
        caption = self._both(texts, request) if guided else self._caption(texts, request.truncate)
        noise, sampler = self.model.config.prior_noise, self._prior_sampler(request)
        network: Network = lambda x, timestep: self.model.predict_embedding(x, timestep, caption)  # noqa: E731
        if guided:
            guidance = 1.0 if request.prior_guidance is None else request.prior_guidance
            network = guided_denoiser(network, noise, guidance)
        empty = caption.embedding.new_empty(count, self.model.config.embedding_dim, dtype=torch.float32)
        embeddings = []
        for _ in range(request.candidates):
            x = random(empty) * sampler.schedule.initial_sigma
            x = last_x(sampler.run(sampler.denoiser(network), x, sampler.schedule, random))
            embeddings.append(self.model.prior.restored(x))
        said = F.normalize(caption.embedding[:count].float(), dim=-1)
        near = torch.stack([(F.normalize(candidate.float(), dim=-1) * said).sum(-1) for candidate in embeddings])
        return torch.stack(embeddings)[near.argmax(0), torch.arange(count, device=empty.device)]

    @torch.no_grad()
    def encode_image(self, picture: InputImage, count: int) -> Embedding:
        """Embed an image. The embedding is repeated `count` times."""
        like = next(self.model.parameters())
        pixels = Preprocessing(**vars(self.model.config.pixels))([picture.image()])
        return self.model.encode_image(pixels.to(like)).expand(count, -1)

    def embeddings(
        self, request: ImageRequest, seeds: Sequence[int], texts: Sequence[str], random: Random
    ) -> Embedding:
        """Return the embedding from which each image is generated."""
        count, first, steps = len(seeds), request.seed or 0, max(1, request.count - 1)
        start = (
            self.encode_image(request.init, count) if request.init else self.sample_embeddings(texts, request, random)
        )
        if request.towards is None:
            return start
        if isinstance(request.towards, str):
            end = self.sample_embeddings([request.towards] * count, request, SeededNoise([first] * count))
        else:
            end = self.encode_image(request.towards, count)
        return slerp(start, end, torch.tensor([(seed - first) / steps for seed in seeds], device=start.device))

    @torch.inference_mode()
    def drawing(
        self, request: ImageRequest, seeds: Sequence[int], texts: Sequence[str] | None, random: Random
    ) -> Iterator[SamplerStep]:
        """Yield x and the predicted images after each step of the decoder, on the model's device.

        request: a result of `resolved`. texts: one for each seed; None: the text of `request`. In an interpolation the
        images have no text besides their embeddings.
        """
        texts = texts or [request.text or ""] * len(seeds)
        image = self.embeddings(request, seeds, texts, random)
        texts = texts if request.towards is None else [""] * len(seeds)
        sampler, network = request.configure_sampler(self.noise), self._decoder(image, texts, request)
        shape = len(seeds), self.colours, *self._small(request.size or (0, 0))
        x = random(image.new_empty(shape, dtype=torch.float32)) * sampler.schedule.initial_sigma
        yield from sampler.run(sampler.denoiser(network), x, sampler.schedule, random)

    def _decoder(self, image: Embedding, texts: Sequence[str], request: ImageRequest) -> Network:
        """Return the decoder conditioned on these embeddings. With guidance, both predictions are computed in one
        batch."""
        if request.guidance == 1:
            alone = self.model.embed(image, self._caption(texts, request.truncate))
            return lambda x, timestep: self.model(x, timestep, alone)
        null = self.model.null_embedding(len(image)).to(image)
        both = self.model.embed(torch.cat([image, null]), self._both(texts, request))
        guided = request.guidance, request.guidance_rescale
        return guided_denoiser(lambda x, timestep: self.model(x, timestep, both), self.noise, *guided)

    @torch.no_grad()
    def upsample(
        self, small: Float[Tensor, "batch channels height width"], request: ImageRequest, random: Random
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Enlarge small images to the requested size."""
        if self.pixels or request.size is None:
            return small
        sampler = self._upsampling_sampler(request)
        beside = F.interpolate(small.clamp(-1, 1), list(request.size), mode="bicubic", antialias=True)
        final = sampler.schedule.steps[-1].level.timestep

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            return self.model.upsample(x, timestep, beside, last=float(timestep[0]) == final)

        x = random(beside) * sampler.schedule.initial_sigma
        return last_x(sampler.run(sampler.denoiser(network), x, sampler.schedule, random))

    def draw(
        self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None,
        texts: Sequence[str] | None = None,
    ) -> Bytes:  # fmt: skip
        """Draw like `LatentDiffusionPipeline.draw`. The steps are those of the decoder.

        In an interpolation all images have the first one's noise.
        """
        random = SeededNoise(seeds if request.towards is None else [request.seed or 0] * len(seeds))
        x = last_x(self.drawing(request, seeds, texts, random), watch)
        return to_pixels(self.upsample(x, request, random))
