"""From a text or a picture to pictures by way of an embedding: imagined or seen, drawn, enlarged; knows no sampler and
no kind of network.

Axes: batch, channels, height, width of pictures; embedding = numbers of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from keifu.data.preprocessing import Preprocessing
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.denoiser import Network, with_guidance
from keifu.generation.imagining import Embedding, Imagining
from keifu.generation.originals import Original
from keifu.generation.picture_record import fingerprint
from keifu.generation.pictures import Drawing, finished
from keifu.generation.sampler_table import Route, route
from keifu.generation.samplers import Drawn, Random
from keifu.generation.seeds import Seeds
from keifu.generation.text_to_picture import text_tokens
from keifu.layers.noise import Noise

PRIOR_GUIDANCE, PRIOR_STEPS, UPSAMPLING_STEPS = 4.0, 25, 7  # Karlo's, the published unCLIP
OF_PIXELS = ("strength", "mask", "tile")  # what means nothing where a picture is drawn anew from its embedding
OWN = ("init", "towards", "prior_steps", "prior_guidance", "candidates", "upsampling_steps")


def slerp(a: Embedding, b: Embedding, share: Float[Tensor, " batch"]) -> Embedding:
    """From a to b along the arc between their directions, their lengths in proportion (Ramesh et al., 2022, section
    3.2)."""
    share = share[:, None].to(a.dtype)
    one, other = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (one * other).sum(-1, keepdim=True).clamp(-1, 1).acos()
    whole = angle.sin().clamp(min=1e-6)
    bent = ((1 - share) * angle).sin() / whole * one + (share * angle).sin() / whole * other
    way = torch.where(angle > 1e-3, bent, (1 - share) * one + share * other)
    return way * ((1 - share) * a.norm(dim=-1, keepdim=True) + share * b.norm(dim=-1, keepdim=True))


class EmbeddingPainter:
    """A model that draws by way of an embedding, with the tokenizer of its texts: a `Drawer`."""

    usual_guidance = 8.0  # Karlo's
    usual_sampler = "ddim"

    def __init__(self, model: Imagining, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.colours = model, tokenizer, model.config.channels
        self.pixels = model.config.upsampling_noise is None

    @property
    def noise(self) -> Noise:
        """What pictures are freed of before they are enlarged."""
        return self.model.config.decoder_noise

    def fingerprint(self) -> str:
        """Of the weights, the config and the tokenizer."""
        return fingerprint(cast(Any, self.model), self.tokenizer.fingerprint)

    def label(self, name: str) -> int:
        """There is none: a `UserError`."""
        raise UserError(f"This model draws from a text and knows no classes: say {name!r} in the text.")

    def resolved(self, wanted: Drawing) -> Drawing:
        """The same with everything said that was left open, and checked against the model."""
        self._check(wanted)
        size = wanted.size or self.model.config.size
        if size is None:
            raise UserError("The model does not say how large its pictures are: give their size.")
        self.model.check_size(*self._small(size))
        usual = Drawing()
        done = replace(wanted, **{name: vars(usual)[name] for name in OWN}).completed(self.noise, size)
        prior = PRIOR_GUIDANCE if wanted.prior_guidance is None else wanted.prior_guidance
        own = {name: vars(wanted)[name] for name in OWN} | {"prior_guidance": prior}
        done = replace(done, **own)
        own = {"prior_steps": len(self._prior_route(done).path.strides)}
        if not self.pixels:
            own["upsampling_steps"] = len(self._upsampling_route(done).path.strides)
        return replace(done, **own)

    def _check(self, wanted: Drawing) -> None:
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
        """Height and width before pictures are enlarged to this size."""
        whole, small = self.model.config.size, self.model.config.small_size
        if self.pixels or whole is None or small is None:
            return size
        height, width = (max(1, round(side * of / to)) for side, of, to in zip(size, small, whole, strict=True))
        return height, width

    def _prior_route(self, wanted: Drawing) -> Route:
        return self._route(self.model.config.prior_noise, wanted, wanted.prior_steps or PRIOR_STEPS)

    def _upsampling_route(self, wanted: Drawing) -> Route:
        noise = self.model.config.upsampling_noise
        assert noise is not None
        return self._route(noise, wanted, wanted.upsampling_steps or UPSAMPLING_STEPS)

    def _route(self, noise: Noise, wanted: Drawing, steps: int) -> Route:
        """The drawing's sampler for the prior or the upsampler."""
        return route(noise, wanted.sampler, min(steps, noise.steps), wanted.spacing, wanted.karras, wanted.eta)

    def _caption(self, texts: Sequence[str], truncate: bool) -> Any:
        """What is told of texts."""
        length = self.model.config.context_length
        tokens = text_tokens(self.tokenizer, texts, length, truncate)
        lengths = torch.tensor([len(row) for row in self.tokenizer.encode_batch(texts, special=True)])
        device = next(cast(Any, self.model).parameters()).device
        with torch.no_grad():
            return self.model.encode_text(tokens.to(device), (torch.arange(length) < lengths[:, None]).to(device))

    def _both(self, texts: Sequence[str], wanted: Drawing) -> Any:
        """What is told of texts, and below it of what each is led away from."""
        return self._caption([*texts, *[wanted.negative] * len(texts)], wanted.truncate)

    @torch.no_grad()
    def imagined(self, texts: Sequence[str], wanted: Drawing, random: Random) -> Embedding:
        """An embedding of a picture for each text: of `wanted.candidates`, the one nearest to the text's own (Ramesh et
        al., 2022, section 2.2)."""
        guided, count = wanted.prior_guidance != 1, len(texts)
        caption = self._both(texts, wanted) if guided else self._caption(texts, wanted.truncate)
        noise, chosen = self.model.config.prior_noise, self._prior_route(wanted)

        def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            towards, away = self.model.imagine(x.repeat(2, 1), timestep.repeat(2), caption).chunk(2)
            return towards, away

        network: Network = lambda x, timestep: self.model.imagine(x, timestep, caption)  # noqa: E731
        if guided:
            network = with_guidance(conditional, noise, wanted.prior_guidance or 1.0)
        empty = torch.empty(count, self.model.config.embedding_dim, device=caption.embedding.device)
        found = []
        for _ in range(wanted.candidates):
            *_, last = chosen.walk(chosen.denoiser(network), random(empty) * chosen.path.start, chosen.path, random)
            found.append(self.model.restored(last.x))
        said = F.normalize(caption.embedding[:count].float(), dim=-1)
        near = torch.stack([(F.normalize(each.float(), dim=-1) * said).sum(-1) for each in found])
        return torch.stack(found)[near.argmax(0), torch.arange(count, device=empty.device)]

    @torch.no_grad()
    def seen(self, picture: Original, count: int) -> Embedding:
        """The embedding of a picture, so many times."""
        like = next(cast(Any, self.model).parameters())
        pixels = Preprocessing(**vars(self.model.config.pixels))([picture.image()])
        return self.model.encode_image(pixels.to(like)).expand(count, -1)

    def embeddings(self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str], random: Random) -> Embedding:
        """What each picture is drawn from."""
        start = self.seen(wanted.init, len(seeds)) if wanted.init else self.imagined(texts, wanted, random)
        if wanted.towards is None:
            return start
        if isinstance(wanted.towards, str):
            end = self.imagined([wanted.towards] * len(seeds), wanted, Seeds([wanted.seed or 0] * len(seeds)))
        else:
            end = self.seen(wanted.towards, len(seeds))
        first, steps = wanted.seed or 0, max(1, wanted.count - 1)
        return slerp(start, end, torch.tensor([(seed - first) / steps for seed in seeds], device=start.device))

    @torch.inference_mode()
    def drawing(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str] | None = None, random: Random | None = None
    ) -> Iterator[Drawn]:
        """x and the predicted pictures after each step, before they are enlarged, on the model's device.

        wanted: as `resolved` gives it. texts: one for each seed; the one of `wanted` where None. All pictures of a way
        `towards` something have the first one's noise, and no text is told beside their embeddings.
        """
        random = self._random(wanted, seeds) if random is None else random
        texts = texts or [wanted.text or ""] * len(seeds)
        image = self.embeddings(wanted, seeds, texts, random)
        texts = texts if wanted.towards is None else [""] * len(seeds)
        chosen, network = wanted.route(self.noise), self._decoder(image, texts, wanted)
        shape = len(seeds), self.model.config.channels, *self._small(wanted.size or (0, 0))
        x = random(torch.empty(shape, device=image.device)) * chosen.path.start
        yield from chosen.walk(chosen.denoiser(network), x, chosen.path, random)

    def _random(self, wanted: Drawing, seeds: Sequence[int]) -> Random:
        return Seeds(seeds if wanted.towards is None else [wanted.seed or 0] * len(seeds))

    def _decoder(self, image: Embedding, texts: Sequence[str], wanted: Drawing) -> Network:
        """What draws pictures of these embeddings; guided, both predictions are made in one batch."""
        if wanted.guidance == 1:
            alone = self.model.tell(image, self._caption(texts, wanted.truncate))
            return lambda x, timestep: self.model(x, timestep, alone)
        both = self.model.tell(torch.cat([image, self.model.nothing(len(image)).to(image)]), self._both(texts, wanted))

        def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            towards, away = self.model(x.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
            return towards, away

        return with_guidance(conditional, self.noise, wanted.guidance, wanted.guidance_rescale)

    @torch.no_grad()
    def enlarged(
        self, small: Float[Tensor, "batch channels height width"], wanted: Drawing, random: Random
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Small pictures as large as is wanted."""
        if self.pixels or wanted.size is None:
            return small
        chosen = self._upsampling_route(wanted)
        beside = F.interpolate(small.clamp(-1, 1), list(wanted.size), mode="bicubic", antialias=True)
        final = chosen.path.strides[-1].here.timestep

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            return self.model.enlarge(x, timestep, beside, last=float(timestep[0]) == final)

        x = random(beside) * chosen.path.start
        *_, last = chosen.walk(chosen.denoiser(network), x, chosen.path, random)
        return last.x

    def draw(
        self, wanted: Drawing, seeds: Sequence[int], watch: Callable[[Drawn], object] = lambda state: None
    ) -> UInt8[Tensor, "batch channels rows columns"]:
        """A finished picture of each seed, as bytes on the CPU."""
        return self._drawn(wanted, seeds, None, watch)

    def draw_texts(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str]
    ) -> UInt8[Tensor, "batch channels rows columns"]:
        """A finished picture of each seed and text."""
        return self._drawn(wanted, seeds, texts, lambda state: None)

    def _drawn(
        self, wanted: Drawing, seeds: Sequence[int], texts: Sequence[str] | None, watch: Callable[[Drawn], object]
    ) -> UInt8[Tensor, "batch channels rows columns"]:
        random, x = self._random(wanted, seeds), torch.empty(0)
        for state in self.drawing(wanted, seeds, texts, random):
            watch(state)
            x = state.x
        return finished(self.enlarged(x, wanted, random))
