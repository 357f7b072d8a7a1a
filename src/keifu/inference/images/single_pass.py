"""Image generation by a generator (GAN): noise becomes a picture in one pass of the network.

A seed belongs to a picture, as in `pixel_diffusion`.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch

from keifu.errors import UserError
from keifu.inference.images.pixel_diffusion import (
    AT_ONCE,
    Bytes,
    ImageRequest,
    Pipeline,
    SeededNoise,
    changed_settings,
    to_pixels,
    trained_size,
)
from keifu.inference.images.samplers import SamplerStep, Watch

HEEDED = ("seed", "count", "size", "steps", "sampler")  # settings of `ImageRequest` that are used


class GeneratorPipeline(Pipeline):
    """Pipeline of a generator. It has no sampler, no text and no classes."""

    usual_sampler = AT_ONCE
    pixels = False

    def label(self, name: str) -> int:
        """Raise `UserError`: there are no classes."""
        raise UserError(f"A GAN learns no classes, so it has no {name!r}: leave the label out.")

    def resolved(self, request: ImageRequest) -> ImageRequest:
        """Return the request with all defaults. Raises `UserError` for a setting of other models."""
        if request.text is not None:
            raise UserError(f"This model reads no text, so {request.text!r} means nothing to it: leave it out.")
        changed = changed_settings(request, HEEDED)
        if request.sampler not in (AT_ONCE, ImageRequest().sampler):
            changed.append("sampler")
        if changed:
            raise UserError(
                f"This model draws a picture in one pass and removes no noise, so {' and '.join(changed)} mean nothing "
                "to it: leave them out."
            )
        size = trained_size(self.model)
        for name, fixed in (("steps", 1), ("size", size)):
            if vars(request)[name] not in (None, fixed):
                raise UserError(f"{name} is {vars(request)[name]}, and this model's is always {fixed}: leave it out.")
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return replace(request, sampler=AT_ONCE, steps=1, size=size, seed=seed)

    @torch.inference_mode()
    def draw(self, request: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """Draw an image for each seed. Return uint8 on the CPU. `watch` is called once, with the pictures."""
        noise = SeededNoise(seeds)(torch.empty(len(seeds), self.model.config.latent_dim, device=self.device))
        pictures = self.model.generator(noise.to(next(self.model.parameters()).dtype)).float()
        watch(SamplerStep(pictures, pictures))
        return to_pixels(pictures)
