"""unCLIP pipeline (DALL-E 2, Karlo): prior from text to image embedding, decoder, super-resolution; model interface.

The embedding is sampled by the prior from a text, or computed from an image. Axes: batch, channels, height, width of
images; length = tokens of a text; embedding = dimensions of an embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.data.images.preprocessing import Preprocessing
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.images.denoiser import Network, guided_denoiser
from keifu.generation.images.image_to_image import InputImage
from keifu.generation.images.latent_diffusion import text_tokens
from keifu.generation.images.pixel_diffusion import Bytes, ImageRequest, SeededNoise, Watch, to_pixels
from keifu.generation.images.png_metadata import fingerprint
from keifu.generation.images.samplers import ConfiguredSampler, Random, SamplerStep, configure_sampler
from keifu.layers.diffusion.noise_schedule import Noise

Tokens = Int[Tensor, "batch length"]
Embedding = Float[Tensor, "batch embedding"]
Pixels = Float[Tensor, "batch channels height width"]


@runtime_checkable
class UnclipConfig(Protocol):
    """Interface of an unCLIP model's config."""

    pixels: Any
    """Preprocessing of images for the image encoder; None without an image encoder."""
    prior_noise: Noise
    """The noise schedule of the prior."""
    decoder_noise: Noise
    """The noise schedule of the decoder."""
    size: tuple[int, int] | None
    """Height and width of finished images; None if unknown."""
    small_size: tuple[int, int] | None
    """Height and width before super-resolution."""
    upsampling_noise: Noise | None
    """The noise schedule of super-resolution; None without it."""
    channels: int
    """Of a picture."""
    embedding_dim: int
    """Dimensions of an embedding."""
    context_length: int
    """Tokens of every text."""
    imagines: bool
    """Whether there is a prior, so that it can generate from text and not only vary images."""


@runtime_checkable
class UnclipModel(Protocol):
    """Interface of an unCLIP model: a prior predicts an image embedding from a text, a decoder generates the image.

    `model(x, timestep [batch], condition)` is the decoder's prediction.
    """

    config: UnclipConfig
    """Its sizes and noises."""

    def __call__(self, x: Pixels, timestep: Tensor, told: Any) -> Tensor:
        """Its prediction."""
        ...

    def encode_text(self, tokens: Tokens, real: Bool[Tensor, "batch length"]) -> Any:
        """The encoded texts; their `embedding` is in the joint space of texts and images."""
        ...

    def encode_image(self, pixels: Pixels) -> Embedding:
        """Embeddings of images preprocessed by `config.pixels`."""
        ...

    def imagine(self, x: Embedding, timestep: Tensor, caption: Any) -> Embedding:
        """The prior's prediction for noisy normalised embeddings."""
        ...

    def restored(self, x: Embedding) -> Embedding:
        """Embeddings from normalised ones: the inverse of the normalisation."""
        ...

    def nothing(self, batch: int) -> Embedding:
        """The null embedding, for unconditional predictions."""
        ...

    def tell(self, image: Embedding, caption: Any) -> Any:
        """The condition of every step of the decoder."""
        ...

    def enlarge(self, x: Pixels, timestep: Tensor, small: Pixels, last: bool) -> Tensor:
        """Super-resolution's prediction for large noisy images, given the small ones resized to that size."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """A size before super-resolution that does not fit the network is a `UserError`."""
        ...


PRIOR_GUIDANCE, PRIOR_STEPS, UPSAMPLING_STEPS = 4.0, 25, 7  # Karlo's, the published unCLIP
OF_PIXELS = ("strength", "mask", "tile")  # without meaning where an image is generated from an embedding
OWN = ("init", "towards", "prior_steps", "prior_guidance", "candidates", "upsampling_steps")


def slerp(a: Embedding, b: Embedding, share: Float[Tensor, " batch"]) -> Embedding:
    """Spherical interpolation from a to b; lengths are interpolated linearly (Ramesh et al., 2022, section 3.2)."""
    share = share[:, None].to(a.dtype)
    one, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (one * other).sum(-1, keepdim=True).clamp(-1, 1).acos()
    whole = angle.sin().clamp(min=1e-6)
    bent = ((1 - share) * angle).sin() / whole * one + (share * angle).sin() / whole * other
    way = torch.where(angle > 1e-3, bent, (1 - share) * one + share * other)
    return way * ((1 - share) * a.norm(dim=-1, keepdim=True) + share * b.norm(dim=-1, keepdim=True))


class UnclipPipeline:
    """The `ImagePipeline` of an unCLIP model and its tokenizer."""

    usual_guidance = 8.0  # Karlo's
    usual_sampler = "ddim"

    def __init__(self, model: UnclipModel, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.colours = model, tokenizer, model.config.channels
        self.pixels = model.config.upsampling_noise is None

    @property
    def noise(self) -> Noise:
        """The noise schedule of the decoder."""
        return self.model.config.decoder_noise

    def fingerprint(self) -> str:
        """Of the weights, the config and the tokenizer."""
        return fingerprint(cast(Any, self.model), self.tokenizer.fingerprint)

    def label(self, name: str) -> int:
        """There is none: a `UserError`."""
        raise UserError(f"This model draws from a text and knows no classes: say {name!r} in the text.")

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """The same request with every default filled in, checked against the model."""
        self._check(wanted)
        size = wanted.size or self.model.config.size
        if size is None:
            raise UserError("The model does not say how large its pictures are: give their size.")
        self.model.check_size(*self._small(size))
        usual = ImageRequest()
        done = replace(wanted, **{name: vars(usual)[name] for name in OWN}).completed(self.noise, size)
        prior = PRIOR_GUIDANCE if wanted.prior_guidance is None else wanted.prior_guidance
        own = {name: vars(wanted)[name] for name in OWN} | {"prior_guidance": prior}
        done = replace(done, **own)
        own = {"prior_steps": len(self._prior_sampler(done).schedule.steps)}
        if not self.pixels:
            own["upsampling_steps"] = len(self._upsampling_sampler(done).schedule.steps)
        return replace(done, **own)

    def _check(self, wanted: ImageRequest) -> None:
        """Refuses what this model cannot draw."""
        if wanted.label is not None:
            self.label(str(wanted.label))
        if wanted.text is None and wanted.init is None:
            raise UserError("There is neither a text nor a picture: say what to draw, or give a picture (--init).")
        if wanted.init is None and not self.model.config.imagines:
            raise UserError("This model has no prior, so it varies pictures and draws no text: give one (--init).")
        if wanted.init is not None and self.model.config.pixels is None:
            raise UserError("This model has no image_encoder, so it cannot see a picture: give a text alone.")
        if given := [name for name in OF_PIXELS if vars(wanted)[name] is not None]:
            raise UserError(
                f"This model draws a picture from its embedding, not from its pixels: leave --{given[0]} out."
            )
        if wanted.towards is not None and isinstance(wanted.towards, str) != (wanted.init is None):
            raise UserError("The way goes from a text to a text, or from a picture to a picture: give two of a kind.")
        if wanted.towards is not None and wanted.count < 2:
            raise UserError("A way towards something has two pictures at least, its ends: give a --count.")
        if wanted.upsampling_steps is not None and self.pixels:
            raise UserError("This model enlarges no pictures: leave --upsampling-steps out.")
        if wanted.negative and wanted.guidance == 1:
            raise UserError(
                f"Guidance is what leads away from {wanted.negative!r}, and with a guidance of 1 there is none: "
                f"{self.usual_guidance:g} is usual."
            )
        said = [text for text in (wanted.text, wanted.towards, wanted.negative) if isinstance(text, str)]
        self._caption(said, wanted.truncate)

    def _small(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width before super-resolution to this size."""
        whole, small = self.model.config.size, self.model.config.small_size
        if self.pixels or whole is None or small is None:
            return size
        height, width = (max(1, round(side * of / to)) for side, of, to in zip(size, small, whole, strict=True))
        return height, width

    def _prior_sampler(self, wanted: ImageRequest) -> ConfiguredSampler:
        return self._configure_sampler(self.model.config.prior_noise, wanted, wanted.prior_steps or PRIOR_STEPS)

    def _upsampling_sampler(self, wanted: ImageRequest) -> ConfiguredSampler:
        noise = self.model.config.upsampling_noise
        assert noise is not None
        return self._configure_sampler(noise, wanted, wanted.upsampling_steps or UPSAMPLING_STEPS)

    def _configure_sampler(self, noise: Noise, wanted: ImageRequest, steps: int) -> ConfiguredSampler:
        """The request's sampler for the prior or for super-resolution."""
        steps = min(steps, noise.steps)
        return configure_sampler(noise, wanted.sampler, steps, wanted.spacing, wanted.karras, wanted.eta)

    def _caption(self, texts: Sequence[str], truncate: bool) -> Any:
        """The encoded texts."""
        length = self.model.config.context_length
        tokens = text_tokens(self.tokenizer, texts, length, truncate)
        lengths = torch.tensor([len(row) for row in self.tokenizer.encode_batch(texts, special=True)])
        device = next(cast(Any, self.model).parameters()).device
        with torch.no_grad():
            return self.model.encode_text(tokens.to(device), (torch.arange(length) < lengths[:, None]).to(device))

    def _both(self, texts: Sequence[str], wanted: ImageRequest) -> Any:
        """The encoded texts, and after them as many negative prompts."""
        return self._caption([*texts, *[wanted.negative] * len(texts)], wanted.truncate)

    @torch.no_grad()
    def sample_embeddings(self, texts: Sequence[str], wanted: ImageRequest, random: Random) -> Embedding:
        """An image embedding for each text, by the prior: the best of `wanted.candidates`.

        That is the one nearest to the text's embedding (Ramesh et al., 2022, section 2.2)."""
        guided, count = wanted.prior_guidance != 1, len(texts)
        caption = self._both(texts, wanted) if guided else self._caption(texts, wanted.truncate)
        noise, chosen = self.model.config.prior_noise, self._prior_sampler(wanted)

        def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            towards, away = self.model.imagine(x.repeat(2, 1), timestep.repeat(2), caption).chunk(2)
            return towards, away

        network: Network = lambda x, timestep: self.model.imagine(x, timestep, caption)  # noqa: E731
        if guided:
            network = guided_denoiser(
                conditional, noise, 1.0 if wanted.prior_guidance is None else wanted.prior_guidance
            )
        empty = torch.empty(count, self.model.config.embedding_dim, device=caption.embedding.device)
        found = []
        for _ in range(wanted.candidates):
            x = random(empty) * chosen.schedule.initial_sigma
            *_, last = chosen.run(chosen.denoiser(network), x, chosen.schedule, random)
            found.append(self.model.restored(last.x))
        said = F.normalize(caption.embedding[:count].float(), dim=-1)
        near = torch.stack([(F.normalize(each.float(), dim=-1) * said).sum(-1) for each in found])
        return torch.stack(found)[near.argmax(0), torch.arange(count, device=empty.device)]

    @torch.no_grad()
    def encode_image(self, picture: InputImage, count: int) -> Embedding:
        """The embedding of an image, repeated `count` times."""
        like = next(cast(Any, self.model).parameters())
        pixels = Preprocessing(**vars(self.model.config.pixels))([picture.image()])
        return self.model.encode_image(pixels.to(like)).expand(count, -1)

    def embeddings(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str], random: Random) -> Embedding:
        """The embedding that each image is generated from."""
        start = (
            self.encode_image(wanted.init, len(seeds)) if wanted.init else self.sample_embeddings(texts, wanted, random)
        )
        if wanted.towards is None:
            return start
        if isinstance(wanted.towards, str):
            end = self.sample_embeddings(
                [wanted.towards] * len(seeds), wanted, SeededNoise([wanted.seed or 0] * len(seeds))
            )
        else:
            end = self.encode_image(wanted.towards, len(seeds))
        first, steps = wanted.seed or 0, max(1, wanted.count - 1)
        return slerp(start, end, torch.tensor([(seed - first) / steps for seed in seeds], device=start.device))

    @torch.inference_mode()
    def drawing(
        self,
        wanted: ImageRequest,
        seeds: Sequence[int],
        texts: Sequence[str] | None = None,
        random: Random | None = None,
    ) -> Iterator[SamplerStep]:
        """x and the predicted images after each step of the decoder, on the model's device.

        wanted: as `resolved` gives it. texts: one for each seed; the one of `wanted` where None. All images of an
        interpolation have the first one's noise, and no text besides their embeddings.
        """
        random = self._random(wanted, seeds) if random is None else random
        texts = texts or [wanted.text or ""] * len(seeds)
        image = self.embeddings(wanted, seeds, texts, random)
        texts = texts if wanted.towards is None else [""] * len(seeds)
        chosen, network = wanted.configure_sampler(self.noise), self._decoder(image, texts, wanted)
        shape = len(seeds), self.model.config.channels, *self._small(wanted.size or (0, 0))
        x = random(torch.empty(shape, device=image.device)) * chosen.schedule.initial_sigma
        yield from chosen.run(chosen.denoiser(network), x, chosen.schedule, random)

    def _random(self, wanted: ImageRequest, seeds: Sequence[int]) -> Random:
        return SeededNoise(seeds if wanted.towards is None else [wanted.seed or 0] * len(seeds))

    def _decoder(self, image: Embedding, texts: Sequence[str], wanted: ImageRequest) -> Network:
        """The decoder conditioned on these embeddings; with guidance, both predictions are made in one batch."""
        if wanted.guidance == 1:
            alone = self.model.tell(image, self._caption(texts, wanted.truncate))
            return lambda x, timestep: self.model(x, timestep, alone)
        both = self.model.tell(torch.cat([image, self.model.nothing(len(image)).to(image)]), self._both(texts, wanted))

        def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            towards, away = self.model(x.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
            return towards, away

        return guided_denoiser(conditional, self.noise, wanted.guidance, wanted.guidance_rescale)

    @torch.no_grad()
    def upsample(
        self, small: Float[Tensor, "batch channels height width"], wanted: ImageRequest, random: Random
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Super-resolution of small images to the requested size."""
        if self.pixels or wanted.size is None:
            return small
        chosen = self._upsampling_sampler(wanted)
        beside = F.interpolate(small.clamp(-1, 1), list(wanted.size), mode="bicubic", antialias=True)
        final = chosen.schedule.steps[-1].level.timestep

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            return self.model.enlarge(x, timestep, beside, last=float(timestep[0]) == final)

        x = random(beside) * chosen.schedule.initial_sigma
        *_, last = chosen.run(chosen.denoiser(network), x, chosen.schedule, random)
        return last.x

    def draw(self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """A finished image of each seed, as bytes on the CPU."""
        return self._drawn(wanted, seeds, None, watch)

    def draw_texts(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str]) -> Bytes:
        """A finished image of each seed and text."""
        return self._drawn(wanted, seeds, texts, lambda state: None)

    def _drawn(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str] | None, watch: Watch) -> Bytes:
        random, x = self._random(wanted, seeds), torch.empty(0)
        for state in self.drawing(wanted, seeds, texts, random):
            watch(state)
            x = state.x
        return to_pixels(self.upsample(x, wanted, random))
