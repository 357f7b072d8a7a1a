"""Objectives of image autoencoders and of models on their codes: the KL autoencoder of latent diffusion, DALL-E's
discrete VAE, and DALL-E's decoder over text and image tokens, with its batches.

Axes: batch, channels, height, width; picture = of a data set; codebook; rows, columns = of the grid of image tokens;
text = tokens of every text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """The loss of latent diffusion's autoencoder (Rombach et al., 2022, section 3.1): an objective.

    The loss of a picture is the mean absolute error of its reconstruction, plus the mean squared error, which learns
    colours sooner, plus `edges` times the gradient difference (see `edge_difference`), which keeps lines sharp (the
    released code has a perceptual and an adversarial loss for that), plus `kl_weight` times the KL divergence of its
    latents from the standard normal distribution, in nats for each number of the picture.

    A batch has "pictures", bytes, and "draws", the seed of each row's latents (see `diffusion.add_draws`).
    """

    kl_weight: float = 1e-3
    edges: float = 1.0

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the sum over pictures; figures: `absolute_error`, `edge_error`, `squared_error`, of numbers from -1 to
        1, and `kl`, in nats for each number of the latents."""
        picture = to_signed(batch["pictures"])
        coded = model.encode(picture)
        again = model.decode(coded.sample(normal(batch["draws"], coded.mean.shape[1:])))
        apart, kl, edges = (again - picture).flatten(1), coded.kl(), edge_difference(again, picture)
        absolute, squared = apart.abs().mean(1), apart.square().mean(1)
        total = absolute + squared + self.edges * edges + self.kl_weight * kl / picture[0].numel()
        figures = {"absolute_error": absolute.sum(), "edge_error": edges.sum(), "kl": kl.sum() / coded.mean[0].numel()}
        figures["squared_error"] = squared.sum()
        return LossOutput(total.sum(), len(picture), figures)


def edge_difference(x: Values, y: Values) -> Float[Tensor, " batch"]:
    """Return the gradient difference loss: the mean of ||Δx| - |Δy||, Δ being the difference of neighbouring pixels,
    down and across (Mathieu, Couprie and LeCun, 2016, "Deep multi-scale video prediction beyond mean square error",
    section 3.2)."""
    parts = [(torch.diff(x, dim=way).abs() - torch.diff(y, dim=way).abs()).abs().flatten(1).mean(1) for way in (2, 3)]
    return parts[0] + parts[1]


TEMPERATURE, KL_WEIGHT = "temperature", "kl_weight"


@dataclass(frozen=True)
class Ramp:
    """A schedule: half a cosine from `start` to `end` over the first `steps` steps, and `end` after them."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """Return the value at a step (from 0)."""
        share = 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / max(1, self.steps)))
        return self.start + (self.end - self.start) * share


def add_ramps(data: Data, ramps: Mapping[str, Ramp]) -> MappedData:
    """Return data whose batches also have scheduled values by name, the same for each row [batch]. Held-out batches
    have the last values."""

    def change(batch: Batch, step: int, first: int) -> Batch:
        values = {name: ramp.end if step == HELD_OUT else ramp.at(step) for name, ramp in ramps.items()}
        return batch | {name: torch.full((rows_of(batch),), value) for name, value in values.items()}

    return MappedData(data, change, dict(ramps))


def discrete_vae_loss(model: Any, batch: Batch) -> LossOutput:
    """Return the evidence lower bound of DALL-E's discrete VAE (Ramesh et al., 2021, section 2.1 and appendix A): an
    objective.

    Codebook entries are sampled by Gumbel-softmax with "temperature". The loss is the negative logit-Laplace
    log-likelihood for each number of the picture, plus "kl_weight" times the KL divergence of the entries' distribution
    from the uniform one, summed over the grid, for each number too (the paper's β/192). A batch has "pictures", bytes,
    "draws", the seeds of the noise (see `diffusion.add_draws`), and both scheduled values. Figures: `squared_error`
    of the reconstruction from the likeliest entries, of numbers from -1 to 1; `kl`, in nats for each place of the grid;
    and `used`, the exponential of the entropy of the batch's mean distribution: how many entries are in use.
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
        used = torch.exp(-(mean * torch.log(mean + 1e-12)).sum())
    figures = {"squared_error": error.sum(), "kl": even.mean(1).sum(), "used": used * len(picture)}
    return LossOutput(total.sum(), len(picture), figures)


TEXT_WEIGHT = 1 / 8  # share of the loss of the text, as in the paper


@dataclass(frozen=True)
class TextImageLoss:
    """The loss of a decoder over the tokens of a text and an image: an objective (Ramesh et al., 2021, section 2.2).

    The cross-entropy of the text and that of the picture, each a mean over its tokens in the batch, count 1/8 and 7/8.
    A batch has "tokens" and "real" [batch, text], "codes" [batch, rows, columns] and "text_share" [batch]: its rows
    over its real tokens, the same for each, so that it may be split anywhere. Figures: `text_loss` and `picture_loss`,
    in nats a token.
    """

    text_weight: float = TEXT_WEIGHT

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the sum over rows."""
        tokens, real, codes = batch["tokens"], batch["real"], batch["codes"].flatten(1)
        logits = model(tokens, real, batch["codes"])
        words = cross_entropy(logits.text, tokens, real) * batch["text_share"][0]
        picture = cross_entropy(logits.picture, codes) / codes.shape[1]
        total = self.text_weight * words + (1 - self.text_weight) * picture
        return LossOutput(total, len(tokens), {"text_loss": words, "picture_loss": picture})


Codes = Int[Tensor, "picture rows columns"]


def use_image_tokens(data: Data, training: Codes, held: Tensor | None, real: Callable[[Tensor], Tensor]) -> MappedData:
    """Return data with "indices" and "tokens", whose pictures are replaced by their precomputed image tokens, "codes".

    real: gives True for the tokens of texts that are not padding. "text_share" is a batch's rows over its real tokens,
    the same for each row.
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        tokens, codes = batch["tokens"], held if step == HELD_OUT else training
        assert codes is not None
        counted = real(tokens)
        share = torch.full((len(tokens),), len(tokens) / float(counted.sum()))
        return {"tokens": tokens, "real": counted, "codes": codes[batch["indices"]], "text_share": share}

    return MappedData(data, change, tables=(training, held), by_row=False)
