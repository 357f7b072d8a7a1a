"""Objective of generative adversarial networks (Goodfellow et al., 2014, section 3)."""

from typing import Any

from torch.func import functional_call
from torch.nn.functional import softplus

from keifu.data.images.io import to_signed
from keifu.layers.counter_rng import normal
from keifu.training.protocols import Batch, LossOutput


def adversarial_loss(model: Any, batch: Batch) -> LossOutput:
    """Return the losses of both networks, summed over pictures.

    The discriminator's is -ln D(x) - ln(1 - D(G(z))) of real pictures x and noise z, with a gradient for its own
    weights alone. The generator's is -ln D(G(z)), the form that does not saturate, with a gradient for the generator
    alone. So one backward pass gives both networks their gradients, and both are updated at the same time.

    A batch has "pictures" (bytes) and "draws", the seeds of the noise (see `diffusion.add_draws`). Figures: both
    losses, and the shares of real and of generated pictures that the discriminator takes for what they are.
    """
    real = to_signed(batch["pictures"])
    generated_images = model.generator(normal(batch["draws"], (model.config.latent_dim,)))
    real_scores, made_scores = model.discriminator(real), model.discriminator(generated_images.detach())
    frozen = {name: weight.detach() for name, weight in model.discriminator.named_parameters()}
    fooled = softplus(-functional_call(model.discriminator, frozen, generated_images)).sum()
    told_apart = (softplus(-real_scores) + softplus(made_scores)).sum()
    figures = {
        "discriminator_loss": told_apart, "generator_loss": fooled, "real_seen": (real_scores > 0).sum(),
        "generated_seen": (made_scores < 0).sum(),
    }  # fmt: skip
    return LossOutput(told_apart + fooled, len(real), figures)
