"""Learning a codebook for pictures, and learning to say texts and pictures: DALL-E's two losses; knows no network.

Axes: batch; codebook; rows, columns = of the grid; text = tokens of every text; places = rows · columns.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keifu.data.images import signed
from keifu.layers.counted_random import gumbel
from keifu.layers.losses import cross_entropy
from keifu.training.protocols import Batch, Data, Outcome

TEMPERATURE, KL_WEIGHT = "temperature", "kl_weight"


@dataclass(frozen=True)
class Ramp:
    """A number that goes from `start` to `end` by half a cosine in the first `steps` steps, and stays there."""

    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """Its value in a step, counted from 0."""
        share = 0.5 - 0.5 * math.cos(math.pi * min(1.0, step / max(1, self.steps)))
        return self.start + (self.end - self.start) * share


class WithRamps:
    """Data whose batches also have numbers that change from step to step, by name, the same for each row [batch].

    Held-out batches have their last values.
    """

    def __init__(self, data: Data, ramps: Mapping[str, Ramp]):
        self.data, self.ramps = data, ramps

    @property
    def fingerprint(self) -> str:
        """Changes with the data and with any ramp."""
        return f"{self.data.fingerprint}:{dict(self.ramps)}"

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self._told(self.data.batch(step), lambda ramp: ramp.at(step))

    def validation(self) -> Iterator[Batch]:
        """The held-out batches."""
        for batch in self.data.validation():
            yield self._told(batch, lambda ramp: ramp.end)

    def _told(self, batch: Batch, value: Callable[[Ramp], float]) -> Batch:
        rows = len(next(iter(batch.values())))
        return {**batch, **{name: torch.full((rows,), value(ramp)) for name, ramp in self.ramps.items()}}


def discrete_autoencoding(model: Any, batch: Batch) -> Outcome:
    """The bound that DALL-E's autoencoder learns by (Ramesh et al., 2021, section 2.1 and appendix A): an objective.

    Entries are chosen by a softmax of logits and Gumbel noise over "temperature". The loss is the negative
    logit-Laplace likelihood for each number of the picture, and "kl_weight" times the divergence of the choice from an
    even one, of all places together, for each number too (the paper's β/192). A batch has "pictures", bytes, "draws",
    the seeds of the noise (see `diffusion.WithDraws`), and both ramps. Figures: `squared_error` of numbers from -1 to
    1, through the likeliest entries, `kl`, in nats a place, and `used`, e to the entropy of the batch's mean choice.
    """
    picture = signed(batch["pictures"])
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
    return Outcome(total.sum(), len(picture), figures)


@dataclass(frozen=True)
class SayingBoth:
    """The loss of a decoder over a text and a picture's entries: an objective (Ramesh et al., 2021, section 2.2).

    The cross-entropy of the text and that of the picture, each a mean over its tokens in the batch, count 1/8 and 7/8.
    A batch has "tokens" and "real" [batch, text], "codes" [batch, rows, columns] and "text_share" [batch]: its rows
    over its real tokens, the same for each, so that it may be split anywhere. Figures: `text_loss` and `picture_loss`,
    in nats a token.
    """

    text_weight: float = 1 / 8

    def __call__(self, model: Any, batch: Batch) -> Outcome:
        """The sum over rows."""
        tokens, real, codes = batch["tokens"], batch["real"], batch["codes"].flatten(1)
        said = model(tokens, real, batch["codes"])
        words = cross_entropy(said.text, tokens, real) * batch["text_share"][0]
        picture = cross_entropy(said.picture, codes) / codes.shape[1]
        total = self.text_weight * words + (1 - self.text_weight) * picture
        return Outcome(total, len(tokens), {"text_loss": words, "picture_loss": picture})
