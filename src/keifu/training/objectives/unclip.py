"""The objective of unCLIP: the sum of the diffusion losses of its prior, decoder and upsampler; and changes of its
batches.

The prior predicts CLIP's image embedding from a text, the decoder draws a picture from the embedding and the text, and
the upsampler enlarges the picture.

Axes: batch, channels, height, width; length = tokens of a text, embedding = numbers of an embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.data.images.io import to_signed
from keifu.layers.attention.masks import real_tokens
from keifu.layers.counter_rng import bits, uniform
from keifu.layers.diffusion.noise_schedule import moved
from keifu.training.objectives.diffusion import DiffusionLoss, Network
from keifu.training.objectives.mapped_data import HELD_OUT, MappedData
from keifu.training.protocols import Batch, Data, LossOutput

PLACES = 2**40 + 16  # first position in a row's random stream of draws other than noise
PRIOR_DROPOUT, TEXT_DROPOUT, IMAGE_DROPOUT = 0.1, 0.5, 0.1  # shares of the paper
BLUR = 0.6  # largest standard deviation, in pixels, of the blur of the upsampler's small pictures

Pixels = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True, eq=False)
class UnclipLoss:
    """Objective: the sum of the losses of prior, decoder and upsampler, which share no weights.

    A batch has "pictures" (batch, channels, height, width), bytes of the final size; their "embeddings" (batch,
    embedding); the captions' "tokens" and "real" (batch, length), where "real" is True on tokens that are not padding;
    and "draws" (see `diffusion.add_draws`). The model is a `models.unclip.unclip.Unclip` with a frozen text encoder.

    small: the decoder's height and width. empty: "tokens" and "real" of the empty text. Conditions are dropped at
    random, for classifier-free guidance: the prior's text in a share `prior_dropout` of the rows, the decoder's text in
    `text_dropout`, and the embedding in `image_dropout`. The upsampler is trained on random crops of `crop` pixels,
    conditioned on the small picture with a random blur (Ramesh et al., 2022, section 2.1 and appendix C).
    """

    prior: DiffusionLoss  # loss of normalised image embeddings
    decoder: DiffusionLoss
    upsampler: DiffusionLoss | None
    small: tuple[int, int]
    crop: int
    empty: tuple[Int[Tensor, "1 length"], Bool[Tensor, "1 length"]]
    prior_dropout: float = PRIOR_DROPOUT
    text_dropout: float = TEXT_DROPOUT
    image_dropout: float = IMAGE_DROPOUT

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over pictures. Figures: the losses `prior`, `decoder` and `upsampler`."""
        pictures, embeddings, draws = to_signed(batch["pictures"]), batch["embeddings"], batch["draws"]
        with torch.no_grad():
            caption = model.encode_text(batch["tokens"], batch["real"])
            null = model.encode_text(*(moved(tensor, draws.device) for tensor in self.empty))
        of_prior = _drop_captions(caption, null, self._chance(draws, 0) < self.prior_dropout)
        of_decoder = _drop_captions(caption, null, self._chance(draws, 1) < self.text_dropout)
        dropped = (self._chance(draws, 2) < self.image_dropout)[:, None]
        image = torch.where(dropped, model.null_embedding(len(draws)), embeddings)
        small = F.interpolate(pictures, self.small, mode="bicubic", antialias=True).clamp(-1, 1)
        predict_embedding: Network = lambda x, timestep: model.predict_embedding(x, timestep, of_prior)  # noqa: E731
        draw: Network = lambda x, timestep: model(x, timestep, model.embed(image, of_decoder))  # noqa: E731
        outputs = {
            "prior": self.prior.of(predict_embedding, model.prior.normalised(embeddings), self._seed(draws, 3)),
            "decoder": self.decoder.of(draw, small, self._seed(draws, 4)),
        }
        if self.upsampler is not None:
            large, enlarged = self._cut(pictures, small, draws)
            upsample: Network = lambda x, timestep: model.upsample(x, timestep, enlarged)  # noqa: E731
            outputs["upsampler"] = self.upsampler.of(upsample, large, self._seed(draws, 5))
        total = torch.stack([outcome.total for outcome in outputs.values()]).sum()
        return LossOutput(total, len(pictures), {name: outcome.total.detach() for name, outcome in outputs.items()})

    def _seed(self, draws: Int[Tensor, " batch"], condition: int) -> Int[Tensor, " batch"]:
        return bits(draws, torch.full_like(draws, PLACES + condition))

    def _chance(self, draws: Int[Tensor, " batch"], condition: int) -> Float[Tensor, " batch"]:
        return uniform(draws, torch.full_like(draws, PLACES + condition))

    def _cut(
        self, pictures: Pixels, small: Float[Tensor, "batch channels rows columns"], draws: Int[Tensor, " batch"]
    ) -> tuple[Tensor, Tensor]:
        """Return random crops of the large pictures, and the same crops of the small pictures after blur and
        enlargement.
        """
        height, width = pictures.shape[2:]
        blurred = blur_images(small, BLUR * self._chance(draws, 8))
        enlarged = F.interpolate(blurred, (height, width), mode="bicubic", antialias=True)
        top = ((height - self.crop + 1) * self._chance(draws, 6)).long()
        left = ((width - self.crop + 1) * self._chance(draws, 7)).long()
        return random_crops(pictures, top, left, self.crop), random_crops(enlarged, top, left, self.crop)


def _drop_captions(caption: Any, null: Any, dropped: Bool[Tensor, " batch"]) -> Any:
    """Return encoded captions, with the rows in `dropped` replaced by the null caption."""
    rows = [torch.where(dropped.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(caption, null, strict=True)]
    return type(caption)(*rows)


def blur_images(x: Pixels, deviation: Float[Tensor, " batch"]) -> Pixels:
    """Apply a 3 x 3 Gaussian blur to each picture, with its own standard deviation in pixels. Deviation 0 changes
    nothing.
    """
    side = torch.exp(-0.5 / deviation.clamp(min=0.05).square()).to(x.dtype)[:, None, None, None]
    for axis in (2, 3):
        rim = (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0)
        wide = F.pad(x, rim, mode="replicate")
        before, after = wide.narrow(axis, 0, x.shape[axis]), wide.narrow(axis, 2, x.shape[axis])
        x = (x + side * (before + after)) / (1 + 2 * side)
    return x


def random_crops(
    x: Pixels, top: Int[Tensor, " batch"], left: Int[Tensor, " batch"], side: int
) -> Float[Tensor, "batch channels side side"]:
    """Cut a square of `side` pixels from each picture, at its own `top` and `left`."""
    steps = torch.arange(side, device=x.device)
    rows, columns = (top[:, None] + steps)[:, :, None], (left[:, None] + steps)[:, None, :]
    picked = x.permute(0, 2, 3, 1)[torch.arange(len(x), device=x.device)[:, None, None], rows, columns]
    return picked.permute(0, 3, 1, 2)


def add_embeddings(data: Data, end: int, training: Tensor, validation: Tensor | None) -> MappedData:
    """Add "embeddings" and "real" to the batches of `data`, which have "indices": the precomputed embeddings of these
    pictures, and True up to the first end-of-text token (`end`) of "tokens".
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        table = validation if step == HELD_OUT else training
        assert table is not None
        return {**batch, "embeddings": table[batch["indices"]], "real": real_tokens(batch["tokens"], end)}

    return MappedData(data, change, end, (training, validation))


def embedding_moments(embeddings: Float[Tensor, "picture embedding"]) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each embedding dimension, (1, embedding) each, for the prior's
    normalisation.
    """
    deviation = embeddings.std(0, keepdim=True) if len(embeddings) > 1 else torch.ones_like(embeddings[:1])
    return embeddings.mean(0, keepdim=True), deviation.clamp(min=math.ulp(1.0) ** 0.5)
