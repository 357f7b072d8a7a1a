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
    whole = angle.sin().clamp(min=1e-6)
    bent = ((1 - share) * angle).sin() / whole * one + (share * angle).sin() / whole * other
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

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """Return the request with all defaults, checked against the model."""
        self._check(wanted)
        size = wanted.size or trained_size(self.model)
        self.model.check_size(*self._small(size))
        prior = PRIOR_GUIDANCE if wanted.prior_guidance is None else wanted.prior_guidance
        done = replace(wanted, init=None, prior_guidance=prior).completed(self.noise, size)
        steps = {"prior_steps": len(self._prior_sampler(done).schedule.steps)}
        if not self.pixels:
            steps["upsampling_steps"] = len(self._upsampling_sampler(done).schedule.steps)
        return replace(done, init=wanted.init, **steps)

    def _check(self, wanted: ImageRequest) -> None:
        """Raise `UserError` for settings that this model does not support."""
        self.check_conditions(wanted)
        if wanted.text is None and wanted.init is None:
            raise UserError("There is neither a text nor a picture: say what to draw, or give a picture (--init).")
        if wanted.init is None and self.model.config.prior is None:
            raise UserError("This model has no prior, so it varies pictures and draws no text: give one (--init).")
        if wanted.init is not None and self.model.config.pixels is None:
            raise UserError("This model has no image_encoder, so it cannot see a picture: give a text alone.")
        if given := [name for name in OF_PIXELS if vars(wanted)[name] is not None]:
            raise UserError(f"This model draws a picture from its embedding, not from pixels: leave --{given[0]} out.")
        if wanted.towards is not None and isinstance(wanted.towards, str) != (wanted.init is None):
            raise UserError("The way goes from a text to a text, or from a picture to a picture: give two of a kind.")
        if wanted.towards is not None and wanted.count < 2:
            raise UserError("A way towards something has two pictures at least, its ends: give a --count.")
        if wanted.upsampling_steps is not None and self.pixels:
            raise UserError("This model enlarges no pictures: leave --upsampling-steps out.")
        said = [text for text in (wanted.text, wanted.towards, wanted.negative) if isinstance(text, str)]
        self._caption(said, wanted.truncate)

    def _small(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width before super-resolution to `size`."""
        whole, small = self.model.config.size, self.model.config.small_size
        if self.pixels or whole is None or small is None:
            return size
        height, width = (max(1, round(side * of / to)) for side, of, to in zip(size, small, whole, strict=True))
        return height, width

    def _prior_sampler(self, wanted: ImageRequest) -> ConfiguredSampler:
        return self._configure_sampler(self.model.config.prior_noise, wanted, wanted.prior_steps or PRIOR_STEPS)

    def _upsampling_sampler(self, wanted: ImageRequest) -> ConfiguredSampler:
        steps = wanted.upsampling_steps or UPSAMPLING_STEPS
        return self._configure_sampler(self.model.config.upsampling_noise, wanted, steps)

    def _configure_sampler(self, noise: Noise, wanted: ImageRequest, steps: int) -> ConfiguredSampler:
        """Return the request's sampler for the prior or for super-resolution."""
        steps = min(steps, noise.steps)
        return configure_sampler(noise, wanted.sampler, steps, wanted.spacing, wanted.karras, wanted.eta)

    def _caption(self, texts: Sequence[str], truncate: bool) -> Any:
        """Encode the texts."""
        length = self.model.config.context_length
        tokens = self.tokens(texts, truncate)
        lengths = torch.tensor([len(row) for row in self.tokenizer.encode_batch(texts, special=True)], device="cpu")
        real = torch.arange(length, device="cpu") < lengths[:, None]
        with torch.no_grad():
            return self.model.encode_text(tokens.to(self.device), real.to(self.device))

    def _both(self, texts: Sequence[str], wanted: ImageRequest) -> Any:
        """Encode the texts, followed by as many negative prompts."""
        return self._caption([*texts, *[wanted.negative] * len(texts)], wanted.truncate)

    @torch.no_grad()
    def sample_embeddings(self, texts: Sequence[str], wanted: ImageRequest, random: Random) -> Embedding:
        """Sample `wanted.candidates` image embeddings for each text by the prior. Return the one nearest to the text's
        embedding (Ramesh et al., 2022, section 2.2)."""
        guided, count = wanted.prior_guidance != 1, len(texts)
        caption = self._both(texts, wanted) if guided else self._caption(texts, wanted.truncate)
        noise, chosen = self.model.config.prior_noise, self._prior_sampler(wanted)
        network: Network = lambda x, timestep: self.model.predict_embedding(x, timestep, caption)  # noqa: E731
        if guided:
            guidance = 1.0 if wanted.prior_guidance is None else wanted.prior_guidance
            network = guided_denoiser(network, noise, guidance)
        empty = caption.embedding.new_empty(count, self.model.config.embedding_dim, dtype=torch.float32)
        embeddings = []
        for _ in range(wanted.candidates):
            x = random(empty) * chosen.schedule.initial_sigma
            x = last_x(chosen.run(chosen.denoiser(network), x, chosen.schedule, random))
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

    def embeddings(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str], random: Random) -> Embedding:
        """Return the embedding from which each image is generated."""
        count, first, steps = len(seeds), wanted.seed or 0, max(1, wanted.count - 1)
        start = self.encode_image(wanted.init, count) if wanted.init else self.sample_embeddings(texts, wanted, random)
        if wanted.towards is None:
            return start
        if isinstance(wanted.towards, str):
            end = self.sample_embeddings([wanted.towards] * count, wanted, SeededNoise([first] * count))
        else:
            end = self.encode_image(wanted.towards, count)
        return slerp(start, end, torch.tensor([(seed - first) / steps for seed in seeds], device=start.device))

    @torch.inference_mode()
    def drawing(
        self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str] | None, random: Random
    ) -> Iterator[SamplerStep]:
        """Yield x and the predicted images after each step of the decoder, on the model's device.

        wanted: a result of `resolved`. texts: one for each seed; None: the text of `wanted`. In an interpolation the
        images have no text besides their embeddings.
        """
        texts = texts or [wanted.text or ""] * len(seeds)
        image = self.embeddings(wanted, seeds, texts, random)
        texts = texts if wanted.towards is None else [""] * len(seeds)
        chosen, network = wanted.configure_sampler(self.noise), self._decoder(image, texts, wanted)
        shape = len(seeds), self.colours, *self._small(wanted.size or (0, 0))
        x = random(image.new_empty(shape, dtype=torch.float32)) * chosen.schedule.initial_sigma
        yield from chosen.run(chosen.denoiser(network), x, chosen.schedule, random)

    def _decoder(self, image: Embedding, texts: Sequence[str], wanted: ImageRequest) -> Network:
        """Return the decoder conditioned on these embeddings. With guidance, both predictions are computed in one
        batch."""
        if wanted.guidance == 1:
            alone = self.model.embed(image, self._caption(texts, wanted.truncate))
            return lambda x, timestep: self.model(x, timestep, alone)
        null = self.model.null_embedding(len(image)).to(image)
        both = self.model.embed(torch.cat([image, null]), self._both(texts, wanted))
        guided = wanted.guidance, wanted.guidance_rescale
        return guided_denoiser(lambda x, timestep: self.model(x, timestep, both), self.noise, *guided)

    @torch.no_grad()
    def upsample(
        self, small: Float[Tensor, "batch channels height width"], wanted: ImageRequest, random: Random
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Enlarge small images to the requested size."""
        if self.pixels or wanted.size is None:
            return small
        chosen = self._upsampling_sampler(wanted)
        beside = F.interpolate(small.clamp(-1, 1), list(wanted.size), mode="bicubic", antialias=True)
        final = chosen.schedule.steps[-1].level.timestep

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            return self.model.upsample(x, timestep, beside, last=float(timestep[0]) == final)

        x = random(beside) * chosen.schedule.initial_sigma
        return last_x(chosen.run(chosen.denoiser(network), x, chosen.schedule, random))

    def draw(
        self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None,
        texts: Sequence[str] | None = None,
    ) -> Bytes:  # fmt: skip
        """Draw like `LatentDiffusionPipeline.draw`. The steps are those of the decoder.

        In an interpolation all images have the first one's noise.
        """
        random = SeededNoise(seeds if wanted.towards is None else [wanted.seed or 0] * len(seeds))
        x = last_x(self.drawing(wanted, seeds, texts, random), watch)
        return to_pixels(self.upsample(x, wanted, random))
