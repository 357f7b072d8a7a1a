"""Objectives of image autoencoders and of models of their codes: the KL autoencoder of latent diffusion, VQ-VAE,
DALL-E's discrete VAE, and DALL-E's decoder over text and image tokens.

Axes: batch, channels, height, width; picture = index in a data set; codebook; rows, columns = axes of the grid of image
tokens; text = tokens of a text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.images.io import to_signed
from keifu.layers.counter_rng import gumbel, normal
from keifu.layers.losses.cross_entropy import cross_entropy
from keifu.processes import rows_of
from keifu.training.objectives.mapped_data import HELD_OUT, MappedData
from keifu.training.protocols import Batch, Data, LossOutput

Values = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class AutoencoderKLLoss:
    """Objective of latent diffusion's autoencoder (Rombach et al., 2022, section 3.1).

    The loss of a picture is a sum of four terms: the mean absolute error of its reconstruction; the mean squared error,
    which learns colours sooner; `edges` times the gradient difference (see `edge_difference`), which keeps lines sharp
    (instead of the released code's perceptual and adversarial losses); and `kl_weight` times the KL divergence of its
    latents from the standard normal distribution, in nats per number of the picture.

    A batch has "pictures" (bytes) and "draws", the seed of each row's latents (see `diffusion.add_draws`).
    """

    kl_weight: float = 1e-3
    edges: float = 1.0

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over pictures. Figures: `absolute_error`, `edge_error` and `squared_error`, of
        numbers from -1 to 1, and `kl`, in nats per number of the latents.
        """
        picture = to_signed(batch["pictures"])
        coded = model.encode(picture)
        again = model.decode(coded.sample(normal(batch["draws"], coded.mean.shape[1:])))
        difference, kl, edges = (again - picture).flatten(1), coded.kl(), edge_difference(again, picture)
        absolute, squared = difference.abs().mean(1), difference.square().mean(1)
        total = absolute + squared + self.edges * edges + self.kl_weight * kl / picture[0].numel()
        figures = {"absolute_error": absolute.sum(), "edge_error": edges.sum(), "kl": kl.sum() / coded.mean[0].numel()}
        figures["squared_error"] = squared.sum()
        return LossOutput(total.sum(), len(picture), figures)


def edge_difference(x: Values, y: Values) -> Float[Tensor, " batch"]:
    """Return the gradient difference loss, (batch,): the mean of | |Δx| - |Δy| |, where Δ is the difference of
    neighbouring pixels, down and across (Mathieu, Couprie and LeCun, 2016, "Deep multi-scale video prediction beyond
    mean square error", section 3.2).
    """
    parts = [(torch.diff(x, dim=way).abs() - torch.diff(y, dim=way).abs()).abs().flatten(1).mean(1) for way in (2, 3)]
    return parts[0] + parts[1]


@dataclass(frozen=True)
class VQLoss:
    """Objective of VQ-VAE (van den Oord et al., 2017, equation 3), with a normal distribution of pixels.

    The loss of a picture is a sum of three terms: the mean squared error of its reconstruction; the mean squared
    distance of the codes from the encoder's vectors, which moves the codes; and `commitment` times the same distance,
    which keeps the vectors near their codes. The gradient of the reconstruction passes straight from the decoder to the
    encoder. A codebook of moving averages has no gradient: it is updated here, in training, so the figures are of the
    codes before. A batch has "pictures" (bytes).
    """

    commitment: float = 0.25

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over pictures. Figures: `squared_error` of the reconstruction, of numbers from -1 to
        1; `distance`, the mean squared distance of a vector's numbers from its code's; `used`, the number of different
        codes of the batch."""
        picture = to_signed(batch["pictures"])
        vectors = model.vectors(picture)
        codes = model.codebook.nearest(vectors)
        chosen_codes = model.codebook.vectors(codes)
        again = model.pictured(vectors + (chosen_codes - vectors).detach())
        squared = (again - picture).square().flatten(1).mean(1)
        codebook = (chosen_codes - vectors.detach()).square().flatten(1).mean(1)
        commitment = (chosen_codes.detach() - vectors).square().flatten(1).mean(1)
        total = (squared + codebook + self.commitment * commitment).sum()
        if model.training and model.codebook.averages:
            model.codebook.update(vectors, codes)
        n_codes = torch.tensor(float(len(codes.unique())), device=total.device) * len(picture)
        return LossOutput(
            total, len(picture), {"squared_error": squared.sum(), "distance": codebook.sum(), "used": n_codes}
        )


TEMPERATURE, KL_WEIGHT = "temperature", "kl_weight"


class Ramp(NamedTuple):
    """A schedule: half a cosine from `start` to `end` over the first `steps` steps, then `end`."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """Return the value at a step (from 0)."""
        share = 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / max(1, self.steps)))
        return self.start + (self.end - self.start) * share


def add_ramps(data: Data, ramps: Mapping[str, Ramp]) -> MappedData:
    """Add scheduled values to the batches of `data`: for each name of `ramps` a tensor (batch,) of one repeated value.
    Held-out batches have the last value.
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        values = {name: ramp.end if step == HELD_OUT else ramp.at(step) for name, ramp in ramps.items()}
        return batch | {name: torch.full((rows_of(batch),), value) for name, value in values.items()}

    return MappedData(data, change, dict(ramps))


def discrete_vae_loss(model: Any, batch: Batch) -> LossOutput:
    """Return the negative evidence lower bound of DALL-E's discrete VAE (Ramesh et al., 2021, section 2.1 and appendix
    A): an objective.

    Codebook entries are sampled by Gumbel-softmax with the batch's "temperature". The loss is the negative
    logit-Laplace log-likelihood per number of the picture, plus "kl_weight" times the KL divergence of the entries'
    distribution from the uniform one, summed over the grid and divided by the numbers of the picture (the paper's
    β/192). A batch also has "pictures" (bytes) and "draws", the seeds of the noise (see `diffusion.add_draws`).

    Figures: `squared_error` of the reconstruction from the likeliest entries, of numbers from -1 to 1; `kl`, in nats
    per grid cell; `used`, the exponential of the entropy of the batch's mean distribution: the number of entries in
    use.
    """
    picture = to_signed(batch["pictures"])
    logits = model.logits(picture)
    noise = gumbel(batch["draws"], logits.shape[1:])
    shares = ((logits + noise) / batch[TEMPERATURE][:, None, None, None]).softmax(1)
    likelihood = model.relaxed(shares).log_likelihood(model.values(picture)).flatten(1).mean(1)
    log_shares = logits.log_softmax(1)
    even = (log_shares.exp() * (log_shares + math.log(logits.shape[1]))).sum(1).flatten(1)
    total = -likelihood + batch[KL_WEIGHT] * even.sum(1) / picture[0].numel()
    with torch.no_grad():
        error = (model.decode(logits.argmax(1)) - picture).square().flatten(1).mean(1)
        mean = log_shares.exp().mean((0, 2, 3))
        perplexity = torch.exp(-(mean * torch.log(mean + 1e-12)).sum())
    figures = {"squared_error": error.sum(), "kl": even.mean(1).sum(), "used": perplexity * len(picture)}
    return LossOutput(total.sum(), len(picture), figures)


TEXT_WEIGHT = 1 / 8  # weight of the text's loss, as in the paper


@dataclass(frozen=True)
class TextImageLoss:
    """Objective of a decoder over the tokens of a text and an image (Ramesh et al., 2021, section 2.2).

    The mean cross-entropies of the text's tokens and of the image's tokens in the batch have the weights 1/8 and 7/8. A
    batch has "tokens" and "real" (batch, text), "codes" (batch, rows, columns) and "text_share" (batch): rows of the
    whole batch / its real tokens, repeated, so that any part of the batch knows it. Figures: `text_loss` and
    `picture_loss`, in nats per token.
    """

    text_weight: float = TEXT_WEIGHT

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over rows."""
        tokens, real, codes = batch["tokens"], batch["real"], batch["codes"].flatten(1)
        logits = model(tokens, real, batch["codes"])
        words = cross_entropy(logits.text, tokens, real) * batch["text_share"][0]
        picture = cross_entropy(logits.picture, codes) / codes.shape[1]
        total = self.text_weight * words + (1 - self.text_weight) * picture
        return LossOutput(total, len(tokens), {"text_loss": words, "picture_loss": picture})


Codes = Int[Tensor, "picture rows columns"]


def use_image_tokens(data: Data, train: Codes, held_out: Tensor | None, real: Callable[[Tensor], Tensor]) -> MappedData:
    """Replace the pictures of `data` by their precomputed image tokens, "codes"; the batches of `data` have "indices"
    and "tokens".

    train, held_out: codes of the training and of the held-out pictures. real: returns True for tokens that are not
    padding. "text_share" is the batch's rows over its real tokens, repeated.
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        tokens, codes = batch["tokens"], held_out if step == HELD_OUT else train
        assert codes is not None
        counted = real(tokens)
        share = torch.full((len(tokens),), len(tokens) / float(counted.sum()))
        return {"tokens": tokens, "real": counted, "codes": codes[batch["indices"]], "text_share": share}

    return MappedData(data, change, tables=(train, held_out), by_row=False)
